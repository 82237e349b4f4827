"""A teacher without a model: deterministic, free and at once, for tests, for documentation and for trying a recipe out."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from factory.errors import TeacherFault
from factory.teacher import FREE, Connection, Heard, Price, Teacher
from schemas.call import Call, Finish, Params, Reply
from schemas.canonical import content_hash

LIST_ITEM = re.compile(r"^\s*\d+[.)]\s*(\S.*)$", re.MULTILINE)
OPEN_ITEM = re.compile(r"(\d+)[.)]\s*$")
WORD = re.compile(r"[^\W\d_][\w'’-]*")
ITEMS = 5


class Fake(Teacher):
    """Answers from the call's key alone, so the same question has the same answer everywhere.

    `answers` are given out in an order that hangs on the key. Without them, `mode` "numbered" writes a numbered list of lines
    in the words of the prompt, and "echo" gives the prompt back. A call with a json_schema gets a value that fits it. The share
    `fail_rate` of all calls fails, the same ones each time.
    """

    kind: ClassVar[str] = "fake"

    model: str = "fake"
    mode: Literal["numbered", "echo"] = "numbered"
    answers: tuple[str, ...] = ()
    latency_ms: float = Field(0, ge=0)
    fail_rate: float = Field(0, ge=0, le=1)

    def identity(self) -> tuple[str, str]:
        """Its name and all that decides what it says."""
        return "fake", f"{self.model}@{content_hash('', [self.mode, self.answers])[:16]}"

    def known_price(self, tokens_in: int | None = None) -> Price:
        return self.price or FREE

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        yield FakeConnection(self)


@dataclass(frozen=True)
class FakeConnection:
    """Counts a token a word."""

    teacher: Fake

    async def ask(self, call: Call, params: Params) -> Heard:
        await asyncio.sleep(self.teacher.latency_ms / 1000)
        chance = random.Random(call.model_copy(update={"params": params}).key(*self.teacher.identity()))
        if chance.random() < self.teacher.fail_rate:
            raise TeacherFault("never", "this call fails, as fail_rate asks for")
        prompt = call.prompt if call.prompt is not None else call.messages[-1].content
        text = self._answer(call, prompt, chance)
        for stop in params.stop:
            text = text.split(stop)[0]
        words = text.split()
        finish: Finish = "stop"
        if len(words) > params.max_tokens:
            text, finish = _cut(text, params.max_tokens), "length"
        asked = sum(len(m.content.split()) for m in call.messages) + len((call.prompt or "").split())
        return Heard(Reply(text=text, finish=finish, tokens_in=asked, tokens_out=min(len(words), params.max_tokens)))

    def _answer(self, call: Call, prompt: str, chance: random.Random) -> str:
        if self.teacher.answers:
            return chance.choice(self.teacher.answers)
        if call.json_schema is not None:
            return json.dumps(_value(call.json_schema, call.json_schema, prompt, chance), ensure_ascii=False)
        return prompt if self.teacher.mode == "echo" else _numbered(prompt, chance)


def _numbered(prompt: str, chance: random.Random) -> str:
    """A list of new lines; a raw prompt that ends with an open number ("6.") is gone on with."""
    opened = OPEN_ITEM.search(prompt)
    first = int(opened[1]) if opened else 1
    lines = [f"{first + n}. {_phrase(prompt, chance)}" for n in range(ITEMS)]
    return "\n".join(lines).removeprefix(f"{first}." if opened else "")


def _phrase(prompt: str, chance: random.Random) -> str:
    """A line of the prompt's own list with a third of its words changed for others of the prompt."""
    lines = LIST_ITEM.findall(prompt) or [line for line in prompt.splitlines() if line.strip()] or ["nothing was asked"]
    words = [word.lower() for line in lines for word in WORD.findall(line)] or ["nothing"]
    said = chance.choice(lines).split()[:24]
    for place in chance.sample(range(len(said)), max(1, len(said) // 3)):
        said[place] = chance.choice(words)
    return " ".join(said)


def _value(schema: dict[str, Any], root: dict[str, Any], prompt: str, chance: random.Random) -> Any:
    """A value that fits the common part of JSON Schema: objects, lists, choices, bounds and references."""
    if "$ref" in schema:
        return _value(root["$defs"][schema["$ref"].rpartition("/")[2]], root, prompt, chance)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return chance.choice(schema["enum"])
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return _value(schema[choice][0], root, prompt, chance)
    match schema.get("type"):
        case "object":
            return {name: _value(inner, root, prompt, chance) for name, inner in schema.get("properties", {}).items()}
        case "array":
            count = schema.get("minItems", min(ITEMS, schema.get("maxItems", ITEMS)))
            return [_value(schema.get("items", {}), root, prompt, chance) for _ in range(count)]
        case "integer":
            low = schema.get("minimum", 1)
            return chance.randint(low, schema.get("maximum", low + 4))
        case "number":
            low = schema.get("minimum", 0)
            return round(chance.uniform(low, schema.get("maximum", low + 1)), 3)
        case "boolean":
            return chance.random() < 0.5
        case "null":
            return None
        case _:
            return _phrase(prompt, chance)


def _cut(text: str, words: int) -> str:
    """The first `words` words, with the white space that stands between them."""
    found = list(re.finditer(r"\S+", text))
    return text[: found[words - 1].end()]
