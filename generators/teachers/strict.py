"""Puts a JSON schema in the form that a way of keeping to it demands, and the answer back into the form that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}


def strict(schema: Schema) -> Schema:
    """The schema as OpenAI's strict mode demands it: no object takes other properties, and all that it has are required.

    A property that may be missing may be null instead, and has no default; `without_nulls` takes such nulls out of an answer.
    An object that maps any names to values can't be said in this mode: it is left as it is, and OpenAI refuses it.
    Raises KeyError for a reference to what the schema does not hold.
    Source: https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
    """
    return _strict(as_object(schema), as_object(schema))


def as_object(schema: Schema) -> Schema:
    """An object's schema as it is; anything else (a list, a number) as the property `answer` of an object."""
    if _resolved(schema, schema).get("type") == "object":
        return schema
    inner = {name: value for name, value in schema.items() if name != "$defs"}  # references to $defs start at the root
    return {"type": "object", "properties": {"answer": inner}, "required": ["answer"], "$defs": schema.get("$defs", {})}


def from_object(value: Any, schema: Schema) -> Any:
    """What `schema` asked for, out of an answer to `as_object(schema)`."""
    wrapped = as_object(schema) is not schema and isinstance(value, Mapping) and value.keys() == {"answer"}
    return value["answer"] if wrapped else value


def without_nulls(value: Any, schema: Schema) -> Any:
    """An answer to `strict(schema)` as one to `schema`: a property that may be missing and may not be null is left out if it is."""
    return _without_nulls(value, schema, schema)


def stated(schema: Schema) -> str:
    """The schema as a sentence of a prompt."""
    return f"Answer with JSON that fits this JSON schema, and with nothing else:\n{json.dumps(schema, ensure_ascii=False)}"


def _strict(schema: Schema, root: Schema) -> Schema:
    if "$ref" in schema:
        found = _resolved(schema, root)
        if len(schema) > 1:  # a reference may have nothing beside it
            schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
    made = {{"oneOf": "anyOf"}.get(name, name): value for name, value in schema.items() if name not in ("default", "discriminator")}
    for name in ("$defs", "definitions"):
        if name in made:
            made[name] = {key: _strict(inner, root) for key, inner in made[name].items()}
    if made.get("type") == "object" and made.get("additionalProperties", True) is True:
        made["additionalProperties"] = False
    if "properties" in made:
        needed = made.get("required", ())
        made["properties"] = {
            key: _strict(inner if key in needed else _nullable(inner, root), root) for key, inner in made["properties"].items()
        }
        made["required"] = list(made["properties"])
    if isinstance(made.get("items"), dict):
        made["items"] = _strict(made["items"], root)
    for name in ("anyOf", "allOf"):
        if name in made:
            made[name] = [_strict(inner, root) for inner in made[name]]
    if len(made.get("allOf", ())) == 1:  # allOf is not known there, and of one it means nothing
        made = {**{name: value for name, value in made.items() if name != "allOf"}, **made["allOf"][0]}
    return made


def _nullable(schema: Schema, root: Schema) -> Schema:
    if _takes_null(schema, root):
        return schema
    told = {name: value for name, value in schema.items() if name in ("title", "description")}
    inner = {name: value for name, value in schema.items() if name not in told and name != "default"}
    return {"anyOf": [inner, NULL], **told}


def _takes_null(schema: Schema, root: Schema) -> bool:
    schema = _resolved(schema, root)
    kind = schema.get("type")
    if kind == "null" or (isinstance(kind, list) and "null" in kind) or None in schema.get("enum", ()):
        return True
    return any(_takes_null(inner, root) for name in ("anyOf", "oneOf") for inner in schema.get(name, ()))


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference within `root` stands for."""
    while "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].split("/")[1:]:  # "#/$defs/row", or "#" for the whole
            found = found[part]
        schema = found
    return schema


def _without_nulls(value: Any, schema: Schema, root: Schema) -> Any:
    schema = _resolved(schema, root)
    either = schema.get("anyOf") or schema.get("oneOf") or ()
    choices = [inner for inner in either if _resolved(inner, root).get("type") != "null"]
    if len(choices) == 1:  # of more, none can be told to be the one that was meant
        return _without_nulls(value, choices[0], root) if value is not None else None
    if isinstance(value, dict) and "properties" in schema:
        known, needed = schema["properties"], schema.get("required", ())
        return {
            key: _without_nulls(inner, known[key], root) if key in known else inner
            for key, inner in value.items()
            if inner is not None or key not in known or key in needed or _takes_null(known[key], root)
        }
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_without_nulls(inner, schema["items"], root) for inner in value]
    return value
