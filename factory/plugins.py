"""Finds stages and teachers by entry point: the built-in ones come through the same gate as a stranger's."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

from factory.errors import GristmillError
from factory.stage import Stage
from factory.teacher import Teacher

STAGES, TEACHERS = "gristmill.stages", "gristmill.teachers"

T = TypeVar("T")


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: str) -> list[str]:
    """The keys that recipes may use in this group; imports none of them."""
    return sorted(_points(group))


def stage_class(key: str) -> type[Stage]:
    """The stage behind a recipe's key. KeyError: there is none. GristmillError: its module can't be imported."""
    return cast(type[Stage], _load(STAGES, key, Stage))


def teacher_class(kind: str) -> type[Teacher]:
    """The teacher behind a `kind:`. KeyError: there is none. GristmillError: its module can't be imported."""
    return cast(type[Teacher], _load(TEACHERS, kind, Teacher))


@cache
def _load(group: str, name: str, wanted: type[T]) -> type[T]:
    point = _points(group)[name]
    try:
        found = point.load()
    except ImportError as error:
        raise GristmillError(f"{name!r} can't be imported from {point.value}: {error}", where=group) from error
    if not (isinstance(found, type) and issubclass(found, wanted)):
        raise GristmillError(f"{name!r} ({point.value}) is not a {wanted.__name__}", where=group)
    return found
