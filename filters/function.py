"""A user's own opinion: a Python function that is handed a sample and says whether to keep it.

For checks that no other filter knows: a units library, a schema of one's own, a parser. The function is the user's and is trusted: it
runs inside Gristmill, unbounded in time and with all its rights. For what a sample itself brings along there is `code`. What it does not
cover: rows compared with each other (any batch may come, in any order), and a `module:`'s files, whose change does not make another
run, as a change of `file:` does.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from factory.errors import GristmillError
from factory.recipe import did_you_mean
from factory.stage import Context, Filter, RecipeFile
from factory.store import verdicts_frame
from schemas.verdict import Verdict

SHOWN = ("id", "kind", "input", "output", "label", "messages", "chosen", "rejected", "text", "meta")
REFUSED = "refused"  # by a function that gives no reason of its own
FEW = 20  # rows; of so many a function that fails on more than half is broken, and not the rows

_REASON_CHARS = 100


class Function(Filter):
    """Calls `name` of `file`, or `module` ("package.module:function"), with each sample as a dict.

    The dict has the keys id, kind, input, output, label, messages, chosen, rejected, text and meta (an object). The function gives back
    true or false; or a reason to reject it (text); or a score (a number), which is held to `at_least` and `at_most`; or a dict
    with keep, reason, score and detail, as much as it likes; or None: it can't tell, "not judged".

    batch: the function is handed a frame of samples instead (`factory.store.SAMPLES`; meta is JSON text) and gives back a frame of as many
    rows in the same order, or with a column `sample` of ids, and the columns keep, reason, score and detail, one of the first or the third
    at least.

    What it raises on a row is that row's "not judged", with the last frame in detail; if it raises on more than half of 20 rows or more,
    the run stops.
    """

    key: ClassVar[str] = "function"
    scope: ClassVar[Literal["sample", "dataset", "pool"]] = "sample"

    file: Annotated[Path | None, RecipeFile()] = Field(None, description="a Python file; its bytes are part of the run's identity")
    name: str = Field("check", description="the function's name in that file")
    module: str | None = Field(None, description="instead of a file: package.module:function, of what is installed")
    batch: bool = Field(False, description="whether the function takes a frame and gives one, instead of a sample")
    at_least: float | None = Field(None, description="the least score that is kept")
    at_most: float | None = Field(None, description="the greatest score that is kept")
    on_failure: Literal["reject", "keep"] = Field("reject", description="what becomes of a sample that can't be judged")

    @model_validator(mode="after")
    def _callable(self) -> Function:
        if (self.file is None) == (self.module is None):
            raise ValueError("say which function: file: mine.py (and name:, by default check), or module: package.module:function")
        if self.file is None or self.file.is_file():  # a missing file the loader reports
            self.called  # noqa: B018
        return self

    @cached_property
    def called(self) -> Callable[[Any], Any]:
        """The function, imported once; ValueError where there is none, or none that takes one argument."""
        if self.file is not None:
            loaded, name, where = _imported(self.file), self.name, self.file.name
        else:
            where, colon, name = str(self.module).partition(":")
            if not colon or not name:
                raise ValueError(f"module {self.module!r} has no colon: write package.module:function")
            try:
                loaded = importlib.import_module(where)
            except Exception as error:
                raise ValueError(f"module {where!r} can't be imported: {_last(error)}") from error
        if (function := getattr(loaded, name, None)) is None:
            own = [key for key, value in vars(loaded).items() if callable(value)]
            raise ValueError(f"{where} has no function {name!r}{did_you_mean(name, own)}")
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ValueError(f"{name!r} in {where} is {'async' if callable(function) else 'no function'}; it must be a plain function")
        try:
            inspect.signature(function).bind(None)
        except TypeError as error:
            what = "a frame of samples" if self.batch else "a sample as a dict"
            raise ValueError(f"{name}{inspect.signature(function)} in {where} must take one argument, {what}: {error}") from error
        except ValueError:  # of C, which tells no signature
            pass
        return function  # type: ignore[no-any-return]

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; a loop over rows unless `batch`, since the function takes one at a time.

        GristmillError where the function fails on more than half of 20 rows or more, or gives a frame that does not fit.
        """
        if not samples.height:
            return verdicts_frame(())
        try:
            self.called  # noqa: B018
        except ValueError as error:  # the file went away since the recipe was read
            raise GristmillError(str(error), where=f"stage {ctx.stage}") from error
        said = self._batch(samples) if self.batch else [self._said(row) for row in _rows(samples)]
        failed = [opinion for opinion in said if isinstance(opinion, Exception)]
        if samples.height >= FEW and len(failed) > samples.height / 2:
            raise GristmillError(
                f"the function {self._title} raised on {len(failed)} of {samples.height} samples; the last: {_last(failed[-1])}",
                where=f"stage {ctx.stage}",
                next="Mend the function and run the same command.",
            )
        ctx.progress(samples.height, samples.height)
        return verdicts_frame(self._verdict(sample, opinion) for sample, opinion in zip(samples["id"], said, strict=True))

    @property
    def _title(self) -> str:
        return self.module or self.name

    def _said(self, argument: Any) -> Any:
        try:
            return self.called(argument)
        except (Exception, SystemExit) as error:
            return error if isinstance(error, Exception) else RuntimeError(f"it called exit({error})")

    def _batch(self, samples: pl.DataFrame) -> list[Any]:
        """The opinions of a function of frames; where it raises, it is asked row by row, to find out on which."""
        said = self._said(samples)
        if isinstance(said, Exception):
            return [said] if samples.height == 1 else [one for row in samples.iter_slices(1) for one in self._batch(row)]
        if not isinstance(said, pl.DataFrame) or said.height != samples.height or not {"keep", "score"} & set(said.columns):
            shape = f"a frame of {said.height} rows and the columns {said.columns}" if isinstance(said, pl.DataFrame) else repr(said)[:80]
            raise GristmillError(
                f"the function {self._title} was handed {samples.height} samples and gave {shape}",
                next="It must give a polars frame with one row a sample, and a column keep or score.",
            )
        if "sample" in said.columns:
            if said["sample"].is_duplicated().any() or set(said["sample"]) != set(samples["id"]):
                raise GristmillError(f"the function {self._title} gave a column `sample` that does not hold each sample's id once")
            said = samples.select("id").join(said, left_on="id", right_on="sample", how="left", maintain_order="left").drop("id")
        return said.select([name for name in ("keep", "reason", "score", "detail") if name in said.columns]).to_dicts()

    def _verdict(self, sample: str, opinion: Any) -> Verdict:
        if isinstance(opinion, Exception):
            return self._not_judged(sample, {"error": _last(opinion)})
        opinion = _plain(opinion)
        told: dict[str, Any] = opinion if isinstance(opinion, dict) else {}
        keep, reason, score = _plain(told.get("keep")), told.get("reason"), _plain(told.get("score"))
        detail = _detail(told.get("detail"))
        if isinstance(opinion, bool):
            keep = opinion
        elif isinstance(opinion, str):
            keep, reason = False, opinion
        elif isinstance(opinion, int | float):
            score = opinion
        if unknown := set(told) - {"keep", "reason", "score", "detail"}:
            return self._not_judged(sample, {"why": f"a dict with the unknown keys {sorted(map(str, unknown))}", **detail})
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        if score is not None and not number:
            return self._not_judged(sample, {"why": f"a score that is no number: {score!r:.80}", **detail})
        if keep is None and score is None and reason is not None:
            keep = False
        if keep is None and score is not None:
            keep = (self.at_least is None or score >= self.at_least) and (self.at_most is None or score <= self.at_most)
            reason = reason or (f"score below {self.at_least:g}" if self.at_least is not None and score < self.at_least else None)
            reason = reason or (f"score above {self.at_most:g}" if self.at_most is not None and score > self.at_most else None)
            detail |= {"limit": [self.at_least, self.at_most]} if (self.at_least, self.at_most) != (None, None) else {}
        if not isinstance(keep, bool) or not isinstance(reason, str | None):
            return self._not_judged(sample, {"why": f"it gave {opinion!r:.80}", **detail})
        text = _clean(reason or "").strip()[:_REASON_CHARS] or REFUSED
        return Verdict(sample=sample, by="", keep=keep, reason=None if keep else text, score=score, detail=detail)

    def _not_judged(self, sample: str, detail: dict[str, Any]) -> Verdict:
        detail = {key: _clean(value) if isinstance(value, str) else value for key, value in detail.items()}
        return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason="not judged", detail=detail)


def _imported(path: Path) -> Any:
    """The module of a file, under a name that follows from its path, so that two files of one name don't meet."""
    name = f"gristmill_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"{path.name} can't be imported: {_last(error)}") from error
    return module


def _rows(samples: pl.DataFrame) -> list[dict[str, Any]]:
    rows = samples.select(SHOWN).to_dicts()
    for row in rows:
        try:
            row["meta"] = json.loads(row["meta"])
        except (ValueError, RecursionError):
            row["meta"] = {}
    return rows


def _last(error: BaseException) -> str:
    """What went wrong, with the place of its last frame."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # an error that can't say what it is
        text = ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {(frames[-1].line or '').strip()[:120]})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def _detail(value: Any) -> dict[str, Any]:
    """An object of JSON, whatever was given."""
    if value is None:
        return {}
    value = value if isinstance(value, dict) else {"detail": value}
    try:
        plain = json.loads(_clean(json.dumps(value, default=str, allow_nan=False, ensure_ascii=False)))
    except (ValueError, TypeError, RecursionError):
        return {"detail": _clean(repr(value)[:300])}
    return plain if isinstance(plain, dict) else {}


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
