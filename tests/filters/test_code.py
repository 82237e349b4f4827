"""Code that does what its tests ask, and code that does not, or only seems to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS
from filters.code import Code, fenced
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame

DOUBLE = "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles."
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


def answer(output: str, **meta: Any) -> Sample:
    return chat("Write it.", output).model_copy(update={"meta": meta})


def judged(*samples: Sample, **fields: Any) -> pl.DataFrame:
    ctx = FakeContext()
    verdicts = Code(**fields).judge(frame(*samples), ctx)
    assert "limits" in ctx.reports["sandbox"]
    assert verdicts.schema == VERDICTS
    return frame(*samples).select(sample="id").join(verdicts, on="sample", maintain_order="left")


def one(output: str, fields: dict[str, Any] | None = None, **meta: Any) -> tuple[bool, str | None, float | None, dict[str, Any]]:
    (row,) = judged(answer(output, **meta), **(fields or {})).iter_rows(named=True)
    return row["keep"], row["reason"], row["score"], json.loads(row["detail"])


def test_what_passes_is_kept_and_what_fails_says_where() -> None:
    assert one(DOUBLE, tests=TESTS)[:3] == (True, None, 1.0)
    keep, reason, score, detail = one(DOUBLE, tests=[*TESTS, "assert double('a') == 4, 'not a number'"])
    assert (keep, reason, score) == (False, "tests failed", pytest.approx(2 / 3))
    assert (detail["passed"], detail["tests"], detail["limit"]) == (2, 3, 1.0)
    (failed,) = detail["failed"]
    assert failed["error"].startswith("AssertionError: not a number (tests 3, line 1: assert double")
    assert one(DOUBLE, {"at_least": 0.6}, tests=[*TESTS, "assert double(1) == 3"])[:2] == (True, None)
    error = one("def double(x):\n    return x / 0", tests=TESTS)[3]["failed"][0]["error"]
    assert error == "ZeroDivisionError: division by zero (code, line 2: return x / 0)"


@pytest.mark.parametrize(
    "tests",
    [
        "assert double(2) == 4\nassert double(3) == 6",
        "values = [1, 2]\nfor value in values:\n    assert double(value) == 2 * value",
        "result = double(1)\nassert result == 2\nresult = double(2)\nassert result == 4",
        "def test_two():\n    assert double(2) == 4\n\ndef test_three():\n    assert double(3) == 6",
        "DATA = [1]\n\ndef check(candidate):\n    for value in DATA:\n        assert candidate(value) == 2 * value",
        "def check(candidate):\n    assert candidate(1) == 2\n\ncheck(double)",
        "from solution import double as f\nassert f(1) == 2",
        "if __name__ == '__main__':\n    assert double(2) == 4\n    assert double(3) == 6",
        "import unittest\nclass T(unittest.TestCase):\n    @classmethod\n    def setUpClass(cls):\n        cls.n = 2\n"
        "    def test_it(self):\n        self.assertEqual(double(self.n), 4)\nif __name__ == '__main__':\n    unittest.main()",
    ],
)
def test_tests_of_every_kind_are_run(tests: str) -> None:
    rows = judged(answer(DOUBLE, tests=tests), answer("def double(x):\n    return 3 * x", tests=tests))
    assert rows["keep"].to_list() == [True, False]
    assert rows["reason"][1] == "tests failed"
    assert rows["score"][1] < 1


def test_tests_stand_in_meta_in_a_file_or_in_the_answer(tmp_path: Path) -> None:
    own = DOUBLE + "\n```python tests\nassert double(2) == 4\n```"
    file = tmp_path / "all.py"
    file.write_text("assert double.__name__ == 'double'\n")
    assert one(own)[3]["tests"] == 1
    assert one(own.replace("2 * x", "3 * x"))[1] == "tests failed", "the block of tests is no part of the code"
    assert one(own, {"tests_file": file}, tests=TESTS)[3]["tests"] == 4
    assert one(DOUBLE, {"tests": "hidden.tests"}, hidden={"tests": TESTS})[:2] == (True, None)
    with pytest.raises(GristmillError, match="can't read these tests"):
        one(DOUBLE, {"tests_file": tmp_path / "none.py"})


def test_a_function_is_found_for_check_and_the_head_of_it_is_put_before() -> None:
    tests = "def check(candidate):\n    assert candidate(3) == 6"
    two = "def helper(x):\n    return x\n\ndef double(x):\n    return 2 * x\n\ndef other(x):\n    return 0"
    assert one(two, tests=tests, entry_point="double")[0]
    assert one(two, tests=tests)[1] == "tests failed"
    head = "import math\n\ndef double(x):\n    y = 2\n"
    assert one("def double(x):\n    return math.floor(2 * x)", {"before": "prompt"}, tests=tests, prompt=head + "    return y")[0]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("def double(x) return x", "does not run"),
        ("I'm sorry, I can't.", "does not run"),
        ("import sys\nsys.exit(0)", "does not run"),
        ("import os\nos._exit(0)", "does not run"),
        ("import socket\nsocket.socket()", "does not run"),
        ("```javascript\nfunction double(x) {}\n```", "no code"),
        ("   ", "no code"),
        ("def double(x):\n    while True: pass", "timed out"),
        ("def double(x):\n    import os\n    os._exit(0)", "tests failed"),
        ("def double(x):\n    raise SystemExit", "tests failed"),
        ("def other(x):\n    return 2 * x", "tests failed"),
        ("print('\\ud800')", "does not run"),
        ("raise ValueError('\\ud800\\x00\\u202e')", "does not run"),
        ("\x00", "does not run"),
        ("(" * 100_000, "does not run"),
        ("x = " + "[" * 150 + "]" * 150 + "\ndef double(x): return x + 1", "tests failed"),
        ("class Sly(int):\n    def __eq__(self, other): raise BaseException\ndef double(x): return Sly()", "tests failed"),
    ],
)
def test_what_does_not_run_has_its_reason(output: str, reason: str) -> None:
    keep, found, score, _ = one(output, {"seconds": 2, "cpu_seconds": 1}, tests=TESTS)
    assert (keep, found, score) == (False, reason, 0.0)


def test_a_program_that_exits_is_told_so() -> None:
    assert one("import sys\nsys.exit(0)", tests=TESTS)[3]["error"] == "SystemExit: 0 (code, line 2: sys.exit(0))"


def test_the_test_that_was_running_is_named() -> None:
    code = "def double(x):\n    while x < 0: pass\n    return 2 * x"
    _, reason, score, detail = one(code, {"seconds": 1}, tests=TESTS)
    assert (reason, score) == ("timed out", 0.5)
    assert detail["running"] == "assert double(-1) == -2"


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        (None, "no tests"),
        ([], "no tests"),
        ("x = 1", "no tests"),
        ("assert (", "what stands in tests"),
        ("def test_it(tmp_path):\n    assert True", "what stands in tests"),
        ("import not_installed_anywhere\nassert True", "what stands in tests"),
    ],
)
def test_without_tests_that_run_nothing_is_judged(tests: Any, why: str) -> None:
    keep, reason, score, detail = one(DOUBLE, tests=tests)
    assert (keep, reason, score) == (False, "not judged", None)
    assert why in detail["why"]
    assert one(DOUBLE, {"on_failure": "keep"}, tests=tests)[0]


def test_blocks_are_joined_or_chosen() -> None:
    text = "```python\nx = 1\n```\nand\n```\ndef f(): return x\n```\n```bash\nrm -rf /\n```"
    assert one(text, tests="assert f() == 1")[0]
    assert one(text, {"blocks": "last"}, tests="assert f() == 1")[1] == "tests failed"
    assert one(text, {"blocks": "first"}, tests="assert x == 1")[0]


def test_many_rows_run_at_once_and_say_the_same_every_time() -> None:
    rows = [
        answer(f"import time\ntime.sleep(0.3)\ndef double(x): return {2 + i % 2} * x\nprint(list({{'a', 'b', 'c'}}))", tests=TESTS)
        for i in range(8)
    ]
    rows = [row.model_copy(update={"messages": (*row.messages, *row.messages)[: 2 + 2 * (i > 3)]}) for i, row in enumerate(rows)]
    rows = list({row.id: row for row in rows}.values())
    start = time.monotonic()
    first = judged(*rows, workers=4, seconds=60, cpu_seconds=60)
    assert time.monotonic() - start < 60
    again = judged(*reversed(rows), workers=4, seconds=60, cpu_seconds=60).reverse()
    assert first.select("sample", "keep", "reason", "score").equals(again.select("sample", "keep", "reason", "score"))
    assert set(first["keep"]) == {True, False}


def test_fences_are_found_as_markdown_has_them() -> None:
    assert fenced("a\n````md\n```\nx\n```\n````\nb") == [(["md"], "```\nx\n```")]
    assert fenced("~~~ Python Tests\nx\n~~~") == [(["python", "tests"], "x")]
    assert fenced("```py\nopen") == [(["py"], "open")]
    assert fenced("say ```x``` and\n```x``` so") == []
    assert len(fenced("```\n" * 100_000)) == 50_000


def test_faulty_settings_are_refused() -> None:
    for fields in ({"language": "ruby"}, {"seconds": 0}, {"at_least": 0}, {"workers": 0}, {"timeout": 3}):
        with pytest.raises(ValidationError):
            Code.model_validate(fields)
