"""Makes preferences from conversations that are there: what a row answers is set above what another, weaker teacher answers to the same."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import polars as pl
from pydantic import Field

from factory.errors import GristmillError
from factory.stage import Context, Effort, Generator, Need, TeacherNames
from generators.asking import DRAWS_A_ROUND, answered, calls_for, dealt, in_turn, shares
from schemas.call import Answer, Call, Params
from schemas.sample import Failure, Message, Provenance, Sample


class Contrast(Generator):
    """Asks a teacher what a row was asked, and makes a preference: `chosen` is the row's own answer, `rejected` the teacher's.

    For direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), as Zephyr's pairs were made (Tunstall et al. 2023, arXiv
    2310.16944): the better answer is that of a strong model or a person, the worse one a weaker model's. So name teachers that are
    weaker than those of the rows, or give them instructions that make them so; whether `chosen` is really better, the filter `pairs` asks
    in both orders. Rows are the real ones, those that earlier rounds accepted, and those that passed all stages above in this round:
    conversations whose last turn is an answer. The preference takes over label and axes of its row. Rows of which no
    preference was kept yet come first, and among them those whose answer another teacher wrote.
    """

    key = "contrast"

    teachers: Annotated[tuple[str, ...] | dict[str, Annotated[float, Field(gt=0)]], TeacherNames()] = Field(
        (), description="who is asked: names, in equal shares, or names with their weights; all of the recipe by default"
    )
    system: str | None = Field(
        None, description="instructions for the teacher in place of the row's own, such as how to go wrong; they are no part of the sample"
    )
    share: float = Field(
        1, gt=0, le=1, description="of what is missing; where several lines have more than all of it together, in proportion"
    )
    max_calls: int = Field(500, ge=1, description="in a round")
    params: Params = Params()

    def effort(self, teachers: Sequence[str]) -> Effort:
        """Its share, divided by the weights of its teachers; for any label and axes, as rows of them come to be there."""
        fixed = isinstance(self.teachers, dict)
        return Effort(shares(self.teachers, teachers, self.share), fixed, kinds=("preference",), follows=True)

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        """Ask, and yield a preference for each answer that differs from the row's own."""
        return (_read(question, answer) for question, answer in answered(self._questions(samples, ctx), ctx))

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
        """The calls that `generate` would make."""
        return (question.call for question in self._questions(samples, ctx))

    def _questions(self, samples: pl.DataFrame, ctx: Context) -> list[_Question]:
        if not (self.teachers or ctx.teachers):
            raise GristmillError("the recipe names no teachers", where=ctx.stage, next="Add one under teachers:.")
        rows = _Rows(samples, ctx)
        own, owed = self.effort(ctx.teachers).shares, defaultdict[str, float](float)
        needs = [need for need in ctx.needs if need.missing > 0]
        places = [_of_place(need, rows, dealt(need.teachers or own, owed, ctx.rng)) for need in needs]
        drawn: Counter[tuple[Message, ...]] = Counter()
        questions = []
        for ref, (row, teacher, need) in enumerate(islice(in_turn(places), self.max_calls)):
            turns = _turns(row["messages"][:-1])
            asked = turns if self.system is None else (Message(role="system", content=self.system), *_without_system(turns))
            draw = ctx.round * DRAWS_A_ROUND + drawn[asked]
            drawn[asked] += 1  # by text and not by teacher: two names may stand for one model
            call = Call(teacher=teacher, messages=asked, params=self._params(row), draw=draw, ref=str(ref), aim=need.aim)
            where = Provenance(origin="made", generator=ctx.stage, round=ctx.round, parents=(row["id"],), axes=row["axes"])
            questions.append(_Question(call, turns, _turns(row["messages"][-1:]), row["label"], where))
        return questions

    def _params(self, row: dict[str, Any]) -> Params:
        """The recipe's params, and where they are silent room for an answer twice as long as the row's, at 3.5 bytes a token."""
        if "max_tokens" in self.params.model_fields_set:
            return self.params
        room = max(64, len(row["output"].encode()) * 4 // 7)
        return self.params.model_copy(update={"max_tokens": min(room, 2048)})


def _of_place(need: Need, rows: _Rows, teachers: Iterator[str]) -> Iterator[tuple[dict[str, Any], str, Need]]:
    """A row and whom to ask about it, as often as it takes; nothing where there is no row of the place yet."""
    here = rows.at(need)
    for teacher in islice(teachers, calls_for(need) if here else 0):
        yield rows.take(here, teacher), teacher, need


@dataclass(frozen=True)
class _Question:
    """A call, and what the preference is made of beside its answer."""

    call: Call
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    label: str | None
    where: Provenance


class _Rows:
    """The conversations to go on from, and of each how often it was asked about in this round, or gave a preference that was kept."""

    def __init__(self, samples: pl.DataFrame, ctx: Context) -> None:
        chats = samples.filter((pl.col("kind") == "chat") & (pl.col("messages").list.len() > 1) & ~pl.col("holdout"))
        chats = chats.filter(pl.col("output").str.strip_chars() != "").sort("id")
        if samples.height and (samples["kind"] == "text").all():
            raise GristmillError(
                "all there is are plain texts, and no answer of one can be set above another",
                where=ctx.stage,
                next="Bring seeds with questions and answers, or remove this line.",
            )
        self.rows = chats.select("id", "messages", "output", "label", "teacher", "parents", "axes").to_dicts()
        for row in self.rows:
            row["axes"] = json.loads(row["axes"])
        ctx.rng.shuffle(self.rows)
        pairs = pl.concat([frame.filter(pl.col("kind") == "preference").select("id", "parents") for frame in (ctx.kept, samples)])
        self.asked = Counter(pairs.unique("id").explode("parents")["parents"].drop_nulls())

    def at(self, need: Need) -> list[dict[str, Any]]:
        """The rows of a place: of its label and axes; of a cluster its exemplars and what was made from them."""

        def fits(row: dict[str, Any]) -> bool:
            has = row["axes"] | {"label": row["label"]}
            apart = any(has.get(name) in values for name, values in need.without.items())
            here = need.cluster is None or not need.exemplars or not {row["id"], *row["parents"]}.isdisjoint(need.exemplars)
            return not apart and here and need.label in (None, row["label"]) and need.axes.items() <= row["axes"].items()

        return list(filter(fits, self.rows))

    def take(self, rows: Sequence[dict[str, Any]], teacher: str) -> dict[str, Any]:
        """The row that was asked about least; of several, one whose answer another teacher wrote."""
        row = min(rows, key=lambda row: (self.asked[row["id"]], row["teacher"] == teacher))
        self.asked[row["id"]] += 1
        return row


def _read(question: _Question, answer: Answer) -> Sample | Failure:
    """The preference that an answer makes, or why it makes none."""
    who = answer.teacher or answer.call.teacher
    lost = Failure(reason="unanswered", detail=answer.error or "", teacher=who, call=answer.key)
    if answer.reply is None:
        return lost
    text = answer.reply.text.strip()
    if answer.reply.finish == "refused":
        return lost.model_copy(update={"reason": "refused", "text": text})
    if answer.reply.finish == "length":
        return lost.model_copy(update={"reason": "cut", "text": text, "detail": f"reached max_tokens {answer.call.params.max_tokens}"})
    if not text:
        return lost.model_copy(update={"reason": "no answer"})
    if _words(text) == _words(question.chosen[0].content):
        return lost.model_copy(update={"reason": "same answer", "text": text})
    where = question.where.model_copy(update={"call": answer.key, "teacher": who})
    rejected = (Message(role="assistant", content=text),)
    return Sample(messages=question.prompt, chosen=question.chosen, rejected=rejected, label=question.label, provenance=where)


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()


def _turns(turns: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message.model_validate(turn) for turn in turns)


def _without_system(turns: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(turn for turn in turns if turn.role != "system")
