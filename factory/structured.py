"""Turns what a model wrote into JSON that fits a schema, or into the words that tell the model what is wrong with it.

A repair may change punctuation and nothing else: no word or number of the answer may be lost, added or cut short by it,
because a silently wrong row is worse than a question that is asked again.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from itertools import accumulate, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel

from factory.errors import GristmillError
from factory.recipe import RecipeLoader
from schemas.call import Call
from schemas.canonical import canonical_json, content_hash
from schemas.sample import Message

if TYPE_CHECKING:  # 30 ms to import, and only needed once an answer is checked
    from jsonschema import Draft202012Validator

T = TypeVar("T")

MOST_PROBLEMS, MOST_CHARACTERS = 5, 300  # of what a model is told at once
MOST_BRACKETS = 1000  # that are tried, since a model that repeats itself may write thousands
FILES = (".json", ".yaml", ".yml")


class Fit(NamedTuple):
    """An answer's JSON, canonical, or what is wrong with it. `repaired`: it was not the whole answer, or its punctuation was mended."""

    text: str | None
    problem: str | None = None
    repaired: bool = False


def fit(text: str, schema: Mapping[str, Any], *, cut: bool = False) -> Fit:
    """The JSON that an answer holds, if it fits the schema (Draft 2020-12; formats are not checked).

    An answer that is not JSON as it stands is looked through for its code fence or first object or array, and that is repaired
    if need be. `cut`: the answer ended at its token limit, so what it holds may look whole and is not; it must be JSON as it stands.
    Of several values that fit none is chosen. Keys that stand twice, NaN and half surrogates are refused, since the next reader
    of the file would read something else.
    """
    try:
        try:
            value = _decoded(DECODER.decode, text)
        except json.JSONDecodeError:
            return Fit(None, "the answer was cut off before its JSON ended") if cut else _search(text, schema)
    except _Refused as refused:
        return Fit(None, str(refused))
    if cut and type(value) in (int, float):
        return Fit(None, "the answer was cut off, so its number may have lost digits")
    return _checked(value, schema)


def correction(call: Call, text: str, problem: str) -> Call | None:
    """The question that asks a model to mend its answer: the call, what it wrote, and what is wrong. None: a raw prompt has no turns."""
    if not call.messages:
        return None
    wish = (
        f"This answer can't be used: {problem}.\nAnswer again, with nothing but JSON that fits the schema: no other words, no code fence."
    )
    if call.json_schema is not None:
        wish += f"\nThe schema: {canonical_json(call.json_schema)}"
    said = Message(role="assistant", content=text if text.strip() else "(nothing)")  # servers refuse an empty turn
    return call.model_copy(update={"messages": (*call.messages, said, Message(role="user", content=wish))})


def schema_of(where: str | Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The JSON schema that a recipe in `folder` names; GristmillError where there is none, or it is not one.

    `where` is the schema itself, a file of one (.json, .yaml), or a pydantic model: `people.py:Person`, or `people:Person` for
    a module that lies in the folder or is installed.
    """
    if not isinstance(where, str):
        return _sound(where, "json_schema")
    found = _read(folder / where, where) if where.endswith(FILES) else _model(where, folder)
    return _sound(found, where)


class _Refused(ValueError):
    """JSON that says something which other readers would read otherwise, or not at all."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {twice!r} stands twice in one object")
    return found


