"""Whether a text is what it was asked to be: JSON, YAML or XML that fits a schema, or calls of tools that exist, as they take them.

These take a text at a time, as parsers do. Each is bounded: in depth, in what aliases may unfold to, and XML may declare no entities.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import orjson
import polars as pl
import yaml

from factory.errors import GristmillError
from factory.kernels import kernel
from factory.structured import DECODER, lost_reference, schema_of
from filters.measures import packed

if TYPE_CHECKING:  # 30 ms to import, and only needed where a recipe has a schema
    from jsonschema import Draft202012Validator

Format = Literal["json", "yaml", "xml"]

MOST_DEEP = 200  # levels of YAML and XML; orjson writes 254 of JSON
MOST_NODES = 1_000_000  # of YAML, once its aliases are unfolded
MOST_CHARACTERS = 200  # of what is told of a fault
_TAG = "tag:yaml.org,2002:"
_TAGS = {
    _TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp", "binary", "set", "omap", "pairs", "merge")
}


class Fault(NamedTuple):
    """Why a text is not what it should be; `of_schema`: it is in the format, but does not fit the schema."""

    what: str
    of_schema: bool = False


class _Broken(ValueError):
    """A text that can't be read, with the reason."""


def validator(path: Path) -> Draft202012Validator:
    """The checker of a schema's file (.json, .yaml; Draft 2020-12); GristmillError where it is none. Nothing that it names is fetched."""
    return _validator(json.dumps(schema_of(path.name, path.parent), sort_keys=True))


@lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(json.loads(schema), registry=Registry())  # a registry of its own, or it would fetch what $ref names


def faults(texts: pl.Series, format: Format, *, fenced: bool = False, schema: Draft202012Validator | None = None) -> list[Fault | None]:
    """What is wrong with each text; None: nothing. `fenced`: it may stand in one Markdown code fence.

    JSON as RFC 8259 has it, with each key once in an object. YAML: one document, a mapping or a list, of what a safe loader reads.
    XML: one document without a document type.
    """
    inner = [_unfenced(text) if fenced else text for text in texts.fill_null("").to_list()]
    read = {"json": _json, "yaml": _yaml, "xml": _xml}[format]
    found: list[Fault | None] = []
    again: list[bytes] = []  # the JSON once more, in which each key stands once
    for text in inner:
        once = b""
        try:
            value = read(text)
            if format == "json":
                once = _written(value)
            elif format == "yaml" and schema is not None:
                value = _plain(text)
            found.append(None if schema is None else misfit(value, schema))
        except _Broken as broken:
            found.append(Fault(_short(str(broken))))
        again.append(once)
    if format == "json":
        for i in _with_double_keys(inner, again):
            if (double := _double_key(inner[i])) is not None and (found[i] is None or found[i].of_schema):  # type: ignore[union-attr]
                found[i] = Fault(_short(double))
    return found


def misfit(value: Any, schema: Draft202012Validator) -> Fault | None:
    """The first way in which a value does not fit."""
    try:
        error = next(schema.iter_errors(value), None)
    except RecursionError:
        return Fault("it is nested too deep", of_schema=True)
    except (ValueError, OverflowError):
        return Fault("a number in it is too large", of_schema=True)
    except Exception as error:  # a row's schema: a $dynamicRef that leads nowhere, a $ref to what is no schema
        return Fault(_short(f"its schema can't be read: {error}"), of_schema=True)
    return None if error is None else Fault(_short(f"{_short(error.message, 120)}; at {error.json_path}"), of_schema=True)


