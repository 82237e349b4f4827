"""Preferences from conversations: whom contrast asks about which row, what it makes of answers, and what it can't go on from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.stage import Need
from generators.contrast import Contrast
from schemas.call import Answer, Call, Params, Reply
from schemas.sample import Failure, Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

ROWS = [chat(f"How much is {n} and {n}?", str(2 * n), teacher="big", axes={"tone": "curt" if n % 2 else "angry"}) for n in range(1, 7)]


def made(stage: Contrast, ctx: FakeContext) -> tuple[list[Sample], list[Failure]]:
    assert ctx.kept is not None
    out = list(stage.generate(ctx.kept, ctx))
    return [s for s in out if isinstance(s, Sample)], [f for f in out if isinstance(f, Failure)]


def context(*samples: Sample, **more: Any) -> FakeContext:
    return FakeContext(kept=frame(*(samples or ROWS)), **{"needs": (Need(3, rate=1.0),), "answers": lambda call: "No idea.", **more})


def test_the_answer_of_the_row_stands_above_that_of_the_teacher() -> None:
    ctx = context(needs=(Need(6, rate=1.0, aim="x"),))
    pairs, failures = made(Contrast(), ctx)
    assert failures == []
    assert Counter(pair.provenance.parents[0] for pair in pairs) == Counter(row.id for row in ROWS)  # each once
    of = {row.id: row for row in ROWS}
    for pair, call in zip(pairs, ctx.asked, strict=True):
        row = of[pair.provenance.parents[0]]
        assert call.messages == pair.messages == row.messages[:-1]
        assert pair.chosen == row.messages[-1:]
        assert pair.rejected == (Message(role="assistant", content="No idea."),)
        assert (pair.kind, pair.label, pair.provenance.axes) == ("preference", row.label, row.provenance.axes)
        assert (pair.provenance.teacher, pair.provenance.round, call.aim) == ("fake", 1, "x")


def test_a_place_is_asked_about_with_rows_of_it() -> None:
    angry = Need(2, axes={"tone": "angry"}, rate=1.0)
    pairs, _ = made(Contrast(), context(needs=(angry,)))
    assert [pair.provenance.axes for pair in pairs] == [{"tone": "angry"}] * 2
    pairs, _ = made(Contrast(), context(needs=(Need(4, label="4", rate=1.0),)))
    assert {pair.label for pair in pairs} == {"4"}
    pairs, _ = made(Contrast(), context(needs=(Need(9, without={"label": ("2", "4"), "tone": ("curt",)}, rate=1.0),)))
    assert {pair.label for pair in pairs} == {"8", "12"}
    inside = Need(2, cluster="0", exemplars=(ROWS[0].id,), rate=1.0)
    follower = chat("And how much is 1 and 1?", "2", parents=(ROWS[0].id,))
    pairs, _ = made(Contrast(), context(*ROWS, follower, needs=(inside,)))
    assert {pair.provenance.parents[0] for pair in pairs} == {ROWS[0].id, follower.id}
    assert made(Contrast(), context(needs=(Need(2, label="none of them"),))) == ([], [])


def test_a_row_of_another_teacher_comes_first_and_one_that_was_asked_about_last() -> None:
    own = [row.model_copy(update={"provenance": row.provenance.model_copy(update={"teacher": "fake"})}) for row in ROWS[:3]]
    asked, _ = made(Contrast(), context(*own, *ROWS[3:], needs=(Need(6, rate=1.0),)))
    assert {pair.provenance.parents[0] for pair in asked[:3]} == {row.id for row in ROWS[3:]}
    assert {pair.provenance.parents[0] for pair in asked[3:]} == {row.id for row in own}
    before, _ = made(Contrast(), context(*ROWS, needs=(Need(2, rate=1.0),)))
    pairs, _ = made(Contrast(), context(*ROWS, *before, needs=(Need(4, rate=1.0),)))
    assert not {pair.provenance.parents for pair in pairs} & {pair.provenance.parents for pair in before}


def test_more_calls_than_rows_ask_again_with_another_draw() -> None:
    stage = Contrast(max_calls=20)
    ctx = context(needs=(Need(10),))  # nothing is known yet: twice as many
    asked = list(stage.questions(ctx.kept, ctx))  # type: ignore[arg-type]
    assert len(asked) == 20
    assert len({(call.messages, call.draw) for call in asked}) == 20
    later = context(needs=(Need(10),), round=2)
    assert not {call.draw for call in stage.questions(later.kept, later)} & {call.draw for call in asked}  # type: ignore[arg-type]


def test_two_names_of_one_model_and_two_rows_of_one_prompt_are_asked_apart() -> None:
    twice = [chat("How much is 1 and 1?", answer) for answer in ("2", "Two.")]
    ctx = context(*twice, needs=(Need(4, rate=1.0),), teachers=("a", "b"))
    asked = list(Contrast().questions(ctx.kept, ctx))  # type: ignore[arg-type]
    assert len({call.draw for call in asked}) == len(asked) == 4


def test_work_is_shared_by_weight_and_a_need_may_say_otherwise() -> None:
    ctx = context(needs=(Need(12, rate=1.0),), teachers=("a", "b"))
    assert Counter(call.teacher for call in Contrast().questions(ctx.kept, ctx)) == {"a": 6, "b": 6}  # type: ignore[arg-type]
    weighted = Contrast(teachers={"a": 1, "b": 2}, share=0.5)
    assert weighted.effort(()).shares == pytest.approx({"a": 1 / 6, "b": 1 / 3})
    ctx = context(needs=(Need(12, rate=1.0, teachers={"b": 1.0}),), teachers=("a", "b"))
    assert {call.teacher for call in weighted.questions(ctx.kept, ctx)} == {"b"}  # type: ignore[arg-type]


def test_instructions_to_go_wrong_are_the_teachers_alone() -> None:
    turns = [("system", "Be exact."), ("user", "6 x 7?"), ("assistant", "42")]
    row = Sample(
        messages=tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns),
        provenance=Provenance(origin="real", generator="seeds"),
    )
    ctx = context(row, needs=(Need(1, rate=1.0),))
    (pair,), _ = made(Contrast(system="Answer in haste."), ctx)
    assert [(turn.role, turn.content) for turn in ctx.asked[0].messages] == [("system", "Answer in haste."), ("user", "6 x 7?")]
    assert [(turn.role, turn.content) for turn in pair.messages] == [("system", "Be exact."), ("user", "6 x 7?")]


def test_room_is_twice_the_rows_answer_unless_the_recipe_says() -> None:
    ctx = context(chat("Tell me all.", "word " * 700), needs=(Need(1, rate=1.0),))
    assert [call.params.max_tokens for call in Contrast().questions(ctx.kept, ctx)] == [2000]  # type: ignore[arg-type]
    own = Contrast(params=Params(max_tokens=7, temperature=1))
    assert [call.params for call in own.questions(ctx.kept, ctx)] == [own.params]  # type: ignore[arg-type]
    small = context(needs=(Need(1, rate=1.0),))
    assert [call.params.max_tokens for call in Contrast().questions(small.kept, small)] == [64]  # type: ignore[arg-type]


class Replying(FakeContext):
    """A context whose teacher gives whole replies, or None."""

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        for call in calls:
            said: Any = self.answers(call) if self.answers else None
            yield Answer(call=call, key=call.key("fake", "fake"), reply=said, error=None if said else "connection refused")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "unanswered"),
        (("2 ", "stop"), "same answer"),
        ((" \n", "stop"), "no answer"),
        (("I would say that", "length"), "cut"),
        (("I can't", "refused"), "refused"),
    ],
)
def test_an_answer_that_makes_no_preference_is_a_failure(reply: tuple[str, Any] | None, reason: str) -> None:
    whole = reply and Reply(text=reply[0], finish=reply[1], tokens_in=1, tokens_out=1)
    ctx = Replying(kept=frame(ROWS[0]), needs=(Need(1, rate=1.0),), answers=lambda call: whole)  # type: ignore[return-value,arg-type]
    pairs, (failure,) = made(Contrast(), ctx)
    assert pairs == []
    assert (failure.reason, failure.teacher, bool(failure.call)) == (reason, "fake", True)
    assert failure.text == (reply[0].strip() if reply else "")


def test_rows_without_an_answer_texts_and_rows_set_aside_are_not_gone_on_from() -> None:
    where = Provenance(origin="real", generator="seeds")
    held = ROWS[0].model_copy(update={"holdout": True})
    others = [chat("What now?"), Sample(text="A poem.", provenance=where), held]
    pairs, _ = made(Contrast(), context(*others, ROWS[1], needs=(Need(2, rate=1.0),)))
    assert {pair.provenance.parents for pair in pairs} == {(ROWS[1].id,)}
    assert made(Contrast(), context(*others)) == ([], [])  # they may come
    with pytest.raises(GristmillError, match="plain texts"):
        made(Contrast(), context(others[1]))
    with pytest.raises(GristmillError, match="names no teachers"):
        made(Contrast(), context(teachers=()))


def test_a_line_that_names_nobody_or_asks_nothing_is_a_mistake() -> None:
    for wrong in ({"share": 0}, {"teachers": {"a": 0}}, {"max_calls": 0}):
        with pytest.raises(ValidationError):
            Contrast.model_validate(wrong)
    assert made(Contrast(), context(needs=())) == ([], [])


def test_the_order_of_rows_hangs_on_the_seed_and_not_on_their_order() -> None:
    stage = Contrast()
    asked = [
        [call.messages[0].content for call in stage.questions(rows, FakeContext(needs=(Need(3, rate=1.0),)))]
        for rows in (frame(*ROWS), frame(*reversed(ROWS)))
    ]
    assert asked[0] == asked[1]
