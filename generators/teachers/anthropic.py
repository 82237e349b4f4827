"""Teachers behind the Anthropic protocol: Claude, and servers that speak /v1/messages."""

from __future__ import annotations

import json
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

ANTHROPIC_URL = "https://api.anthropic.com"
VERSION = "2023-06-01"
FINISH: dict[str | None, Finish] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "stop",
    "max_tokens": "length",
    "refusal": "refused",
}
NOT_EXTRA = frozenset({"model", "messages", "system", "max_tokens", "stream", "tools", "tool_choice"})


class Anthropic(Teacher):
    """A model behind `base_url`, asked by chat only. Keys and `provider` as for the kind `openai`."""

    kind: ClassVar[str] = "anthropic"

    base_url: str = ANTHROPIC_URL
    api_key_env: str | None = None
    provider: str | None = None

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str) -> str:
        return address(value).removesuffix("/v1")

    @property
    def key_env(self) -> str | None:
        """The environment variable that holds the key; None: no key is sent."""
        return self.api_key_env or ("ANTHROPIC_API_KEY" if self.base_url == ANTHROPIC_URL else None)

    def identity(self) -> tuple[str, str]:
        """The model, and who serves it; another server's address stands for it until `provider` names it (as for `openai`)."""
        return self.provider or ("anthropic" if self.base_url == ANTHROPIC_URL else server_name(self.base_url)), self.model

    def check(self) -> str | None:
        return missing_key(self.key_env)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        headers = {"anthropic-version": VERSION}
        if self.key_env:
            headers["x-api-key"] = read_key(self.key_env)
        async with open_server(self.base_url, self, headers) as server:
            yield AnthropicConnection(server, self.model)


@dataclass(frozen=True)
class AnthropicConnection:
    """Asks /v1/messages. A json_schema is put as a tool that the model must use: what it fills in is the answer."""

    server: Server
    model: str

    async def ask(self, call: Call, params: Params) -> Reply:
        if call.prompt is not None:
            raise TeacherFault("never", "this teacher takes messages, not a raw prompt: use a chat template for it")
        if any(m.role == "tool" for m in call.messages):
            raise TeacherFault("never", "this teacher takes no messages of the role 'tool'")
        if clash := NOT_EXTRA & params.extra.keys():
            raise TeacherFault("never", f"params.extra may not set {', '.join(sorted(clash))}")
        turns = [m.model_dump() for m in call.messages if m.role != "system"]
        body: dict[str, Any] = {"model": self.model, "max_tokens": params.max_tokens, "messages": turns}
        body |= params.model_dump(include={"temperature", "top_p"}, exclude_none=True)
        if system := "\n\n".join(m.content for m in call.messages if m.role == "system"):
            body["system"] = system
        if params.stop:
            body["stop_sequences"] = list(params.stop)
        if call.json_schema:
            body["tools"] = [{"name": "answer", "description": "Give the answer.", "input_schema": _tool_schema(call.json_schema)}]
            body["tool_choice"] = {"type": "tool", "name": "answer"}
        answer = await self.server.post("/v1/messages", body | params.extra)
        try:
            return _reply(answer, call)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise TeacherFault("again", f"an answer of another shape than Anthropic's: {str(answer)[:200]}") from error


def _is_object(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "object"


def _tool_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool's input is an object; anything else (a list, a number) is put into one and taken out again."""
    if _is_object(schema):
        return schema
    inner = {name: value for name, value in schema.items() if name != "$defs"}  # references to $defs start at the root
    return {"type": "object", "properties": {"answer": inner}, "required": ["answer"], "$defs": schema.get("$defs", {})}


def _reply(answer: dict[str, Any], call: Call) -> Reply:
    blocks = answer["content"]
    used = next((b["input"] for b in blocks if b["type"] == "tool_use"), None)
    if used is not None and call.json_schema:
        used = used if _is_object(call.json_schema) else used.get("answer")
        text = json.dumps(used, ensure_ascii=False)
    else:
        text = "".join(b["text"] for b in blocks if b["type"] == "text")
    usage = answer["usage"]
    read = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return Reply(
        text=text,
        finish=FINISH.get(answer.get("stop_reason"), "other"),
        tokens_in=sum(usage.get(name) or 0 for name in read),
        tokens_out=usage["output_tokens"],
    )
