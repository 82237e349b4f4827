"""What a run tells while it works."""

from __future__ import annotations

import io

from factory.progress import RunState, StageState, shown


def test_every_stage_that_ended_has_its_line_however_fast_the_next_round_began() -> None:
    out, state = io.StringIO(), RunState("tiny", 6, None)
    with shown(state, "plain", out):
        for number in range(1, 4):
            stage = StageState("02-words", asks=True)
            state.begin(number, [stage])
            stage.state, stage.done, stage.kept = "done", number, 2
    assert out.getvalue().splitlines() == [f"round 0{n} 02-words       {n} answers, 2 samples" for n in (1, 2, 3)]
