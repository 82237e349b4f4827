"""Teachers behind the OpenAI protocol: OpenAI itself, and every server that speaks it (vLLM, SGLang, Ollama, llama.cpp)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

import orjson
from pydantic import Field, field_validator, model_validator

from factory.errors import TeacherFault
from factory.teacher import BatchConnection, Batching, Connection, Heard, Port, Teacher
from generators.teachers.http import (
    Server,
    addresses,
    each,
    in_the_shape_of,
    missing_keys,
    named,
    open_server,
    ports_of,
    read_key,
    server_name,
)
from generators.teachers.strict import Schema, as_object, from_object, stated, strict, without_nulls
from schemas.call import Call, Finish, Params, Reply
from schemas.logprobs import pack
from schemas.sample import Message

OPENAI_URL = "https://api.openai.com/v1"
OWN_FORM = ("api.openai.com", ".openai.azure.com")  # servers of OpenAI's models, in any region
FINISH: dict[str | None, Finish] = {"stop": "stop", "eos": "stop", "length": "length", "content_filter": "refused"}
# What `extra` may not set: the ledger priced and keyed the call by what stands elsewhere, and one answer is read.
NOT_EXTRA = frozenset({"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "best_of", "stream"})
THINKING = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)

Structured = Literal["schema", "strict", "object", "prompt"]


class OpenAI(Teacher):
    """A model behind `base_url`, which may be a list of servers. Keys are read from the environment (`api_key_env` may be a list of
    variables), and sent to another server than OpenAI's only if `api_key_env` is set. Each server is asked with each key.

    `provider` names who answers; a server of the same name and model may move without being asked anew. `structured` is how it
    is made to keep to a JSON schema: "schema" where the server knows schemas, "object" where it only knows that JSON is wanted
    (the schema then stands in the question), "prompt" where it knows neither.

    `mode: batch` asks in batches of at most `batch_size` calls, which cost half as much and may take a day; each is looked
    after every `poll_s` seconds, by the first server and key.
    """

    kind: ClassVar[str] = "openai"

    base_url: str | tuple[str, ...] = OPENAI_URL
    api_key_env: str | tuple[str, ...] | None = None
    provider: str | None = None
    structured: Literal["schema", "object", "prompt"] = "schema"
    mode: Literal["live", "batch"] = "live"
    batch_size: int = Field(10_000, ge=1, le=50_000)
    poll_s: float = Field(60, gt=0)

    _addresses = field_validator("base_url")(addresses)

    _named = model_validator(mode="after")(named)

    @property
    def servers(self) -> tuple[str, ...]:
        return each(self.base_url)

    @property
    def key_envs(self) -> tuple[str, ...]:
        """The environment variables that hold the keys; none: no key is sent."""
        return each(self.api_key_env) or (("OPENAI_API_KEY",) if self.servers == (OPENAI_URL,) else ())

    def identity(self) -> tuple[str, str]:
        """The model, and who serves it.

        Two servers may serve different weights under one name, and an answer of the wrong model is worse than one that is
        asked twice: so another server's address stands for it until the recipe gives it a name by `provider`.
        """
        return self.provider or ("openai" if self.servers == (OPENAI_URL,) else server_name(self.servers[0])), self.model

    def check(self) -> str | None:
        return missing_keys(self.key_envs)

    def ports(self) -> tuple[Port, ...]:
        return ports_of(self.servers, self.key_envs, self.model, self._open)

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        return self.ports()[0].connect(home)

    def batching(self) -> Batching:
        return Batching(self.mode == "batch", self.batch_size, self.poll_s, self._open_batches)

    @asynccontextmanager
    async def _open(self, url: str, key_env: str | None, home: Path) -> AsyncIterator[Connection]:
        headers = {"Authorization": f"Bearer {read_key(key_env)}"} if key_env else {}
        async with open_server(url, self, headers) as server:
            yield OpenAIConnection(server, self.model, *self._form(url))

    @asynccontextmanager
    async def _open_batches(self, home: Path) -> AsyncIterator[BatchConnection]:
        from generators.teachers.batches import OpenAIBatches, open_openai

        url, key = self.servers[0], read_key(self.key_envs[0]) if self.key_envs else None
        async with open_openai(url, key, self.timeout_s) as client:
            yield OpenAIBatches(client, url, self.model, *self._form(url))

    def _form(self, url: str) -> tuple[str, Structured]:
        """What that server calls the most tokens of a chat answer, and how it is made to keep to a schema."""
        own = (urlsplit(url).hostname or "").endswith(OWN_FORM)
        structured: Structured = "strict" if own and self.structured == "schema" else self.structured
        return "max_completion_tokens" if own else "max_tokens", structured


@dataclass(frozen=True)
class OpenAIConnection:
    """Asks over the OpenAI protocol: /chat/completions for messages, /completions for a raw prompt.

    `limit` is what the server calls the most tokens of a chat answer; OpenAI's newer models know only max_completion_tokens.
    `structured` is the teacher's, or "strict" for a server that takes OpenAI's own form of a schema and no other.
    """

    server: Server
    model: str
    limit: str = "max_tokens"
    structured: Structured = "schema"

    async def ask(self, call: Call, params: Params) -> Heard:
        body = question(call, params, self.model, self.limit, self.structured)
        answer, readings = await self.server.post("/chat/completions" if call.prompt is None else "/completions", body)
        with in_the_shape_of("OpenAI", answer, readings):
            return Heard(reply_of(answer, call, params, self.structured), readings)


def question(call: Call, params: Params, model: str, limit: str, structured: Structured) -> dict[str, Any]:
    """The body of a request. Written by hand, since pydantic's model_dump takes longer than all the rest of a request's head."""
    extra = params.extra
    if extra and (clash := NOT_EXTRA & extra.keys()):
        raise TeacherFault("never", f"params.extra may not set {', '.join(sorted(clash))}")
    raw, schema = call.prompt is not None, call.json_schema
    tell = schema if schema and structured in ("object", "prompt") else None
    body: dict[str, Any] = {"model": model}
    if call.prompt is not None:
        body["prompt"] = f"{_stated(tell, structured)}\n\n{call.prompt}" if tell else call.prompt
        body["max_tokens"] = params.max_tokens
    else:
        body["messages"] = [{"role": m.role, "content": m.content} for m in (_told(call, tell, structured) if tell else call.messages)]
        body[limit] = params.max_tokens
    if params.temperature is not None:
        body["temperature"] = params.temperature
    if params.top_p is not None:
        body["top_p"] = params.top_p
    if params.stop:
        body["stop"] = params.stop
    if params.logprobs or params.top_logprobs:
        body["logprobs"] = (params.top_logprobs or 1) if raw else True
        if params.top_logprobs and not raw:
            body["top_logprobs"] = params.top_logprobs
    if schema and structured != "prompt":
        body["response_format"] = _response_format(schema, structured)
        if raw and structured == "schema":  # llama.cpp knows it by this name only where there is no chat
            body["json_schema"] = schema
    return body | extra if extra else body


def reply_of(answer: Mapping[str, Any], call: Call, params: Params, structured: Structured = "schema") -> Reply:
    """What a server's answer says. Raises KeyError, IndexError, TypeError, AttributeError or ValueError where it is another's."""
    choice = answer["choices"][0]
    finish, reasoning = FINISH.get(choice.get("finish_reason"), "other"), None
    if call.prompt is not None:
        text = choice["text"]
    else:
        message = choice["message"]
        text = message["content"] or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")  # DeepSeek and SGLang; vLLM and OpenRouter
        if message.get("refusal"):
            text, finish = message["refusal"], "refused"
        elif thought := THINKING.match(text):  # one that is not closed was cut before there was an answer
            text, reasoning = text[thought.end() :], reasoning or thought[1].strip()
    if call.json_schema and structured in ("strict", "object"):
        text = _as_asked(text, call.json_schema)
    usage = answer.get("usage") or {}
    # A server that does not count is charged the most that it can have been: a token is at least a byte.
    tokens_in = counted(usage, "prompt_tokens")
    tokens_out = counted(usage, "completion_tokens")
    if tokens_in is None:
        tokens_in = sum(len(m.content.encode()) for m in call.messages) + len((call.prompt or "").encode())
    if tokens_out is None:
        tokens_out = len(text.encode()) + len((reasoning or "").encode())
    elif total := counted(usage, "total_tokens"):  # xAI counts reasoning, which it bills, only there
        tokens_out = max(tokens_out, total - tokens_in)
    details = usage.get("prompt_tokens_details") or {}
    told = choice.get("logprobs") if params.logprobs or params.top_logprobs else None
    return Reply(
        text=text,
        finish=finish,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        tokens_cached=counted(details, "cached_tokens") or counted(usage, "prompt_cache_hit_tokens") or 0,  # the latter: DeepSeek
        tokens_to_cache=counted(details, "cache_write_tokens") or 0,
        reasoning=reasoning or None,
        logprob=_mean_logprob(told) if told else None,
        top_logprobs=pack(_positions(told)) if told and params.top_logprobs else None,
    )


def counted(usage: Mapping[str, Any], name: str) -> int | None:
    """A number of tokens that a server told; None: it did not."""
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def _told(call: Call, schema: Schema, structured: Structured) -> list[Message]:
    """The messages, with the schema stated in the last one of the user."""
    messages = list(call.messages)
    place = max((n for n, m in enumerate(messages) if m.role == "user"), default=len(messages) - 1)
    last = messages[place]
    messages[place] = Message(role=last.role, content=f"{last.content}\n\n{_stated(schema, structured)}")
    return messages


def _stated(schema: Schema, structured: Structured) -> str:
    return stated(as_object(schema) if structured == "object" else schema)


def _response_format(schema: Schema, structured: Structured) -> dict[str, Any]:
    if structured != "schema":
        try:
            made = _strict_of(orjson.dumps(schema))
        except KeyError as error:
            raise TeacherFault("never", f"the JSON schema refers to {error}, which it does not hold") from error
        if structured == "object":
            return {"type": "json_object"}
        schema = made
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@lru_cache(64)  # all calls of a stage bring the same one
def _strict_of(schema: bytes) -> Schema:
    return strict(orjson.loads(schema))


def _as_asked(text: str, schema: Schema) -> str:
    """The answer to the schema as it was asked for, from one to the schema as it was sent; as it is where it is not even JSON."""
    try:
        value = orjson.loads(text)
    except ValueError:
        return text
    wanted = without_nulls(from_object(value, schema), schema)
    return text if wanted == value else json.dumps(wanted, ensure_ascii=False)


def _mean_logprob(told: Mapping[str, Any]) -> float | None:
    """The mean over the answer's tokens, from a chat's list of tokens or a completion's list of numbers; None: none were told."""
    each = [token["logprob"] for token in told["content"]] if told.get("content") else told.get("token_logprobs") or []
    numbers = [float(number) for number in each if number is not None and math.isfinite(number)]
    return sum(numbers) / len(numbers) if numbers else None


def _positions(told: Mapping[str, Any]) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """Each token of the answer with the likeliest there, in the form of a chat or (OpenAI, vLLM) of a completion."""
    if content := told.get("content"):
        return [
            (token["token"], _number(token["logprob"]), [(a["token"], _number(a["logprob"])) for a in token.get("top_logprobs") or ()])
            for token in content
        ]
    others = told.get("top_logprobs") or repeat({})
    return [
        (token, _number(logprob), [(text, _number(number)) for text, number in (found or {}).items()])
        for token, logprob, found in zip(told.get("tokens") or (), told.get("token_logprobs") or (), others, strict=False)
    ]


def _number(logprob: float | None) -> float:
    return float("-inf") if logprob is None else float(logprob)  # JSON has no infinities, so servers write null
