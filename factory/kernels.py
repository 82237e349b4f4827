"""Loops that Python is too slow for, compiled by numba at their first use and kept on disk, so that each machine compiles once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, get_args

from factory.errors import GristmillError

Kernel = Callable[..., Any]  # numba infers the types, and holds arguments to them

try:
    from numba import njit
except ImportError:  # it is said when a kernel is called, not when a module is imported
    njit = None  # type: ignore[assignment]


def kernel(function: Kernel) -> Kernel:
    """Compile `function` when it is first called; it lets go of Python's lock while it runs. GristmillError where numba is missing."""
    if njit is not None:
        compiled: Kernel = njit(cache=True, nogil=True, error_model="numpy")(function)
        return compiled

    @wraps(function)
    def missing(*_: Any, **__: Any) -> Any:
        raise GristmillError(
            "comparing and counting texts needs the package numba, which is not installed (or not for this Python)",
            where=f"{function.__module__}.{function.__qualname__}",
            next="Install it with: pip install numba",
        )

    return missing


def compile_all() -> None:
    """Compile every kernel of duplicates, diversity, passages and rules, so that no run waits for it; a moment where that is done."""
    import numpy as np
    import polars as pl

    from factory import cosine, jaccard, passages, plugins
    from factory.diversity import diversity
    from factory.stage import Filter
    from factory.still import Still
    from factory.store import samples_frame
    from schemas.sample import Sample

    texts = pl.Series([f"the same thing again and again, number {n} ʼn" for n in (1, 1, 2, 3)])
    new = np.ones(len(texts), np.bool_)
    for shingle in get_args(jaccard.Unit):
        for mode in get_args(jaccard.Mode):
            jaccard.settle(texts, new, 0.8, shingle=shingle, mode=mode)
    diversity(texts.to_list(), np.eye(len(texts), 8, dtype=np.float32))
    vectors = np.random.default_rng(0).standard_normal((5000, 64)).astype(np.float32)  # of fewer, comparing all is quicker
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine.settle(vectors, np.ones(len(vectors), np.bool_), 0.95, mode="fast")
    rules = plugins.stage_class("rules").model_validate({"output": {"format": "json"}})
    said = "The one with **the key** opens it.\n\n| a | b |\n|---|---|\n| 1 | [2] |"
    turns = [{"role": "user", "content": "Who opens the door of the shop today?"}, {"role": "assistant", "content": said}]
    samples = samples_frame([Sample.model_validate({"messages": turns, "provenance": {"origin": "made", "generator": "rules"}})])
    assert isinstance(rules, Filter)
    rules.judge(samples, Still("rules", seeds=samples))
    passages.Passages(texts).search(texts)
    passages.spans(texts.to_list(), [0] * len(texts), [1] * len(texts))


if __name__ == "__main__":
    compile_all()
