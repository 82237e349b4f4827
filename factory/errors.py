"""Every error that Gristmill raises on purpose.

GristmillError                what the user can mend: printed as what, where, next; no traceback
    RecipeError               a recipe that can't be run; carries every problem at once
    RunError                  a run that had to stop; what was made is kept
        BudgetSpent           the next call does not fit into the budget
        TeacherDown           a teacher can't be reached, or refuses all calls (bad key, no credit)
        RunLocked             another process works in this run's folder
    StoreError                files of a run or version that are missing, broken or of another version
    ReleaseError              a version that can't be made from what a run holds
        AlreadyReleased       the last version holds exactly these rows; carries its folder
    MissingExtra              a package that the asked-for feature needs and that is not installed
TeacherFault                  one request that failed; the gateway decides what follows from its kind

A bug is none of these and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from schemas.call import Reading


class GristmillError(Exception):
    """What happened, where, and what to do next; `str()` is the block that the command line prints."""

    def __init__(self, what: str, *, where: str = "", next: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.next = what, where, next

    def __str__(self) -> str:
        return "\n".join(part for part in (f"{self.where}: {self.what}" if self.where else self.what, self.next) if part)


@dataclass(frozen=True)
class Problem:
    """One fault in a file: what it is, and the 1-based line it stands in."""

    message: str
    file: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


class RecipeError(GristmillError):
    """A recipe that can't be run, with every problem that was found in it."""

    def __init__(self, problems: list[Problem]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            "\n".join([f"{count} in the recipe:", *(f"  {p}" for p in problems)]), next="Nothing was asked; nothing was spent."
        )
        self.problems = problems


class RunError(GristmillError):
    """A run that had to stop; what was made so far is kept."""


class BudgetSpent(RunError):
    """The next call does not fit into the budget."""


class TeacherDown(RunError):
    """A teacher can't be reached, or refuses every call."""


class RunLocked(RunError):
    """Another process works in this run's folder."""


class StoreError(GristmillError):
    """Files of a run or a version that are missing, broken, or of another version of Gristmill."""


class ReleaseError(GristmillError):
    """A version that can't be made from what the run holds."""


class AlreadyReleased(ReleaseError):
    """The last version holds exactly these rows; `folder` is its."""

    def __init__(self, what: str, folder: Path, *, next: str) -> None:
        super().__init__(what, next=next)
        self.folder = folder


class MissingExtra(GristmillError):
    """A package that the asked-for feature needs and that is not installed."""

    def __init__(self, package: str, extra: str, feature: str) -> None:
        super().__init__(f"{feature} needs the package {package}", next=f"Install it with: pip install 'gristmill[{extra}]'")


class TeacherFault(Exception):
    """One request that failed.

    `kind` says what may follow: "later" (rate limit, or a server that is too busy: wait and ask again, at no loss), "again" (a
    passing fault: retry with jitter), "never" (this question will not be answered: bad request, refused content, too long),
    "stop" (no question will: bad key, no credit, unknown model). `retry_after_s` is the server's own wish. `paid`: the request
    was sent whole and may have been worked on, so it may be on the bill although its answer is lost. `readings` is what the
    refusal's headers say of the rate limits.
    """

    def __init__(
        self,
        kind: Literal["later", "again", "never", "stop"],
        message: str,
        retry_after_s: float | None = None,
        *,
        paid: bool = False,
        readings: tuple[Reading, ...] = (),
    ) -> None:
        super().__init__(message)
        self.kind, self.retry_after_s, self.paid, self.readings = kind, retry_after_s, paid, readings
