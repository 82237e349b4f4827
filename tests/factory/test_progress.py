"""What a run tells while it works."""

from __future__ import annotations

import io
from types import SimpleNamespace

from rich.console import Console

from factory.gateway import Snapshot, Tally
from factory.progress import RunState, StageState, paces, render, round_line, shown


def test_every_stage_that_ended_has_its_line_however_fast_the_next_round_began() -> None:
    out, state = io.StringIO(), RunState("tiny", 6, None)
    with shown(state, "plain", out):
        for number in range(1, 4):
            stage = StageState("02-words", asks=True)
            state.begin(number, [stage])
            stage.state, stage.done, stage.kept = "done", number, 2
    assert out.getvalue().splitlines() == [f"round 0{n} 02-words       {n} answers, 2 samples" for n in (1, 2, 3)]


def test_a_round_is_said_to_have_ended_before_anything_of_the_next_one() -> None:
    out, state = io.StringIO(), RunState("tiny", 6, None)
    with shown(state, "plain", out):
        for number in range(4):  # 0: sources
            if number > 1:
                state.told.append(round_line(number - 1, number, 6, {}))
            state.begin(number, [StageState("02-words", state="done")])
        state.told.append(round_line(3, 6, 6, {}))
    lines = [" ".join(line.split()[:3]) for line in out.getvalue().splitlines()]
    assert lines == [f"round 0{n} {what}" for n in range(4) for what in ("02-words", "ended:")[: 1 + (n > 0)]]


def test_a_view_says_how_fast_a_teacher_is_asked_and_why() -> None:
    busy = Tally(asked=3, in_flight=2)
    told = Snapshot(in_flight=2, teachers={"t": busy, "idle": Tally()}, paces={"t": "batch b_1: 40 of 1,000 done", "idle": "8 at once"})
    state = RunState("tiny", 6, None, meter=SimpleNamespace(snapshot=lambda: told))
    assert paces(state) == ["t: batch b_1: 40 of 1,000 done"]
    console = Console(width=100)
    with console.capture() as shown_text:
        console.print(render(state))
    assert "40 of 1,000 done" in shown_text.get()


def test_a_rounds_line_names_the_places_that_are_thinnest() -> None:
    places = {f"label {n}": (n, 10) for n in range(12)} | {"full": (3, 3)}
    line = round_line(2, 66, 100, places)
    assert line == "round 02 ended: 66/100 accepted; short: label 0 0/10, label 1 1/10, label 2 2/10, label 3 3/10 and 6 more"
    assert round_line(3, 9, 9, {}) == "round 03 ended: 9/9 accepted"


def test_of_very_many_places_the_live_view_shows_the_thinnest() -> None:
    state = RunState("many", 100, None, accepted=1, places={f"p{n:03d}": (n, 200) for n in range(100)})
    console = Console(file=io.StringIO(), width=100)
    console.print(render(state))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "p000" in text and "p019" in text and "p020" not in text
    assert "and 80 that are fuller" in text
