"""Whether a sample's code does what its tests ask: the one judge of code that is never talked into anything.

Python only, so far. The tests must come from somewhere else than the code if a pass is to say much: tests that a teacher wrote in the
same answer show that the two agree with each other. What is not covered: whether the tests are enough; style and speed; code that
waits for input, reaches for the network, or needs packages that are not installed; and code that sets out to fool its tests, which
run in the same process. It is run in `filters/sandbox.py`, whose first page says what that keeps out and what it does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from factory.errors import GristmillError
from factory.stage import Context, Filter, RecipeFile
from factory.store import verdicts_frame
from filters import sandbox
from filters.given import answered, given
from schemas.verdict import Verdict

FAILED = "tests failed"
BROKEN = "does not run"
LATE = "timed out"
NO_CODE = "no code"

_PYTHON = ("", "python", "py", "python3", "py3")
_TOLD = 5  # failed tests that stand in the detail
_WIDTH = 300


class Code(Filter):
    """Keeps code that passes its tests; the share of tests that pass is the score.

    The code is what stands in the output's fenced blocks (```python, or no language), or all of the output where it has no fence.
    The tests are the sample's own, in meta[`tests`] (a text or a list of them); those of `tests_file`, which every sample must pass;
    and those in a fenced block of the output whose first line names tests (```python tests). A test is an assert, a function called
    `test_…`, HumanEval's `check(candidate)`, or a method of a `unittest` class. They run one after the other in one process, in
    the module of the code, which tests may also import as `solution`; `__name__` is not `__main__` there.

    Reasons: "tests failed", "does not run" (an error before the first test), "timed out", "no code". A sample without tests, or whose
    tests can't be run themselves, is "not judged".
    """

    key: ClassVar[str] = "code"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"
    ranks: ClassVar[bool] = True

    language: Literal["python"] = Field("python", description="what the code is written in; only python so far")
    blocks: Literal["all", "first", "last"] = Field("all", description="which fenced blocks of the output are the code")
    tests: str = Field("tests", description="key in meta: asserts, test functions or unittest classes; a text or a list")
    tests_file: Annotated[Path | None, RecipeFile()] = Field(None, description="tests that every sample must pass")
    before: str | None = Field(None, description="key in meta: code that runs before the sample's (imports, the head of a function)")
    entry: str = Field("entry_point", description="key in meta: the function that `check(candidate)` is given; else the last one defined")
    at_least: float = Field(1.0, gt=0, le=1, description="share of the tests that must pass")
    packages: bool = Field(False, description="may the code import what is installed beside Gristmill; else the standard library alone")
    seconds: float = Field(10.0, gt=0, le=600, description="of the wall clock, for a sample with all its tests")
    cpu_seconds: int = Field(10, ge=1, le=600, description="of CPU time, likewise")
    memory_mb: int = Field(512, ge=16, description="megabytes beside what the interpreter itself takes")
    file_mb: int = Field(16, ge=1, description="size of a file that the code writes into its own folder")
    workers: int | None = Field(None, ge=1, description="samples at once; one a core by default")
    on_failure: Literal["reject", "keep"] = Field("reject", description="what becomes of a sample that can't be judged")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; detail: passed, tests, failed (the first of them with what went wrong), seconds, limit.

        A loop over rows, since each runs in a process of its own.
        """
        shared = self._shared()
        rows = samples.select("id", text=answered())
        asked: list[str] = []
        questions: list[dict[str, Any]] = []
        verdicts: list[Verdict] = []
        values = given(samples, self.tests, self.before, self.entry)
        for sample, text, (tests, before, entry) in zip(rows["id"], rows["text"], values, strict=True):
            code, written = self._parts(text)
            tests = [*(tests if isinstance(tests, list) else [tests]), *written, *shared]
            tests = [test for test in tests if isinstance(test, str) and test.strip()]
            if not code.strip():
                verdicts.append(_verdict(sample, NO_CODE, 0.0, {"limit": self.at_least}))
            elif not tests:
                verdicts.append(
                    self._not_judged(sample, {"why": f"no tests: meta has no {self.tests!r}, and the output no block of tests"})
                )
            else:
                asked.append(sample)
                before, entry = (value if isinstance(value, str) else None for value in (before, entry))
                questions.append({"code": code, "tests": tests, "before": before or "", "entry": entry})
        answers = sandbox.ask("filters.trial:run", questions, limits=self._limits(), workers=self.workers, packages=self.packages)
        verdicts += [self._verdict(sample, answer) for sample, answer in zip(asked, answers, strict=True)]
        ctx.report("sandbox", sandbox.isolation())
        ctx.progress(samples.height, samples.height)
        return verdicts_frame(verdicts)

    def _limits(self) -> sandbox.Limits:
        return sandbox.Limits(seconds=self.seconds, cpu_seconds=self.cpu_seconds, memory_mb=self.memory_mb, file_mb=self.file_mb)

    def _shared(self) -> list[str]:
        if self.tests_file is None:
            return []
        try:
            return [self.tests_file.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise GristmillError(f"can't read these tests: {error}", where=str(self.tests_file)) from error

    def _parts(self, text: str) -> tuple[str, list[str]]:
        """The code of an output, and the tests that it has itself."""
        found = fenced(text)
        if not found:
            return text, []
        tests = [body for words, body in found if words[:1] and words[-1] in ("test", "tests")]
        code = [body for words, body in found if (words[0] if words else "") in _PYTHON and words[-1:] not in (["test"], ["tests"])]
        code = code if self.blocks == "all" else code[:1] if self.blocks == "first" else code[-1:]
        return "\n\n".join(code), tests

    def _verdict(self, sample: str, answer: sandbox.Answer) -> Verdict:
        ended = {record["test"]: record for record in answer.said if "test" in record}
        runs = [record for record in answer.said if "test" in record]
        running = next((record["start"] for record in reversed(answer.said) if "start" in record and record["start"] not in ended), None)
        tests = max([len(runs), *(record["tests"] for record in answer.said if "tests" in record)])
        passed = sum(record["error"] is None for record in runs)
        failed = [{"test": record["test"], "error": record["error"]} for record in runs if record["error"]]
        part, error = (answer.value.get("part"), answer.value.get("error")) if isinstance(answer.value, dict) else (None, None)
        detail: dict[str, Any] = {"passed": passed, "tests": tests, "seconds": answer.seconds, "limit": self.at_least}
        if answer.fate != "answered":
            detail["running"] = running
            error = f"still running after {answer.seconds:.1f} s" if answer.fate == "timed out" else "the process ended"
        detail |= {"failed": failed[:_TOLD]} if failed else {}
        detail |= {"error": error} if error else {}
        if (error or failed) and answer.output.strip():
            detail["output"] = answer.output.strip()[-_WIDTH:]
        if part in ("tests", "before"):
            return self._not_judged(sample, {"why": f"what stands in {part} can't be run", **detail})
        if answer.fate == "timed out":
            return _verdict(sample, LATE, passed / max(tests, 1), detail)
        if part == "code" or (answer.fate == "died" and not tests):
            return _verdict(sample, BROKEN, 0.0, detail)
        if not tests:
            return self._not_judged(sample, {"why": "no tests: nothing in the text of the tests is one", **detail})
        score = passed / tests
        return _verdict(sample, None if score >= self.at_least else FAILED, score, detail)

    def _not_judged(self, sample: str, detail: dict[str, Any]) -> Verdict:
        return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason="not judged", detail=detail)


def _verdict(sample: str, reason: str | None, score: float, detail: dict[str, Any]) -> Verdict:
    return Verdict(sample=sample, by="", keep=reason is None, reason=reason, score=score, detail=detail)


def fenced(text: str) -> list[tuple[list[str], str]]:
    """The fenced blocks of a Markdown text: the words of each first line in lower case, and the lines; the text's end closes one too."""
    blocks: list[tuple[list[str], str]] = []
    lines: list[str] | None = None
    words: list[str] = []
    fence = ""
    for line in text.split("\n"):
        bare = line.strip()
        if lines is None:
            if bare.startswith(("```", "~~~")):
                fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
                words, lines = bare[len(fence) :].lower().split(), []
                if "`" in bare[len(fence) :]:  # ```code``` within a line
                    lines = None
        elif bare.startswith(fence) and not bare.strip(fence[0]):
            blocks.append((words, "\n".join(lines)))
            lines = None
        else:
            lines.append(line.rstrip("\r"))
    if lines is not None:
        blocks.append((words, "\n".join(lines)))
    return blocks
