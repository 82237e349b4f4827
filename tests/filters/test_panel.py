"""Several judges, one verdict: majorities, means, ties, judges that are silent, and judges that are the same one twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError, TeacherFault
from factory.recipe import Recipe, StageLine
from factory.records import RunFolder
from factory.run import run
from factory.stage import Context, Generator
from factory.store import VERDICTS
from factory.teacher import FREE, Connection, Heard, Price, Teacher
from filters.judge import Judge
from filters.panel import Panel
from schemas.call import Answer, Call, Params, Reply
from schemas.recipe import Target
from schemas.sample import Failure, Sample
from tests.context import FakeContext, chat, frame

ROW = frame(chat("When will my transfer arrive?", "transfer_timing"))
NAMES = ("a", "b", "c", "d", "e")


def votes(*scores: Any) -> Callable[[Call], str]:
    """Answers by teacher: a score, or no JSON at all for None."""
    given = dict(zip(NAMES, scores, strict=False))
    return lambda call: "no idea" if given[call.teacher] is None else json.dumps({"evidence": call.teacher, "score": given[call.teacher]})


def judged(*scores: Any, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The verdict on one row, and its detail."""
    stage = Panel(**{"rubric": "helpfulness", "teachers": NAMES[: len(scores)]} | fields)
    verdicts = stage.judge(ROW, FakeContext(answers=votes(*scores)))
    assert verdicts.schema == VERDICTS
    (row,) = verdicts.to_dicts()
    return row, json.loads(row["detail"])


@pytest.mark.parametrize(
    ("scores", "score", "reason"),
    [
        ((5, 4, 1), 4.0, None),
        ((5, 3, 3), 3.0, "score below 4"),
        ((4, 4, 1, 1), 1.0, "judges tie"),
        ((5, 5, 4, 1), 4.0, None),
        ((5, 3, 1, 1), 1.0, "score below 4"),
        ((5, 1), 1.0, "judges tie"),
        ((4, 4), 4.0, None),
        ((5, 5, None), 5.0, None),
        ((5, 1, None), 1.0, "judges tie"),
        ((4, 4, 4, 1, 1), 4.0, None),
    ],
)
def test_a_majority_keeps_and_a_tie_is_none(scores: tuple[Any, ...], score: float, reason: str | None) -> None:
    row, detail = judged(*scores)
    assert (row["score"], row["reason"], row["keep"]) == (score, reason, reason is None)
    voted = [given for given in scores if given is not None]
    assert row["keep"] == (sum(given >= 4 for given in voted) > len(voted) / 2)
    assert [vote["score"] for vote in detail["votes"]] == [None if given is None else float(given) for given in scores]
    assert ("people" in detail) >= (reason == "judges tie")


def test_the_mean_keeps_what_reaches_it() -> None:
    assert judged(5, 4, 3, combine="mean")[0]["keep"]
    row, detail = judged(5, 4, 2, combine="mean")
    assert (row["score"], row["reason"]) == (pytest.approx(11 / 3), "score below 4")
    assert (detail["spread"], detail["minority"], detail["limit"]) == (pytest.approx(1.2472), pytest.approx(1 / 3, abs=1e-4), 4.0)
    assert detail["people"] == "judges disagree"
    assert judged(5, 3, combine="mean")[0]["reason"] is None, "of a mean there is no tie"


def test_people_are_asked_where_judges_are_far_apart_whether_the_row_is_kept_or_not() -> None:
    assert "people" not in judged(5, 4, 4)[1]
    kept, detail = judged(5, 5, 1)
    assert kept["keep"] and detail["people"] == "judges disagree"
    assert "people" not in judged(5, 5, 1, ask_people=2)[1]
    assert judged(5, 4, 4, ask_people=0.4)[1]["people"] == "judges disagree"
    assert judged(5, 3, combine="mean")[1]["people"] == "judges disagree", "a spread of 1 is on the line"


def test_a_quorum_must_have_answered() -> None:
    row, detail = judged(5, None, None)
    assert (row["keep"], row["reason"], row["score"]) == (False, "not judged", None)
    assert [vote.get("text") for vote in detail["votes"]] == [None, "no idea", "no idea"]
    assert judged(5, None)[0]["reason"] == "not judged", "one judge is no panel"
    assert judged(5, None, None, quorum=1)[0]["keep"]
    assert judged(5, 5, None, quorum=3)[0]["reason"] == "not judged"
    assert judged(5, None, None, on_failure="keep")[0]["keep"]


def test_every_judge_is_asked_the_same_words_as_a_judge_alone() -> None:
    ctx = FakeContext(answers=votes(5, 5, 5), teachers=("a", "b", "c"))
    panel = Panel(rubric="helpfulness")
    planned = list(panel.questions(ROW, ctx))
    panel.judge(ROW, ctx)
    assert ctx.asked == planned
    assert [call.teacher for call in planned] == ["a", "b", "c"]
    (alone,) = Judge(rubric="helpfulness").questions(ROW, ctx)
    assert all((call.messages, call.params, call.json_schema) == (alone.messages, alone.params, alone.json_schema) for call in planned)


