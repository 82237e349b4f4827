"""What `code` does inside the sandbox: run a sample's code, then its tests one after the other, and say of each how it went.

Tests may be written as asserts at the top level, as functions called `test_…`, as HumanEval's `check(candidate)` (Chen et al. 2021,
arXiv 2107.03374) or as `unittest` classes; what they are is seen from the text. It imports the standard library alone.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
import time
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

NAME = "solution"
_SETUP = "what the tests need"
Say = Callable[[Any], None]


def run(question: dict[str, Any], say: Say) -> dict[str, Any]:
    """Run `before` and `code`, then every one of `tests` (texts). Gives back {} or, where that could not be, {"error", "part"}.

    Says {"tests": n} first, as far as the texts tell, {"start": name} before a test, and {"test": name, "error": null or the last line
    of what went wrong, "seconds": s} after it.
    """
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module  # tests may say `from solution import f`
    space = vars(module)
    for part in ("before", "code"):
        try:
            exec(_compiled(question[part], part), space)
        except BaseException as error:  # SystemExit too: a program that ends before its tests has not passed them
            return {"error": last_line(error), "part": part}
    try:
        bodies = [_parsed(text, number) for number, text in enumerate(question["tests"], 1)]
    except Exception as error:
        return {"error": last_line(error), "part": "tests"}
    say({"tests": sum(map(_count, bodies))})
    try:
        for number, body in enumerate(bodies, 1):
            for name, test in _tests(body, number, space, question["entry"]):
                say({"start": name})
                start, failed = time.perf_counter(), None
                try:
                    test()
                except BaseException as error:
                    if isinstance(error, ModuleNotFoundError) and name == _SETUP:
                        raise _Unready(last_line(error)) from error
                    failed = last_line(error)
                if failed or name != _SETUP:
                    say({"test": name, "error": failed, "seconds": round(time.perf_counter() - start, 3)})
    except _Unready as error:
        return {"error": str(error), "part": "tests"}
    return {}


class _Unready(Exception):
    """Tests that can't be run, whatever the code is."""


def last_line(error: BaseException) -> str:
    """The kind and text of an error, and the line of the sample or the test where it was raised."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # an error of the sample's own making
        text = ""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        if (file := trace.tb_frame.f_code.co_filename).startswith("<"):
            where = f" ({file.strip('<>')}, line {trace.tb_lineno}: {linecache.getline(file, trace.tb_lineno).strip()[:120]})"
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _tests(body: list[ast.stmt], number: int, space: dict[str, Any], entry: str | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The tests of one text as name and function, in the order in which they stand; what lies between them comes under the name `_SETUP`.

    Everything is run in the sample's module. A loop or a condition around asserts is one test. Functions and classes are tests once
    all of the text was run.
    """
    mine, named = set(space), False
    for node in body:
        code = compile(ast.Module([node], []), f"<tests {number}>", "exec")
        is_assert = _is_test(node) and not isinstance(node, ast.FunctionDef | ast.ClassDef)
        yield (_title(node) if is_assert else _SETUP), lambda code=code: exec(code, space)  # type: ignore[misc]
        named |= is_assert
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or (thing := space.get(node.name)) is None:
            continue
        if isinstance(thing, type) and issubclass(thing, unittest.TestCase):
            for case in unittest.defaultTestLoader.getTestCaseNames(thing):
                named = True
                yield f"{node.name}.{case}", _case(thing, case)
        elif node.name.startswith("test") and isinstance(node, ast.FunctionDef):
            if needed := _needed(thing):
                raise _Unready(f"{node.name} needs {', '.join(needed)}; fixtures of pytest are not known here")
            named = True
            yield node.name, thing
        elif node.name == "check" and not named and len(_needed(thing)) == 1:
            own = [value for name, value in space.items() if name in mine and isinstance(value, types.FunctionType)]
            candidate = space.get(entry) if entry else own[-1] if own else None
            named = True
            yield f"check({entry or getattr(candidate, '__name__', None)})", lambda thing=thing, of=candidate: thing(of)  # type: ignore[misc]


def _count(body: list[ast.stmt]) -> int:
    """How many tests a text seems to have; `check` is one where nothing else is."""
    tests = [node for node in body if _is_test(node)]
    return len([node for node in tests if not (isinstance(node, ast.FunctionDef) and node.name == "check")]) or len(tests)


def _is_test(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name.startswith("test") or node.name == "check"
    if isinstance(node, ast.ClassDef):
        return any(isinstance(inner, ast.FunctionDef) and inner.name.startswith("test") for inner in node.body)
    checks = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "check"
    return checks or any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _title(node: ast.stmt) -> str:
    return ast.unparse(node).splitlines()[0][:120]


def _case(thing: type[unittest.TestCase], name: str) -> Callable[[], None]:
    def run() -> None:
        result = unittest.TestResult()
        suite = unittest.TestSuite([thing(name)])  # with setUpClass
        suite.run(result)
        if bad := [text for _, text in (*result.errors, *result.failures)]:
            raise AssertionError(bad[0].strip().splitlines()[-1])
        if result.unexpectedSuccesses or not result.testsRun:
            raise AssertionError("unexpected success" if result.unexpectedSuccesses else "the test did not run")

    return run


def _needed(thing: Any) -> list[str]:
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _compiled(text: str, name: str) -> types.CodeType:
    linecache.cache[f"<{name}>"] = (len(text), None, text.splitlines(keepends=True), f"<{name}>")
    return compile(text, f"<{name}>", "exec")


def _parsed(text: str, number: int) -> list[ast.stmt]:
    linecache.cache[f"<tests {number}>"] = (len(text), None, text.splitlines(keepends=True), f"<tests {number}>")
    body = ast.parse(text, f"<tests {number}>").body
    return [inner for node in body for inner in (_guarded(node) if isinstance(node, ast.If) else [node])]


def _guarded(node: ast.If) -> list[ast.stmt]:
    """What stands under `if __name__ == "__main__":` as if it stood alone, since a test that is skipped would pass."""
    if not any(isinstance(name, ast.Name) and name.id == "__name__" for name in ast.walk(node.test)):
        return [node]
    return [inner for inner in node.body if not ast.unparse(inner).startswith("unittest.main(")]
