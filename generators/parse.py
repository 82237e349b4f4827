"""Reads what a teacher wrote: text in, items out, and beside them whatever was to be an item and is not.

Pure functions that never raise. A teacher is asked for one shape and answers in another, so each reader forgives what can be
forgiven without guessing at content: prose around a list, fences, trailing commas, an answer that was cut. JSON strings are taken
to the letter; from lists and blocks, quotes and emphasis around an item are removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

How = Literal["numbered", "json", "blocks", "text", "auto"]


@dataclass(frozen=True)
class Item:
    """One thing that a teacher wrote; `output` is None where only an input was written."""

    input: str
    output: str | None = None


@dataclass(frozen=True)
class Parsed:
    """What an answer holds.

    `leftovers` are pieces that were to be items and can't be read as such; `cut` is the piece that the end of the answer
    broke off, "" where nothing was. Prose before the first item is neither.
    """

    items: tuple[Item, ...] = ()
    leftovers: tuple[str, ...] = ()
    cut: str = ""


def parse(text: str, how: How = "auto", *, cut: bool = False) -> Parsed:
    """Read `text` as `how` says; "auto" looks at the text itself. `cut`: the answer ended because it was too long."""
    if how == "auto":
        how = _shape(text)
    return {"numbered": numbered, "json": from_json, "blocks": blocks, "text": free_text}[how](text, cut=cut)


def continued(prompt: str, answer: str, how: How) -> str:
    """The answer to a raw completion, with what the prompt had already said of its first item: its last line.

    A prompt that ends in `5. Why` and an answer ` was it declined?` are the item `5. Why was it declined?`. Free text takes the
    line without its mark (`5.`, `-` or `Text:`).
    """
    lead = prompt[prompt.rfind("\n") + 1 :]
    return (re.sub(r"^\s*(?:\d+[.)]|[-*•]|[^\W\d][\w ]{0,30}:)\s*", "", lead) if how == "text" else lead) + answer


# Lists: 1.  1)  (1)  **1.**  #1.  and the bullets - * •; "3.5 euros" is no mark, and neither is "-5".

_NUMBER = re.compile(r"(?:#{1,6}\s*)?(?:\*\*)?\(?\d{1,4}[.)](?:\*\*)?(?=$|[^\d.])\s*")
_BULLET = re.compile(r"[-*•–](?:\s+|(?=[\"“'«]))")


def numbered(text: str, *, cut: bool = False) -> Parsed:
    """Read a list, numbered or bulleted; indented lines go on with their item, other lines without a mark are leftovers."""
    lines = text.split("\n")
    mark = _NUMBER if any(_NUMBER.match(line.strip()) for line in lines) else _BULLET
    pieces: list[tuple[bool, list[str]]] = []  # (is it an item?, its lines)
    going_on = False
    for line in lines:
        bare = line.strip()
        if match := mark.match(bare):
            pieces.append((True, [bare[match.end() :]]))
            going_on = True
        elif not bare:
            going_on = False
        elif pieces:  # what stands before the first item is prose
            is_item, piece = pieces[-1]
            if line[0].isspace() if is_item else going_on:
                piece.append(bare)
            else:
                pieces.append((False, [bare]))
            going_on = True
    broken = pieces.pop()[1] if cut and going_on and lines[-1].strip() else []
    items = [Item(item) for is_item, piece in pieces if is_item and (item := clean("\n".join(piece)))]
    return Parsed(tuple(items), tuple("\n".join(piece) for is_item, piece in pieces if not is_item), "\n".join(broken))


_EMPHASIS = re.compile(r"(?<![\w*])\*\*(?=[^\s*])(.+?)(?<=[^\s*])\*\*(?![\w*])")
_QUOTES = {'"': '"', "“": "”", "«": "»", "'": "'", "‘": "’", "`": "`"}


def clean(text: str) -> str:
    """An item without the space, emphasis and quotes around it; a quote that opens or closes alone at an edge goes too."""
    text = _EMPHASIS.sub(r"\1", _whole(text).strip()).strip()
    for opening, closing in _QUOTES.items():
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and opening not in inner and closing not in inner:
            return inner.strip()
    if text.count('"') == 1 and '"' in (text[0], text[-1]):
        return text.strip('"').strip()
    return text


# JSON

_INPUTS = ("input", "question", "prompt", "instruction", "user", "query", "message", "text", "reworded")
_OUTPUTS = ("output", "answer", "completion", "response", "assistant", "label", "chosen")
_DECODER = json.JSONDecoder(strict=False)  # a raw line break inside a string is forgiven
_TRAILING_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])', re.DOTALL)


def from_json(text: str, *, cut: bool = False) -> Parsed:
    """Read JSON: a list of strings or objects, an object around one, one object or several; fenced or with prose around it.

    Of an answer that was cut, the whole elements are kept.
    """
    if cut and (at := _cut_item(text)) is not None:  # what stands inside an item is none, whole or not
        whole = from_json(text[:at], cut=True)
        return Parsed(whole.items, whole.leftovers, text[at:].strip())
    values, rest = _json_values(text)
    if not values and (mended := _TRAILING_COMMA.sub(lambda m: m[1] or "", text)) != text:
        values, rest = _json_values(mended)
    read = [(value, _item(value)) for value in values]
    leftovers = [_string(value) for value, item in read if item is None and value != ""]
    if rest.strip() and not cut:
        leftovers.append(rest.strip())
    return Parsed(tuple(item for _, item in read if item), tuple(leftovers), rest.strip() if cut else "")


def _json_values(text: str) -> tuple[list[Any], str]:
    """Every element of every list and every object that stands in `text`, and the rest behind a list that does not end."""
    values: list[Any] = []
    at, rest = 0, ""
    while (at := _next(text, at)) >= 0:
        found, tail = [], ""
        if whole := _decode(text, at):
            value, at = whole
            found = _elements(value)
        elif text[at] == "[":
            found, at, tail = _open_list(text, at)
        else:
            at += 1
        if found:
            values, rest = values + found, tail
    return values, rest


def _cut_item(text: str) -> int | None:
    """Where the outermost object begins that the end of `text` broke off and that is an item; None where none is."""
    at = 0
    while (at := _next(text, at)) >= 0:
        if whole := _decode(text, at):
            at = whole[1]
        elif text[at] == "{" and {name.lower().strip() for name in _whole_keys(text, at)} & {*_INPUTS, *_OUTPUTS}:
            return at
        else:
            at += 1
    return None


def _whole_keys(text: str, at: int) -> Iterator[str]:
    """The keys of the object that begins at `at`, up to the one whose value is broken off."""
    at = _past_space(text, at + 1)
    while (found := _decode(text, at)) and isinstance(found[0], str):
        key, at = found
        at = _past_space(text, at)
        if text[at : at + 1] != ":":
            return
        yield key
        value = _decode(text, _past_space(text, at + 1))
        if value is None:
            return
        at = _past_space(text, value[1])
        if text[at : at + 1] != ",":
            return
        at = _past_space(text, at + 1)


def _next(text: str, at: int) -> int:
    places = [place for mark in "[{" if (place := text.find(mark, at)) >= 0]
    return min(places, default=-1)


def _decode(text: str, at: int) -> tuple[Any, int] | None:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return value, end


def _open_list(text: str, at: int) -> tuple[list[Any], int, str]:
    """The elements of a list that is not whole, where to go on, and what stands behind its last whole element."""
    values: list[Any] = []
    start = at
    at = _past_space(text, at + 1)
    while element := _decode(text, at):
        value, at = element
        if isinstance(value, str | dict):
            values.append(value)
        at = _past_space(text, at)
        if text[at : at + 1] == "]":
            return values, at + 1, ""
        if text[at : at + 1] != ",":
            break
        at = _past_space(text, at + 1)
    if text[at : at + 1] == "]":  # behind a trailing comma
        return values, at + 1, ""
    return values, start + 1 if not values else at, text[at:]


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _elements(value: Any) -> list[Any]:
    """What a JSON value holds: its elements, those of the list in it, or itself; a list of numbers (`[1]` in prose) is nothing."""
    if isinstance(value, list):
        return value if any(isinstance(element, str | dict) for element in value) else []
    if _item(value) is None:
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) == 1:
            return _elements(lists[0])
        if value and all(key[-1:].isdigit() for key in value):  # {"1": ...} or {"example 1": ...}
            return list(value.values())
    return [value]


def _item(value: Any) -> Item | None:
    """A string, or an object with an input by any of its usual names."""
    if isinstance(value, str):
        text = _whole(value).strip()
        return Item(text) if text else None
    if not isinstance(value, dict):
        return None
    fields = {key.lower().strip(): _string(v) for key, v in value.items() if v is not None and v != ""}
    inputs = [fields[name] for name in _INPUTS if name in fields]
    if fields.get("instruction") and fields.get("input"):  # Alpaca's two halves of one input
        inputs = [f"{fields['instruction']}\n\n{fields['input']}"]
    outputs = [fields[name] for name in _OUTPUTS if name in fields]
    return Item(inputs[0], outputs[0] if outputs else None) if inputs and inputs[0] else None


def _string(value: Any) -> str:
    return _whole(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).strip()


def _whole(text: str) -> str:
    """Text that UTF-8 can write: half a surrogate pair (JSON lets it through) becomes a replacement mark."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Blocks: lines that name a field, as in "Input: ...", "Output: ...", set apart by empty lines or "Example 3".