def _not_json(constant: str) -> Any:
    raise _Refused(f"{constant} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_not_json)


def _decoded(decode: Callable[..., T], *text: Any) -> T:
    """What a method of the decoder makes of a text. JSONDecodeError: it is not JSON; _Refused."""
    try:
        return decode(*text)
    except (json.JSONDecodeError, _Refused):
        raise
    except RecursionError as error:
        raise _Refused("it is nested too deep") from error
    except ValueError as error:  # Python reads no integers of more than 4,300 digits
        raise _Refused("a number in it is too long") from error


def _checked(value: Any, schema: Mapping[str, Any], *, repaired: bool = False) -> Fit:
    validator = _validator(canonical_json(dict(schema)))
    try:
        text = canonical_json(value)
        text.encode()
        return Fit(text, None, repaired) if validator.is_valid(value) else Fit(None, _problems(validator, value))
    except UnicodeEncodeError:
        return Fit(None, "a string in it holds half of a surrogate pair")
    except RecursionError:
        return Fit(None, "it is nested too deep")
    except (ValueError, OverflowError):
        return Fit(None, "a number in it is too large")


@lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    return Draft202012Validator(json.loads(schema), registry=Registry())  # a registry of its own, or it would fetch what $ref names


def _problems(validator: Draft202012Validator, value: Any) -> str:
    from jsonschema.exceptions import best_match

    found = [best_match([error]) for error in islice(validator.iter_errors(value), MOST_PROBLEMS)]
    return "; and ".join(f"{_short(error.message)}; at {error.json_path}" for error in found)


def _short(message: str) -> str:
    half = MOST_CHARACTERS // 2
    return message if len(message) <= MOST_CHARACTERS else f"{message[:half]} … {message[-half:]}"


FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*)\n[ \t]*```", re.MULTILINE | re.DOTALL)  # from the first to the last: JSON may hold some
OPENING = re.compile(r"[{\[]")
DEPTH = {"{": 1, "[": 1, "}": -1, "]": -1}
WITHIN = re.compile(r"""["']\s*:\s*\Z|[,"']\s*\Z""")  # what stands before a bracket that is not the first
GOES_ON = re.compile(r"""\s*(?:[:"']|,\s*["'{\[])""")  # and after one that is not the last
PIECE = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[{}\[\]]', re.DOTALL)  # a string, or a bracket outside of strings


def _search(text: str, schema: Mapping[str, Any]) -> Fit:
    """The value within an answer that is not JSON as a whole."""
    fenced = FENCE.search(text)
    inner = fenced[1] if fenced else text
    try:
        if fenced:
            return _checked(_decoded(DECODER.decode, inner), schema, repaired=True)
    except json.JSONDecodeError:
        pass  # it may have a comment before it
    opening = OPENING.search(inner)
    if opening is None:
        return Fit(None, "there is no JSON object or array in it")
    if WITHIN.search(inner, 0, opening.start()):
        return Fit(None, "it is not JSON: its first bracket is missing")
    try:
        value, end = _decoded(DECODER.raw_decode, inner, opening.start())
    except json.JSONDecodeError as fault:
        return _repaired(inner[opening.start() :].rstrip(), schema, fault)
    if _goes_on(inner, end):
        return Fit(None, f"it is not JSON: it goes on after {inner[max(0, end - 40) : end]!r}")
    fits = [_checked(found, schema, repaired=True) for found in (value, *_more(inner, end))]
    good = {found.text: found for found in fits if found.text is not None}
    if len(good) > 1:
        return Fit(None, "there are several JSON values in it that fit, and only one is wanted")
    return next(iter(good.values()), fits[0])


def _more(text: str, start: int) -> Iterator[Any]:
    """The values that come after the first, as far as they are found with so many tries."""
    for _ in range(MOST_BRACKETS):
        if (opening := OPENING.search(text, start)) is None:
            return
        try:
            value, start = _decoded(DECODER.raw_decode, text, opening.start())
            yield value
        except ValueError:
            start = opening.end()


def _goes_on(text: str, end: int) -> bool:
    """Whether a value that ends there was only a part of the answer's. Brackets too many right behind it are none of its."""
    depths = accumulate(DEPTH[bracket] for bracket in re.findall(r"[{}\[\]]", text[end:].lstrip(" \t\r\n}]")))
    return GOES_ON.match(text, end) is not None or any(depth < 0 for depth in depths)


def _repaired(text: str, schema: Mapping[str, Any], fault: json.JSONDecodeError) -> Fit:
    """`text` begins with the bracket of a value that does not parse."""
    from json_repair import repair_json

    broken = Fit(None, f"it is not JSON: {fault.msg} after {fault.doc[max(0, fault.pos - 40) : fault.pos]!r}")
    end = _end(text)
    if end is None and not _ends_whole(text):
        return broken
    if end is not None and (GOES_ON.match(text, end) or re.search(r"[{}\[\]]", text[end:])):
        return broken  # a bracket within a string was taken for the last one
    try:
        mended = repair_json(text[:end], return_objects=True, skip_json_loads=True)
        value = _decoded(DECODER.decode, json.dumps(mended))  # refuses NaN, and joins the halves of surrogate pairs
    except ValueError:
        return broken
    if isinstance(value, list) != text.startswith("[") or _words(_plain(text[:end])) != _words("\n".join(_leaves(value))):
        return broken
    return _checked(value, schema, repaired=True)


def _end(text: str) -> int | None:
    """Where the value that `text` begins with ends, by its brackets; None: it does not."""
    depth = 0
    for piece in PIECE.finditer(text):
        depth += DEPTH.get(piece[0], 0)
        if depth == 0:
            return piece.end()
    return None


def _ends_whole(text: str) -> bool:
    """Whether nothing but closing brackets can be missing: it ends behind a value, and not within a string."""
    unescaped = re.sub(r"\\.", "", text)
    quote = '"' if '"' in unescaped else "'"
    return text.endswith(("}", "]", quote)) and unescaped.count(quote) % 2 == 0


ESCAPES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\[bfnrt\\]")
FRACTION = re.compile(r"\d+\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")
PUNCTUATION = re.compile(r"[\s{}\[\],:\"'\\“”‘’]+")
EMPTY = "\0"


def _plain(text: str) -> str:
    """Broken JSON with its escapes resolved, and a mark for each empty string."""
    text = re.sub(r"\"\"|''", EMPTY, text)
    return ESCAPES.sub(lambda found: json.loads(f'"{found[0]}"'), text)


def _leaves(value: Any) -> Iterator[str]:
    """The keys and values of a value, in their order, as `_plain` has them."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key or EMPTY
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value or EMPTY if isinstance(value, str) else json.dumps(value)


def _words(text: str) -> str:
    """What a repair must not change: all that is not punctuation of JSON; in the spelling of JSON, since Python says None."""
    text = FRACTION.sub(lambda found: repr(float(found[0])), text)
    return PUNCTUATION.sub("", re.sub(r"\bNone\b", "null", text)).casefold()


def _read(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=RecipeLoader)
    except OSError as error:
        raise GristmillError(f"the schema can't be read: {error.strerror}", where=where, next=f"Looked for: {path}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise GristmillError(f"the schema can't be read: {error}", where=where) from error


def _model(where: str, folder: Path) -> dict[str, Any]:
    module_name, _, class_name = where.rpartition(":")
    if not module_name or not class_name:
        named = "a file (person.json, person.yaml) or a pydantic model (people.py:Person)"
        raise GristmillError(f"{where!r} names no schema", where="json_schema", next=f"Name {named}, or write the schema itself.")
    try:
        module = _import(module_name, folder)
    except Exception as error:  # it is the user's code, and may raise anything
        raise GristmillError(
            f"{module_name} can't be imported: {type(error).__name__}: {error}", where=where, next=f"Looked in {folder} first."
        ) from error
    model = getattr(module, class_name, None)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        models = sorted(n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, BaseModel) and v is not BaseModel)
        has = ", ".join(models) or "none"
        raise GristmillError(f"{class_name} is no pydantic model in {module_name}", where=where, next=f"It has: {has}.")
    try:
        return model.model_json_schema()
    except Exception as error:  # pydantic's own kinds, and what a model's hooks raise
        raise GristmillError(f"{class_name} has no JSON schema: {error}", where=where) from error


def _import(name: str, folder: Path) -> ModuleType:
    path = (folder / (name if name.endswith(".py") else name.replace(".", "/") + ".py")).resolve()
    if not (name.endswith(".py") or path.is_file()):
        return importlib.import_module(name)
    spec = spec_from_file_location(content_hash("schema_", str(path)), path)  # hides no other people.py
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # pydantic looks names up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _sound(schema: Any, where: str) -> dict[str, Any]:
    """The schema as plain JSON, if it is one and all its references lead somewhere."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    next = "See https://json-schema.org/understanding-json-schema (Draft 2020-12)."
    if not isinstance(schema, Mapping):
        raise GristmillError("the schema is not a mapping", where=where, next=next)
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(schema), allow_nan=False))
        Draft202012Validator.check_schema(plain)
    except SchemaError as error:
        raise GristmillError(f"not a JSON schema: {_short(error.message)}; at {error.json_path}", where=where, next=next) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise GristmillError(f"not a JSON schema: {error}", where=where, next=next) from error
    if (lost := lost_reference(plain)) is not None:
        raise GristmillError(f"$ref {lost!r} leads nowhere", where=where, next="Put what it names under $defs; nothing is fetched.")
    return plain


def lost_reference(schema: Mapping[str, Any] | bool) -> str | None:
    """A $ref of a sound schema that leads to no schema in it; None: there is none. Nothing is fetched."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    whole = DRAFT202012.create_resource(schema)
    waiting = [(whole, Registry().with_resource("", whole).resolver())]
    while waiting:
        part, resolver = waiting.pop()
        ref = part.contents.get("$ref") if isinstance(part.contents, Mapping) else None
        try:
            if ref is not None and not isinstance(resolver.lookup(ref).contents, (Mapping, bool)):
                return str(ref)
        except (Unresolvable, TypeError, ValueError):  # the last two: of a pointer through a number, or by a name into a list
            return str(ref)
        waiting += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]
    return None