def test_a_panel_can_fill_in_criteria_and_checklists() -> None:
    def answer(call: Call) -> str:
        low = call.teacher == "b"
        if "The questions:" in call.messages[1].content:
            return json.dumps({"q1": {"evidence": "", "answer": "yes"}, "q2": {"evidence": "", "answer": "no" if low else "yes"}})
        return json.dumps({"x": {"evidence": "", "score": 5}, "y": {"evidence": "", "score": 3 if low else 5}})

    criteria = Panel(criteria={"x": "is x", "y": "is y"}, teachers=("a", "b"), combine="mean")
    assert criteria.judge(ROW, FakeContext(answers=answer))["score"].item() == 4.5
    least = criteria.model_copy(update={"of_criteria": "min"}).judge(ROW, FakeContext(answers=answer))
    assert least["score"].item() == 4.0
    checklist = Panel(checklist=("Is it x?", "Is it y?"), teachers=("a", "b"), combine="mean", at_least=0.75)
    verdicts = checklist.judge(ROW, FakeContext(answers=answer))
    assert (verdicts["score"].item(), verdicts["keep"].item()) == (0.75, True)
    detail = json.loads(verdicts["detail"].item())
    assert (detail["spread"], detail["people"]) == (0.25, "judges disagree")


class StoodIn(FakeContext):
    """Where `b` is down, `a` stands in for it and answers the same question, which the ledger knows by one key."""

    def ask(self, calls: Iterable[Call]) -> Iterator[Answer]:
        for answer in super().ask(call.model_copy(update={"teacher": "a"}) if call.teacher == "b" else call for call in calls):
            yield answer.model_copy(update={"key": "same" if answer.call.teacher == "a" else "other", "teacher": answer.call.teacher})


def test_who_stands_in_for_another_has_one_vote() -> None:
    verdicts = Panel(rubric="helpfulness", teachers=("a", "b", "c")).judge(ROW, StoodIn(answers=votes(5, 5, 1)))
    detail = json.loads(verdicts["detail"].item())
    assert verdicts["reason"].item() == "judges tie"
    assert [vote["teacher"] for vote in detail["votes"]] == ["a", "c"]
    assert detail["calls"] == ["same", "other"]


def test_judges_of_one_family_are_reported() -> None:
    models = {"a": "Qwen/Qwen2.5-7B-Instruct", "b": "qwen3:8b", "c": "gpt-4o-mini"}
    ctx = FakeContext(answers=votes(5, 5, 5), models=models)
    Panel(rubric="helpfulness", teachers=("a", "b", "c")).judge(ROW, ctx)
    assert ctx.reports == {"one family: qwen": "a, b are of one family, and may be wrong together"}
    other = FakeContext(answers=votes(5, 5, 5), models=models)
    Panel(rubric="helpfulness", teachers=("a", "c")).judge(ROW, other)
    assert other.reports == {}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"teachers": ("a",)}, "two teachers"),
        ({"teachers": ("a", "a")}, "two teachers"),
        ({"teachers": ("a", "b", "a")}, "votes once"),
        ({"teachers": ("a", "b"), "quorum": 3}, "quorum is 3"),
        ({"teachers": ("a", "b"), "at_least": 0.5}, "from 1 to 5"),
        ({"combine": "min"}, "majority"),
    ],
)
def test_faulty_settings(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Panel(**{"rubric": "helpfulness"} | settings)


def test_a_recipe_with_one_teacher_has_no_panel() -> None:
    with pytest.raises(GristmillError, match="two teachers"):
        list(Panel(rubric="helpfulness").questions(ROW, FakeContext()))


class Seeds(Generator):
    key = "seeds"
    once = True

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        yield chat("a real question", "x", origin="real")


class Made(Generator):
    key = "made"

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        assert dict(ctx.models) == {"good": "qwen2.5", "bad": "qwen3", "dead": "gpt-4o"}
        for i in range(6):
            yield chat(f"question {i}", "x")


class Fixed(Teacher):
    """Gives one score to everything, or fails."""

    kind = "fixed"
    score: int = 0

    def known_price(self, tokens_in: int | None = None) -> Price:
        return self.price or FREE

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        teacher = self

        class Open:
            async def ask(self, call: Call, params: Params) -> Heard:
                if not teacher.score:
                    raise TeacherFault("never", "this teacher fails")
                text = json.dumps({"evidence": "e", "score": teacher.score})
                return Heard(Reply(text=text, finish="stop", tokens_in=5, tokens_out=5))

        yield Open()


def test_a_run_asks_all_of_them_and_all_of_it_is_on_the_bill(tmp_path: Path) -> None:
    """Through a real gateway: two judges that tie on every row, and one that fails."""
    price = Price(input_usd_per_mtok=1000, output_usd_per_mtok=1000)
    teachers = {
        "good": Fixed(model="qwen2.5", score=5, price=price),
        "bad": Fixed(model="qwen3", score=1, price=price),
        "dead": Fixed(model="gpt-4o"),
    }
    lines = tuple(StageLine(f"{i:02d}-{stage.key}", stage) for i, stage in enumerate((Seeds(), Made(), Panel(rubric="helpfulness")), 1))
    recipe = Recipe(tmp_path / "recipe.yaml", "", "tiny", Target(accepted=6, rounds=1), teachers, lines)
    folder: RunFolder = run(recipe, tmp_path / "mill", view="quiet")
    (judged,) = (row for row in folder.funnel() if row.stage == "03-panel")
    assert (judged.asked, judged.answered, judged.judged, dict(judged.rejected)) == (18, 12, 6, {"judges tie": 6})
    assert folder.judging["micro_usd"].sum() == folder.status["micro_usd"] > 0
    assert list(folder.stages[2]["reports"]) == ["one family: qwen"]
