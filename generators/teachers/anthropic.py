"""Teachers behind the Anthropic protocol: Claude, and servers that speak /v1/messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from generators.teachers.openai import counted
from generators.teachers.strict import as_object, from_object
from schemas.call import Call, Finish, Params, Reply

ANTHROPIC_URL = "https://api.anthropic.com"
VERSION = "2023-06-01"
FINISH: dict[str | None, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "refused",
}
COUNTS = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
NOT_EXTRA = frozenset({"model", "messages", "system", "max_tokens", "stream", "tools", "tool_choice"})


class Anthropic(Teacher):
    """A model behind `base_url`, asked by chat only. Servers, keys, `provider` and batches as for the kind `openai`."""

    kind: ClassVar[str] = "anthropic"

    base_url: str | tuple[str, ...] = ANTHROPIC_URL
    api_key_env: str | tuple[str, ...] | None = None
    provider: str | None = None
    mode: Literal["live", "batch"] = "live"
    batch_size: int = Field(10_000, ge=1, le=100_000)
    poll_s: float = Field(60, gt=0)

    _addresses = field_validator("base_url")(addresses)

    _named = model_validator(mode="after")(named)

    @property
    def servers(self) -> tuple[str, ...]:
        return tuple(url.removesuffix("/v1") for url in each(self.base_url))

    @property
    def key_envs(self) -> tuple[str, ...]:
        """The environment variables that hold the keys; none: no key is sent."""
        return each(self.api_key_env) or (("ANTHROPIC_API_KEY",) if self.servers == (ANTHROPIC_URL,) else ())

    def identity(self) -> tuple[str, str]:
        """The model, and who serves it; another server's address stands for it until `provider` names it (as for `openai`)."""
        return self.provider or ("anthropic" if self.servers == (ANTHROPIC_URL,) else server_name(self.servers[0])), self.model

    def check(self) -> str | None:
        return missing_keys(self.key_envs)

    def ports(self) -> tuple[Port, ...]:
        return ports_of(self.servers, self.key_envs, self.model, self._open)

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        return self.ports()[0].connect(home)

    def batching(self) -> Batching:
        return Batching(self.mode == "batch", self.batch_size, self.poll_s, self._open_batches)

    @asynccontextmanager
    async def _open_batches(self, home: Path) -> AsyncIterator[BatchConnection]:
        from generators.teachers.batches import AnthropicBatches, open_anthropic

        url, key = self.servers[0], read_key(self.key_envs[0]) if self.key_envs else None
        async with open_anthropic(url, key, self.timeout_s) as client:
            yield AnthropicBatches(client, url, self.model)

    @asynccontextmanager
    async def _open(self, url: str, key_env: str | None, home: Path) -> AsyncIterator[Connection]:
        headers = {"anthropic-version": VERSION}
        if key_env:
            headers["x-api-key"] = read_key(key_env)
        async with open_server(url, self, headers) as server:
            yield AnthropicConnection(server, self.model)


@dataclass(frozen=True)
class AnthropicConnection:
    """Asks /v1/messages. A json_schema is put as a tool that the model must use: what it fills in is the answer."""

    server: Server
    model: str

    async def ask(self, call: Call, params: Params) -> Heard:
        answer, readings = await self.server.post("/v1/messages", question(call, params, self.model))
        with in_the_shape_of("Anthropic", answer, readings):
            return Heard(reply_of(answer, call), readings)


def question(call: Call, params: Params, model: str) -> dict[str, Any]:
    """The body of a request. Raises TeacherFault where this protocol has no words for the call."""
    if call.prompt is not None:
        raise TeacherFault("never", "this teacher takes messages, not a raw prompt: use a chat template for it")
    if any(m.role == "tool" for m in call.messages):
        raise TeacherFault("never", "this teacher takes no messages of the role 'tool'")
    if clash := NOT_EXTRA & params.extra.keys():
        raise TeacherFault("never", f"params.extra may not set {', '.join(sorted(clash))}")
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": params.max_tokens,
        "messages": [{"role": m.role, "content": m.content} for m in call.messages if m.role != "system"],
    }
    if params.temperature is not None:
        body["temperature"] = params.temperature
    if params.top_p is not None:
        body["top_p"] = params.top_p
    if system := "\n\n".join(m.content for m in call.messages if m.role == "system"):
        body["system"] = system
    if params.stop:
        body["stop_sequences"] = params.stop
    if call.json_schema:
        body["tools"] = [{"name": "answer", "description": "Give the answer.", "input_schema": as_object(call.json_schema)}]
        body["tool_choice"] = {"type": "tool", "name": "answer"}
    return body | params.extra


def reply_of(answer: Mapping[str, Any], call: Call) -> Reply:
    """What a server's answer says. Raises KeyError, TypeError, AttributeError or ValueError where it is another's."""
    blocks = answer["content"]
    used = next((b["input"] for b in blocks if b["type"] == "tool_use"), None)
    if used is not None and call.json_schema:
        text = json.dumps(from_object(used, call.json_schema), ensure_ascii=False)
    else:
        text = "".join(b["text"] for b in blocks if b["type"] == "text")
    usage = answer.get("usage") or {}
    asked, cached, to_cache = (counted(usage, name) for name in COUNTS)
    # As for `openai`: what a server does not count is charged by its bytes.
    tokens_out = counted(usage, "output_tokens")
    return Reply(
        text=text,
        finish=FINISH.get(answer.get("stop_reason"), "other"),
        tokens_in=sum(len(m.content.encode()) for m in call.messages) if asked is None else asked + (cached or 0) + (to_cache or 0),
        tokens_out=len(text.encode()) if tokens_out is None else tokens_out,
        tokens_cached=cached or 0,
        tokens_to_cache=to_cache or 0,
        reasoning="\n".join(b["thinking"] for b in blocks if b["type"] == "thinking") or None,
    )
