"""Writes docs/reference.md from the code: every key that a recipe may hold. `tests/test_docs.py` holds the page to it.

python docs/reference.py
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from factory import plugins
from schemas.call import Params
from schemas.recipe import EmbedderChoice, ReleasePlan, Target
from schemas.watch import Watch

PAGE = Path(__file__).with_name("reference.md")

HEAD = """\
# Every key of a recipe

Written by `python docs/reference.py` from the code. A key that does not stand here is an error, and the loader says what you may
have meant.

```yaml
name:      lower-case letters, digits, '.', '_', '-'; becomes a folder
seed:      random seed, 0 by default
target:    what is wanted
embedder:  which model makes vectors
teachers:  names, each with a kind and its keys
stages:    a list; item n writes into the folder 0n-key
release:   how a version is cut
watch:     when a collapsing dataset is to stop the run
```
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, model in (("target", Target), ("embedder", EmbedderChoice), ("release", ReleasePlan), ("watch", Watch), ("params", Params)):
        parts.append(f"## {name}\n\n{words(model)}\n\n{table(model)}")
    parts.append("## Teachers\n\n`params` are defaults that a stage's own override.")
    parts += [
        f"### kind: {kind}\n\n{words(plugins.teacher_class(kind))}\n\n{table(plugins.teacher_class(kind))}"
        for kind in plugins.names(plugins.TEACHERS)
    ]
    parts.append("## Stages")
    parts += [
        f"### {key}\n\n{words(plugins.stage_class(key))}\n\n{table(plugins.stage_class(key))}" for key in plugins.names(plugins.STAGES)
    ]
    return "\n\n".join(parts) + "\n"


def words(model: type[BaseModel]) -> str:
    """A class's docstring, its paragraphs as they are."""
    return inspect.cleandoc(model.__doc__ or "")


def table(model: type[BaseModel]) -> str:
    """A row a field: its key, what it takes, its default, and what it means."""
    if not model.model_fields:
        return "No keys."
    rows = [
        f"| `{name}` | {kind(field.annotation)} | {default(field)} | {field.description or ''} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| key | takes | default | |", "| --- | --- | --- | --- |", *rows])


def default(field: FieldInfo) -> str:
    """A field's default as YAML has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(args[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return " or ".join(kind(arg) for arg in args if arg is not NoneType)
    if origin is tuple:
        return f"list of {kind(args[0])}"
    if origin is dict:
        return f"map to {kind(args[1])}"
    plain = {str: "text", int: "whole number", float: "number", bool: "yes or no", Path: "path", Any: "anything", object: "anything"}
    if annotation in plain:
        return plain[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys: " + ", ".join(f"`{name}`" for name in annotation.model_fields)
    return re.sub(r"\b\w+\.", "", str(annotation))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
