"""Teachers behind the OpenAI protocol: OpenAI itself, and every server that speaks it (vLLM, SGLang, Ollama, llama.cpp)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from factory.errors import TeacherFault
from factory.teacher import Connection, Teacher
from generators.teachers.http import Server, address, missing_key, open_server, read_key, server_name
from schemas.call import Call, Finish, Params, Reply

OPENAI_URL = "https://api.openai.com/v1"
FINISH: dict[str | None, Finish] = {"stop": "stop", "length": "length", "content_filter": "refused"}
# What `extra` may not set: the ledger priced and keyed the call by what stands elsewhere, and one answer is read.
NOT_EXTRA = frozenset({"model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "best_of", "stream"})


class OpenAI(Teacher):
    """A model behind `base_url`. The key is read from the environment, and sent to another server than OpenAI's only if
    `api_key_env` is set. `provider` names who answers; a server of the same name and model may move without being asked anew.
    """

    kind: ClassVar[str] = "openai"

    base_url: str = OPENAI_URL
    api_key_env: str | None = None
    provider: str | None = None

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        return address(value)

    @property
    def key_env(self) -> str | None:
        """The environment variable that holds the key; None: no key is sent."""
        return self.api_key_env or ("OPENAI_API_KEY" if self.base_url == OPENAI_URL else None)

    def identity(self) -> tuple[str, str]:
        """The model, and who serves it.

        Two servers may serve different weights under one name, and an answer of the wrong model is worse than one that is
        asked twice: so another server's address stands for it until the recipe gives it a name by `provider`.
        """
        return self.provider or ("openai" if self.base_url == OPENAI_URL else server_name(self.base_url)), self.model

    def check(self) -> str | None:
        return missing_key(self.key_env)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        headers = {}
        if self.key_env:
            headers["Authorization"] = f"Bearer {read_key(self.key_env)}"
        async with open_server(self.base_url, self, headers) as server:
            yield OpenAIConnection(server, self.model, "max_completion_tokens" if self.base_url == OPENAI_URL else "max_tokens")


@dataclass(frozen=True)
class OpenAIConnection:
    """Asks over the OpenAI protocol: /chat/completions for messages, /completions for a raw prompt.

    `limit` is what the server calls the most tokens of a chat answer; OpenAI's newer models know only max_completion_tokens.
    """

    server: Server
    model: str
    limit: str = "max_tokens"

    async def ask(self, call: Call, params: Params) -> Reply:
        if clash := NOT_EXTRA & params.extra.keys():
            raise TeacherFault("never", f"params.extra may not set {', '.join(sorted(clash))}")
        raw = call.prompt is not None
        body: dict[str, Any] = {"model": self.model, "max_tokens" if raw else self.limit: params.max_tokens}
        body |= {"prompt": call.prompt} if raw else {"messages": [m.model_dump() for m in call.messages]}
        body |= params.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logprobs:
            body["logprobs"] = 1 if raw else True
        if call.json_schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": call.json_schema},
            }
            if raw:  # llama.cpp knows it by this name only where there is no chat
                body["json_schema"] = call.json_schema
        answer = await self.server.post("/completions" if raw else "/chat/completions", body | params.extra)
        try:
            return _reply(answer, call)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise TeacherFault("again", f"an answer of another shape than OpenAI's: {str(answer)[:200]}") from error


def _reply(answer: dict[str, Any], call: Call) -> Reply:
    choice = answer["choices"][0]
    message = choice.get("message") or {}
    finish = FINISH.get(choice.get("finish_reason"), "other")
    if call.prompt is not None:
        text = choice["text"]
    elif message.get("refusal"):
        text, finish = message["refusal"], "refused"
    else:
        text = message["content"] or ""
    usage = answer.get("usage") or {}
    # A server that does not count is charged the most that it can have been: a token is at least a byte.
    asked = sum(len(m.content.encode()) for m in call.messages) + len((call.prompt or "").encode())
    return Reply(
        text=text,
        finish=finish,
        tokens_in=usage.get("prompt_tokens", asked),
        tokens_out=usage.get("completion_tokens", len(text.encode())),
        logprob=_mean_logprob(choice.get("logprobs")) if call.params.logprobs else None,
    )


def _mean_logprob(told: dict[str, Any] | None) -> float | None:
    """The mean over the answer's tokens, from a chat's list of tokens or a completion's list of numbers; None: none were told."""
    if not told:
        return None
    each = [token["logprob"] for token in told["content"]] if told.get("content") else told.get("token_logprobs") or []
    numbers = [float(number) for number in each if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