_PARTNERS = {
    "input": ("output", "answer", "label"),
    "question": ("answer",),
    "prompt": ("completion", "response", "answer"),
    "instruction": ("output", "response", "answer"),
    "user": ("assistant",),
    "original": ("reworded",),
    "text": ("label",),
    "message": ("label",),
    "reworded": (),
}
_FIELD = re.compile(
    rf"(?:#{{1,6}}\s*)?(?:\*\*)?({'|'.join(sorted({*_PARTNERS, *_OUTPUTS}))})(?:\s*\d+)?(?:\*\*)?\s*:(?:\*\*)?\s*(.*)", re.IGNORECASE
)
_RULE = re.compile(r"\W*example\s*\d+\W*|-{3,}|={3,}|", re.IGNORECASE)  # a line that sets records apart


def blocks(text: str, *, cut: bool = False) -> Parsed:
    """Read records of named fields; the first field met begins a record, and only its partners are fields beside it."""
    records = list(_records(text))
    broken = "\n".join(value for record in records[-1:] for value in record.values()) if cut else ""
    items, leftovers = [], []
    for record in records[:-1] if cut else records:
        values = [clean(value) for value in record.values()]
        wants_output = bool(_PARTNERS.get(next(iter(record))) and any(len(r) > 1 for r in records))
        if all(values) and len(values) == 1 + wants_output:
            items.append(Item(values[0], values[1] if wants_output else None))
        elif any(values):
            leftovers.append("\n".join(f"{name.capitalize()}: {value}" for name, value in record.items()))
    return Parsed(tuple(items), tuple(leftovers), broken)