def _short(text: str, most: int = MOST_CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def _unfenced(text: str) -> str:
    bare = text.strip()
    if not (bare.startswith("```") and bare.endswith("```") and "\n" in bare):
        return text
    return bare[bare.index("\n") + 1 : -3]


def is_fenced(texts: pl.Series) -> pl.Series:
    """Which texts are one code fence from their first character to their last."""
    return texts.str.contains(r"(?s)^\s*```[^\n`]*\n.*```\s*$")


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text.strip():
            raise _Broken("it is empty") from error
        if text.lstrip().startswith("```"):
            raise _Broken("there is a code fence around it") from error
        raise _Broken(str(error)) from error


def _written(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise _Broken("it is nested too deep") from error


def _with_double_keys(texts: Sequence[str], again: Sequence[bytes]) -> list[int]:
    """Which texts have more keys than the value that was read from them: a later one has taken an earlier one's place."""
    read = [i for i, once in enumerate(again) if once]
    before, after = np.zeros(len(read), np.int64), np.zeros(len(read), np.int64)
    _members(*packed(pl.Series([texts[i] for i in read], dtype=pl.String)), before)
    _members(*packed(pl.Series([again[i] for i in read], dtype=pl.Binary).cast(pl.String)), after)
    return [read[k] for k in np.flatnonzero(before != after).tolist()]


@kernel
def _members(data: Any, offsets: Any, counts: Any) -> None:
    """Count the members of all objects in JSON: the colons outside of strings."""
    for i in range(offsets.shape[0] - 1):
        place, end, within, members = offsets[i], offsets[i + 1], False, 0
        while place < end:
            byte = data[place]
            if within and byte == 92:
                place += 1
            elif byte == 34:
                within = not within
            elif byte == 58 and not within:
                members += 1
            place += 1
        counts[i] = members


def _double_key(text: str) -> str | None:
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError) as error:  # also integers of more than 4,300 digits
        return str(error) if "stands twice" in str(error) else "a key stands twice in one object"
    return None


def _yaml(text: str) -> None:
    """Read the events of a document, which makes no values of it: nothing is unfolded, and depth costs nothing."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    weights: list[int] = []  # of the open collections: nodes in them, aliases unfolded
    keys: list[set[str] | None] = []  # of the open mappings
    odd: list[bool] = []  # whether a mapping waits for a key
    names: list[str | None] = []
    anchors: dict[str, int | None] = {}
    documents = 0

    def put(weight: int, key: str | None = None) -> None:
        if not weights:
            return
        weights[-1] += weight
        if weights[-1] > MOST_NODES:
            raise _Broken("it is too large, or its aliases unfold to too much")
        seen = keys[-1]
        if seen is not None:
            if odd[-1] and key is not None and key != "<<":
                if key in seen:
                    raise _Broken(f"the key {_short(key, 60)!r} stands twice in one mapping")
                seen.add(key)
            odd[-1] = not odd[-1]

    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Broken("there are several documents in it")
                continue
            if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
                if event.tag is not None and event.tag not in _TAGS and event.tag != "!":
                    raise _Broken(f"it has the tag {event.tag}, which a safe loader refuses")
                if not weights and isinstance(event, yaml.ScalarEvent):
                    raise _Broken("it is neither a mapping nor a list")
            if isinstance(event, yaml.ScalarEvent):
                if event.anchor:
                    anchors[event.anchor] = 1
                put(1, f"{event.tag or ''}{event.value}")
            elif isinstance(event, yaml.AliasEvent):
                unfolded = anchors.get(str(event.anchor), 1)
                if unfolded is None:
                    raise _Broken("an alias in it stands within what it names")
                put(unfolded)
            elif isinstance(event, yaml.CollectionStartEvent):
                if len(weights) >= MOST_DEEP:
                    raise _Broken(f"it is nested deeper than {MOST_DEEP}")
                if event.anchor:
                    anchors[event.anchor] = None
                weights.append(1)
                mapping = isinstance(event, yaml.MappingStartEvent)
                keys.append(set() if mapping else None)
                odd.append(True)
                names.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                weight, name = weights.pop(), names.pop()
                keys.pop()
                odd.pop()
                if name:
                    anchors[name] = weight
                put(weight)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1} column {mark.column + 1}" if mark is not None else ""
        raise _Broken(f"{getattr(error, 'problem', None) or error}{where}") from error
    if not documents:
        raise _Broken("it is empty")


def _plain(text: str) -> Any:
    """The values of YAML that has been read before, as JSON knows them."""
    try:
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return orjson.loads(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise _Broken(f"it can't be read: {error}") from error


class _Depth:
    """What an XML parser tells; keeps nothing."""

    def __init__(self) -> None:
        self.deep = 0

    def start(self, *_: Any) -> None:
        self.deep += 1
        if self.deep > MOST_DEEP:
            raise _Broken(f"it is nested deeper than {MOST_DEEP}")

    def end(self, *_: Any) -> None:
        self.deep -= 1

    def data(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def _xml(text: str) -> None:
    from xml.etree.ElementTree import ParseError

    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import DefusedXMLParser

    parser = DefusedXMLParser(target=_Depth(), forbid_dtd=True)
    try:
        parser.feed(text.strip())
        parser.close()
    except DefusedXmlException as error:
        raise _Broken("it declares a document type or entities") from error
    except ParseError as error:
        raise _Broken(str(error)) from error
    except (ValueError, LookupError) as error:
        raise error if isinstance(error, _Broken) else _Broken(str(error)) from error


# -- tools -----------------------------------------------------------------------------------------------------------------

OPENING, ENDING = "<tool_call>", "</tool_call>"
SIGNS = [OPENING, '"tool_calls"', '"name"']  # a turn without any of them holds no call
Tools = Mapping[str, "Draft202012Validator | None"]


def read_tools(path: Path) -> Tools:
    """The tools of a JSON file, by their names; GristmillError where it is no list of them."""
    try:
        return tools_of(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GristmillError(f"the tools can't be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:
        raise GristmillError(
            f"no list of tools: {error}", where=str(path), next='Each is {"name": ..., "parameters": a JSON schema}.'
        ) from error


@lru_cache(maxsize=256)
def tools_of(text: str) -> Tools:
    """Tools as the OpenAI API takes them, by their names, with what checks their arguments; ValueError where they are none."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        listed = orjson.loads(text)
        listed = orjson.loads(listed) if isinstance(listed, str) else listed
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(listed, list):
        raise ValueError("it is not a list")
    tools: dict[str, Draft202012Validator | None] = {}
    for tool in listed:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("a tool in it has no name")
        schema = function.get("parameters")
        if schema is not None:
            try:
                Draft202012Validator.check_schema(schema)
            except (SchemaError, RecursionError) as error:
                raise ValueError(
                    f"the parameters of {function['name']!r} are no JSON schema: {_short(str(error).splitlines()[0])}"
                ) from error
            if (lost := lost_reference(schema)) is not None:
                raise ValueError(f"the parameters of {function['name']!r} have the $ref {_short(lost, 60)!r}, which leads nowhere")
        tools[function["name"]] = None if schema is None else _validator(json.dumps(schema, sort_keys=True))
    return tools


def call_fault(turn: str, tools: Tools | None) -> str | None:
    """What is wrong with the calls in an assistant's turn; None: nothing, or it holds none. Without `tools` only their form is checked."""
    if OPENING in turn:
        place = 0
        while (start := turn.find(OPENING, place)) >= 0:
            end = turn.find(ENDING, start)
            if end < 0:
                return "a call is not closed"
            try:
                call = orjson.loads(turn[start + len(OPENING) : end])
            except orjson.JSONDecodeError as error:
                return _short(f"a call is not JSON: {error}")
            if (fault := _of_call(call, tools)) is not None:
                return fault
            place = end
        return None
    bare = turn.strip()
    if tools is None or bare[:1] not in ("{", "["):
        return None
    try:
        value = orjson.loads(bare)
    except orjson.JSONDecodeError:
        return None
    calls = value.get("tool_calls", value) if isinstance(value, dict) else value
    calls = calls if isinstance(calls, list) else [calls]
    listed = isinstance(value, dict) and "tool_calls" in value
    bare_calls = all(isinstance(call, dict) and "name" in call and ("arguments" in call or "parameters" in call) for call in calls)
    found = (_of_call(call, tools) for call in calls if listed or bare_calls)
    return next((fault for fault in found if fault is not None), None)


def _of_call(call: Any, tools: Tools | None) -> str | None:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        return "a call names no tool"
    if tools is not None and name not in tools:
        return f"no tool is called {_short(name, 60)!r}"
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError as error:
            return _short(f"the arguments of {name!r} are not JSON: {error}")
    if not isinstance(arguments, dict):
        return f"the arguments of {_short(name, 60)!r} are no JSON object"
    schema = tools[name] if tools is not None else None
    fault = misfit(arguments, schema) if schema is not None else None
    return None if fault is None else _short(f"the arguments of {name!r} break its schema: {fault.what}")


# -- tokens ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def tokenizer(where: str | Path) -> Any:
    """The tokenizer of a `tokenizer.json`, or (by a name) of a model in the cache of Hugging Face; ValueError: none."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    if isinstance(where, Path):
        path = where
        if not path.is_file():
            raise ValueError(f"there is no tokenizer {path}: name a tokenizer.json, or a folder with one")
    else:
        try:
            cached = try_to_load_from_cache(where, "tokenizer.json")
        except ValueError:  # no name of a model
            cached = None
        if not isinstance(cached, str):
            raise ValueError(
                f"there is no tokenizer {where!r} in Hugging Face's cache (`hf download {where} tokenizer.json` puts it there);"
                " a file is named by tokenizer_file"
            )
        path = Path(cached)
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower kind
        raise ValueError(f"{path} is no tokenizer.json: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found


def token_counts(texts: pl.Series, where: str | Path) -> Any:
    """How many tokens each text has, without those that a chat template would put around it; shape (n,)."""
    encoded = tokenizer(where).encode_batch_fast(texts.fill_null("").to_list(), add_special_tokens=False)
    return np.fromiter(map(len, encoded), np.int64, len(texts))
