"""What a run shows while it works: one plain state that the run writes and a view reads, so that neither waits for the other."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

    from factory.gateway import Snapshot


PLACES = 20  # that the live view shows, the thinnest ones
SHORT = 4  # that a round's line names


class Meter(Protocol):
    """The gateway, as far as a view needs it."""

    def snapshot(self) -> Snapshot: ...


@dataclass
class StageState:
    """How far one stage of the round at hand is."""

    folder: str
    state: Literal["waiting", "working", "done"] = "waiting"
    done: int = 0
    total: int | None = None
    kept: int = 0
    rejected: int = 0
    asks: bool = False
    places: dict[str, int] = field(default_factory=dict)  # of what it kept


@dataclass
class RunState:
    """Where a run stands; written by the run alone."""

    name: str
    wanted: int
    budget_micro_usd: int | None
    round: int = 0
    accepted: int = 0
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # place -> (have, wanted)
    alarms: list[str] = field(default_factory=list)  # what the watch says of the last round
    told: list[str] = field(default_factory=list)  # a line a round that ended
    stages: list[StageState] = field(default_factory=list)
    meter: Meter | None = None
    started: float = field(default_factory=time.monotonic)
    begun: list[tuple[int, StageState]] = field(default_factory=list)  # every stage so far, with its round

    def begin(self, number: int, stages: list[StageState]) -> None:
        """A round begins."""
        self.round, self.stages = number, stages
        self.begun += [(number, stage) for stage in stages]

    def seconds_left(self) -> float | None:
        """A guess at the time to the target: the pace of accepted rows so far, held; None before there is one."""
        if not self.accepted or self.accepted >= self.wanted:
            return None
        return (time.monotonic() - self.started) / self.accepted * (self.wanted - self.accepted)


@contextmanager
def shown(state: RunState, style: Literal["auto", "live", "plain", "quiet"] = "auto", out: TextIO | None = None) -> Iterator[None]:
    """Show `state` while the body runs: a live view on a terminal, a line a stage elsewhere, nothing when quiet."""
    out = out or sys.stderr
    if style == "auto":
        style = "live" if out.isatty() else "plain"
    if style == "quiet":
        yield
    elif style == "live":
        with _live(state, out):
            yield
    else:
        with _plain(state, out):
            yield


@contextmanager
def _live(state: RunState, out: TextIO) -> Iterator[None]:
    from rich.console import Console
    from rich.live import Live

    with Live(get_renderable=lambda: render(state), console=Console(file=out), refresh_per_second=4, transient=True):
        yield


@contextmanager
def _plain(state: RunState, out: TextIO) -> Iterator[None]:
    """A line when a stage ends, and one every half minute in between."""
    stop = threading.Event()
    said: set[tuple[int, str]] = set()
    lines = 0
    beat = time.monotonic()

    def end_of(number: int) -> None:
        """Say how the rounds up to this one ended; their lines come one a round."""
        nonlocal lines
        for line in state.told[lines:number]:
            print(line, file=out, flush=True)
            lines += 1

    def say() -> None:
        nonlocal beat
        for number, stage in list(state.begun):
            if stage.state == "done" and (number, stage.folder) not in said:
                end_of(max(number - 1, 0))
                said.add((number, stage.folder))
                print(f"round {number:02d} {stage.folder:<14} {_counts(stage)}", file=out, flush=True)
                beat = time.monotonic()
        if all(stage.state != "done" or (number, stage.folder) in said for number, stage in list(state.begun)):
            end_of(len(state.told))
        if time.monotonic() - beat > 30:
            beat = time.monotonic()
            print(
                f"round {state.round:02d} {state.accepted}/{state.wanted} accepted · {summary(state)}", *paces(state), sep="\n  ", file=out
            )
            out.flush()

    def loop() -> None:
        while not stop.wait(0.2):
            say()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        say()


def round_line(number: int, accepted: int, wanted: int, places: Mapping[str, tuple[int, int]]) -> str:
    """What a round has come to: the accepted rows, and the places that are furthest from what they are to hold."""
    short = sorted(((have / n, place, have, n) for place, (have, n) in places.items() if have < n))
    told = ", ".join(f"{place} {have}/{n}" for _, place, have, n in short[:SHORT])
    more = f" and {len(short) - SHORT} more" if len(short) > SHORT else ""
    return f"round {number:02d} ended: {accepted}/{wanted} accepted" + (f"; short: {told}{more}" if told else "")


def summary(state: RunState) -> str:
    """One line: answers, tokens a second, money, time left."""
    elapsed = max(time.monotonic() - state.started, 0.001)
    parts = []
    if state.meter:
        m = state.meter.snapshot()
        fresh = m.answered - m.from_ledger
        parts += [
            f"{m.answered} answers ({m.from_ledger} from the ledger)",
            f"{fresh / elapsed:.1f} calls/s",
            f"{m.tokens_out / elapsed:.0f} tokens/s",
        ]
        parts += [
            f"{m.in_flight} in flight",
            dollars(m.micro_usd) + (f" of {dollars(state.budget_micro_usd)}" if state.budget_micro_usd is not None else ""),
        ]
    parts.append(duration(elapsed))
    if (left := state.seconds_left()) is not None:
        parts.append(f"about {duration(left)} left")
    return " · ".join(parts)


def paces(state: RunState) -> list[str]:
    """A line a teacher that is being asked: how fast, and what holds it back; or how far its batches are."""
    if state.meter is None:
        return []
    m = state.meter.snapshot()
    return [f"{name}: {pace}" for name, pace in m.paces.items() if m.teachers[name].in_flight]


def render(state: RunState) -> RenderableType:
    """The live view: stages of the round at hand, the places of the target filling, and the summary."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    stages = Table.grid(padding=(0, 2))
    for stage in state.stages:
        mark = {"waiting": "·", "working": "▸", "done": "✓"}[stage.state]
        stages.add_row(mark, stage.folder, _counts(stage) if stage.state != "waiting" else "")
    good: dict[str, int] = next((stage.places for stage in reversed(state.stages) if stage.places), {})
    places = Table.grid(padding=(0, 2))
    thinnest = sorted(state.places.items(), key=lambda item: (item[1][0] / max(item[1][1], 1), item[0]))
    for place, (have, wanted) in sorted(thinnest[:PLACES]):
        more = f"+ {good[place]} so far" if place in good and have < wanted else ""
        places.add_row("", place, ProgressBar(total=max(wanted, 1), completed=have, width=24), f"{have}/{wanted} {more}")
    if len(thinnest) > PLACES:
        places.add_row("", f"and {len(thinnest) - PLACES} that are fuller")
    whole = Table.grid(padding=(0, 2))
    whole.add_row(ProgressBar(total=state.wanted, completed=state.accepted, width=48), f"{state.accepted}/{state.wanted} accepted")
    head = Text.assemble((state.name, "bold"), f"  round {state.round}")
    lines = [*(Text(alarm, style="yellow") for alarm in state.alarms), *(Text(line, style="dim") for line in paces(state))]
    return Group(head, stages, places, whole, Text(summary(state)), *lines)


def _counts(stage: StageState) -> str:
    done = f"{stage.done}" + (f"/{stage.total}" if stage.total is not None and stage.asks else "")
    return f"{done} answers, {stage.kept} samples" if stage.asks else f"{done} judged, {stage.kept} kept, {stage.rejected} rejected"


def dollars(micro_usd: int | None) -> str:
    """`$1.23`; four decimals below a cent; `unknown` for None."""
    if micro_usd is None:
        return "unknown"
    usd = micro_usd / 1_000_000
    return f"${usd:.2f}" if usd >= 0.01 or usd == 0 else f"${usd:.4f}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
