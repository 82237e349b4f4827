"""What a teacher is to the gateway: a frozen description in the recipe, and connections while a run lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from schemas.call import Call, Params, Reading, Reply

if TYPE_CHECKING:
    from factory.errors import TeacherFault


class Price(BaseModel):
    """What a teacher costs, in US dollars a million tokens (which is micro-dollars a token).

    Tokens that are read from or written to the server's prompt cache cost as much as other input where nothing else is said.
    `batch` is what a batch costs, as a share of that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_usd_per_mtok: float = Field(ge=0)
    output_usd_per_mtok: float = Field(ge=0)
    cached_input_usd_per_mtok: float | None = Field(None, ge=0)
    cache_write_usd_per_mtok: float | None = Field(None, ge=0)
    batch: float = Field(0.5, ge=0, le=1)


FREE = Price(input_usd_per_mtok=0, output_usd_per_mtok=0)


class Limits(BaseModel):
    """What a teacher's account may use a minute, where its server does not say so in its headers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)


class Heard(NamedTuple):
    """A reply, and what its headers say of the rate limits."""

    reply: Reply
    readings: tuple[Reading, ...] = ()


class Connection(Protocol):
    """An open way to a model's server. Raises `factory.errors.TeacherFault`, and nothing else, when a request fails."""

    async def ask(self, call: Call, params: Params) -> Heard:
        """Ask once; no retries of its own (the gateway must see every refusal). `params` is the call's, the teacher's filled in."""


class BatchItem(NamedTuple):
    """One question of a batch: our name of it, the call as it is sent, and the body that asks it live."""

    custom_id: str
    call: Call
    body: Mapping[str, Any]


class BatchStatus(NamedTuple):
    """How far a batch is; `ended`: its results are there. `refused`: it was not begun, and has none."""

    ended: bool
    done: int
    total: int
    refused: TeacherFault | None = None


class Trace(NamedTuple):
    """What a provider holds of a batch whose id never reached us. `unsure`: it can't be told yet, and had better not be sent again."""

    provider_id: str | None = None
    unsure: bool = False


class BatchConnection(Protocol):
    """An open way to a provider's batches. Its methods raise `factory.errors.TeacherFault`, and nothing else, when a request fails."""

    def body(self, call: Call) -> Mapping[str, Any]:
        """What asks a call, the same as live; `call.params` are those that are sent."""

    async def submit(self, mark: str, items: Sequence[BatchItem]) -> str:
        """Submit once, without retries; gives the provider's id. `mark` is our name of the batch, with which each custom_id begins.

        All of the calls are chats, or all are raw prompts.
        """

    async def find(self, mark: str, count: int, since: datetime, known: Container[str]) -> Trace:
        """Look for the batch of that mark and so many calls, marked at `since`; `known` are the ids of others."""

    async def status(self, provider_id: str) -> BatchStatus | None:
        """How far it is; None: the provider does not know it (any more)."""

    def results(self, provider_id: str, calls: Mapping[str, Call]) -> AsyncIterator[tuple[str, Reply | TeacherFault]]:
        """Each question's end, by custom_id, of a batch that has ended."""


class Batching(NamedTuple):
    """How a teacher is asked in batches: of `size` calls at most, looked after every `poll_s` seconds.

    `on`: it is to be. Where it is not, `connect` still opens the way to batches that an earlier run submitted.
    """

    on: bool
    size: int
    poll_s: float
    connect: Callable[[Path], AbstractAsyncContextManager[BatchConnection]]


@dataclass(frozen=True)
class Port:
    """One way to a teacher: one of its servers, asked with one of its keys.

    `name` tells it from the teacher's others in messages; `account` is what a server's rate limits hold for (server, model and
    key), so that two teachers of one account share one pace. `connect` opens it, given a folder for log files.
    """

    name: str
    account: str
    connect: Callable[[Path], AbstractAsyncContextManager[Connection]]


class Teacher(BaseModel):
    """One line under `teachers:` in a recipe; `kind` is its entry point's name.

    `params` are defaults that a stage's own override. `concurrency` is how many requests may be in flight at each port.
    `limits` are its rate limits where its server tells none; `fallback` names the teacher that is asked while this one is down.
    `licence` is what the manifest says of the terms that its output is under.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]

    model: str
    params: Params = Params()
    concurrency: int = Field(8, ge=1)
    timeout_s: float = Field(120, gt=0)
    retries: int = Field(12, ge=0)
    limits: Limits = Limits()
    fallback: str | None = None
    price: Price | None = None
    licence: str | None = None

    def identity(self) -> tuple[str, str]:
        """(provider, model): the part of a call's key that says who answers."""
        return self.kind, self.model

    def known_price(self, tokens_in: int | None = None) -> Price | None:
        """The recipe's price, or the published one for a question of so many tokens (of any length); None: unknown, which is not zero."""
        if self.price is not None:
            return self.price
        from factory.prices import find_price

        return find_price(*self.identity(), tokens_in)

    def check(self) -> str | None:
        """What stands in the way of asking (a missing key, model or package) with what to do about it; None: nothing. No network."""
        return None

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        """Open a connection; starts (and at the end stops) a server where the teacher owns one. `home`: for its log files."""
        raise NotImplementedError

    def ports(self) -> Sequence[Port]:
        """The ways to this teacher, over which the gateway spreads the load; one, unless it has several servers or keys."""
        return (Port(self.model, f"{self.kind}/{self.model}", self.connect),)

    def batching(self) -> Batching | None:
        """How it is asked in batches, which are cheaper and slow; None: its provider takes none."""
        return None