def _records(text: str) -> Iterator[dict[str, str]]:
    first, record, field = "", dict[str, str](), ""
    for line in text.split("\n"):
        match = _FIELD.fullmatch(line.strip())
        name = match[1].lower() if match else ""
        if match and name in _PARTNERS and name == (first or name):
            if record:
                yield _apart(record)
            first, field, record = name, name, {name: match[2]}
        elif match and first and name in _PARTNERS[first] and len(record) == 1:
            record[name], field = match[2], name
        elif field:
            record[field] += "\n" + line
    if record:
        yield _apart(record)


def _apart(record: dict[str, str]) -> dict[str, str]:
    """A record without the lines at the end of its values that only set it apart from the next."""
    ended = {}
    for name, value in record.items():
        lines = value.split("\n")
        while lines and _RULE.fullmatch(lines[-1].strip()):
            lines.pop()
        ended[name] = "\n".join(lines)
    return ended


# Free text

_FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.DOTALL)


def free_text(text: str, *, cut: bool = False) -> Parsed:
    """The whole answer is one item."""
    if cut:
        return Parsed(cut=text.strip())
    fenced = _FENCE.fullmatch(text)
    item = clean(fenced[1] if fenced else text)
    return Parsed((Item(item),) if item else ())


def _shape(text: str) -> Literal["numbered", "json", "blocks", "text"]:
    """What an answer looks like: JSON where it begins as such, else blocks, a list, JSON behind prose, or free text."""
    start = text.lstrip()
    if start.startswith(("[", "{", "```json", "```\n[", "```\n{")) and from_json(text).items:
        return "json"
    if any(item.output is not None for item in blocks(text).items):
        return "blocks"
    marked = [bool(_NUMBER.match(line.strip()) or _BULLET.match(line.strip())) for line in text.splitlines() if line.strip()]
    if sum(marked) >= 2 or marked[:1] == [True]:
        return "numbered"
    return "json" if from_json(text).items else "text"
