"""Texts that were made to break a checker: each gets a verdict, in bounded time, and nothing raises."""

# ruff: noqa: E501 - lists of pieces
from __future__ import annotations

import json
import time
from pathlib import Path

import polars as pl
import pytest
import yaml

from factory.store import samples_frame
from filters import formats
from filters.rules import Rules
from schemas.sample import Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

FORM = Path(__file__).parents[2] / "filters" / "data" / "form.yaml"
MADE = Provenance(origin="made", generator="test")
MEGABYTE = 1_000_000
SECONDS = 5.0  # for one text of a megabyte as input and output
PIECES = [
    "(", "[", "[[", "{", '{"a":', "a", "a ", "a b ", "é", "e\u0301", "👩‍👩‍👧‍👦", "\u202e", "\x00", "**", "`", "``", "` `` ", "**a ", "[a](", "](",
    "| a ", "| a |\n", "|-|\n", "```\n", "> ", "* ", "\n", "\n\n", " ", "\t", "\\", '"', "“", "as an ", "i'm sorry ", "sorry ", "i can't ", "here is a ",
    "sure ", "1. ", "5. 5) ", "[NAME", "<insert ", "{{ ", "xxx", "x", "<p ", "<|", "https://", "&amp", "Ã", "â€", "ðŸ", "<tool_call>", "<tool_call>{", "- ",
    "? ", "&a [", "*a ", "<a>", "<a ", "&", "9", "0", "ΑΣ", "ａ", "क्ष", "ﷺ", "我", "'", "''", ", ", "…", "answer: ", "\nanswer", "<!--", "]]>",
]  # fmt: skip


def filled(piece: str) -> str:
    return (piece * (MEGABYTE // len(piece.encode()) + 1))[: MEGABYTE // max(1, len(piece.encode()) // len(piece))]


def seeds() -> pl.DataFrame:
    return frame(
        *(
            chat(f"Why does it fail on day {n} of the week?", f"It fails since the shop is closed on day {n}.", origin="real")
            for n in range(8)
        )
    )


@pytest.fixture(scope="module")
def rules() -> Rules:
    found = Rules(length=None)
    found.judge(frame(chat("Does it work? " * 60, "It does. " * 60)), FakeContext(seeds=seeds()))  # kernels and models are loaded
    return found


@pytest.mark.parametrize("piece", PIECES, ids=ascii)
def test_a_megabyte_of_anything_gets_a_verdict_in_time(rules: Rules, piece: str) -> None:
    text = filled(piece)
    sample = Sample(messages=(Message(role="user", content=text), Message(role="assistant", content=text)), provenance=MADE)
    started = time.thread_time()
    assert len(rules.judge(samples_frame([sample]), FakeContext(seeds=seeds()))) == 1
    assert time.thread_time() - started < SECONDS


def test_what_patterns_begin_with_repeated_a_megabyte_long(rules: Rules) -> None:
    """For each pattern, the words and characters that let it be searched, so that none is spared."""
    for parts in yaml.safe_load(FORM.read_text()).values():
        for entry in (entry for listed in parts.values() for entry in listed if isinstance(entry, dict)):
            text = filled(" ".join([*map(str, entry.get("words", [])), *entry.get("chars", "")]) + " i ")
            started = time.thread_time()
            assert len(rules.judge(frame(chat(text, text)), FakeContext(seeds=seeds()))) == 1
            assert time.thread_time() - started < SECONDS, entry["find"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
ENTITIES = (
    '<!DOCTYPE a [<!ENTITY a "lol">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 9}">' for a, b in zip("abcdefg", "bcdefgh", strict=True))
    + "]><a>&h;</a>"
)
DOCUMENTS = [
    "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, "[" * 300 + "]" * 300, "9" * MEGABYTE, "1e999999", "-" * MEGABYTE, "- " * 500_000, "? " * 500_000,
    BOMB, "&a [*a]", "{a: 1, " * 100_000, "!!python/object/apply:os.system [ls]", "!!timestamp '9999-99-99': 1", ENTITIES, "<a>" * 100_000,
    "<a " + " ".join(f'b{i}="1"' for i in range(80_000)) + "/>", '<?xml version="1.0" encoding="utf-16"?><a/>', "\x00", "\ufeff{}", '"\\ud800"', "",
    "x" * MEGABYTE, "```json\n" * 100_000, '{"a": ' + "1," * 300_000, "\ufffe", "{" + ",".join(f'"k{i}":1' for i in range(80_000)) + "}", "a: b: c", "%YAML 9.9\n---\na",
]  # fmt: skip


@pytest.mark.parametrize("format", ["json", "yaml", "xml"])
@pytest.mark.parametrize("text", DOCUMENTS, ids=[ascii(text[:24]) for text in DOCUMENTS])
def test_bombs_in_a_format_are_told_in_time(format: formats.Format, text: str, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": ["object", "array"]}')
    schema = formats.validator(path) if format != "xml" else None
    started = time.thread_time()
    [fault] = formats.faults(pl.Series([text]), format, fenced=True, schema=schema)
    assert time.thread_time() - started < SECONDS
    if text in (BOMB, ENTITIES, "&a [*a]", "<a>" * 100_000, "[" * 100_000 + "]" * 100_000):
        assert fault is not None


@pytest.mark.parametrize("turn", ["<tool_call>" * 90_000, "<tool_call>{}</tool_call>" * 40_000, '<tool_call>{"name": ' + "[" * 90_000, '{"name": "f", "arguments": "' + "[" * 90_000 + '"}'], ids=range(4))  # fmt: skip
def test_hostile_calls_are_told_in_time(turn: str) -> None:
    tools = formats.tools_of(json.dumps([{"name": "f", "parameters": {"type": "object"}}]))
    started = time.thread_time()
    assert formats.call_fault(turn, tools) is not None
    assert time.thread_time() - started < SECONDS
