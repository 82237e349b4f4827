"""What a teacher is to the gateway: a frozen description in the recipe, and a connection while a run lasts."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from schemas.call import Call, Params, Reply


class Price(BaseModel):
    """What a teacher costs, in US dollars a million tokens (which is micro-dollars a token)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_usd_per_mtok: float = Field(ge=0)
    output_usd_per_mtok: float = Field(ge=0)


class Connection(Protocol):
    """An open way to a model's server. Raises `factory.errors.TeacherFault`, and nothing else, when a request fails."""

    async def ask(self, call: Call, params: Params) -> Reply:
        """Ask once; no retries of its own (the gateway must see every refusal). `params` is the call's, the teacher's filled in."""


class Teacher(BaseModel):
    """One line under `teachers:` in a recipe; `kind` is its entry point's name.

    `params` are defaults that a stage's own override. `concurrency` is how many requests may be in flight. `licence` is what
    the manifest says of the terms that its output is under.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]

    model: str
    params: Params = Params()
    concurrency: int = Field(8, ge=1)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(5, ge=0)
    price: Price | None = None
    licence: str | None = None

    def identity(self) -> tuple[str, str]:
        """(provider, model): the part of a call's key that says who answers."""
        return self.kind, self.model

    def known_price(self) -> Price | None:
        """The recipe's price, or the one the teacher knows of; None: unknown, which is not zero."""
        return self.price

    def check(self) -> str | None:
        """What stands in the way of asking (a missing key, model or package) with what to do about it; None: nothing. No network."""
        return None

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        """Open a connection; starts (and at the end stops) a server where the teacher owns one. `home`: for its log files."""
        raise NotImplementedError
