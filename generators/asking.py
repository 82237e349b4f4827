"""What generators that ask have in common: how often, whom and in which turn, so that each has its part at every moment; and the asking."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from factory.stage import Context, Need
from schemas.call import Answer, Call

T = TypeVar("T")


class Question(Protocol):
    """A call, and whatever its generator needs to read the answer."""

    @property
    def call(self) -> Call: ...


Asked = TypeVar("Asked", bound=Question)

DRAWS_A_ROUND = 1_000_000  # draws of one round begin here times its number, so that no two rounds ask the same question
_LOWEST_RATE = 0.01  # whatever a need says, a place is not asked for more than a hundred times what it lacks


def calls_for(need: Need, per_call: int = 1) -> int:
    """Calls that bring what a place lacks, at the rate so far; before anything is known, as if every second sample were good."""
    return math.ceil(need.missing / (per_call * max(0.5 if need.rate is None else need.rate, _LOWEST_RATE)))


def shares(named: Sequence[str] | Mapping[str, float], teachers: Sequence[str], share: float) -> dict[str, float]:
    """The parts of the teachers that a stage names (by weight, or all alike), or else of all; they add up to `share`."""
    weights = named if isinstance(named, Mapping) else dict.fromkeys(named or teachers, 1.0)
    return {name: share * weight / sum(weights.values()) for name, weight in weights.items()}


def deck(cards: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Cards in random order without end, each as often as the others."""
    while True:
        yield from rng.sample(cards, len(cards))


def dealt(weights: Mapping[str, float], owed: dict[str, float], rng: random.Random) -> Iterator[str]:
    """Names without end, each as often as its weight says, in this deck and in all that share `owed`.

    Of a single deck no name is ever a whole one ahead or behind. Of many short ones each alone can't keep the proportions: what
    it owes a name, the others make up for.
    """
    total = sum(weights.values())
    due = {name: rng.random() * weight / total for name, weight in weights.items()}  # where in its turn each begins
    while True:
        for name, weight in weights.items():
            due[name] += weight / total
            owed[name] += weight / total
        name = max(due, key=lambda each: due[each] + owed[each])
        due[name] -= 1
        owed[name] -= 1
        yield name


def in_turn(queues: Sequence[Iterator[T]]) -> Iterator[T]:
    """One of each queue, again and again, until all are empty."""
    waiting = list(queues)
    while waiting:
        for queue in tuple(waiting):
            try:
                yield next(queue)
            except StopIteration:
                waiting.remove(queue)


def answered(questions: Sequence[Asked], ctx: Context) -> Iterator[tuple[Asked, Answer]]:
    """Ask, and give each question with its answer as that comes; a call's `ref` is its question's place. Reports the first prompt."""
    if questions:
        ctx.report("prompt", readable(questions[0].call))
    for done, answer in enumerate(ctx.ask(question.call for question in questions), start=1):
        yield questions[int(answer.call.ref)], answer
        ctx.progress(done, len(questions))


def readable(call: Call) -> str:
    """A call as a person reads it."""
    return call.prompt if call.prompt is not None else "\n\n".join(f"--- {m.role}\n{m.content}" for m in call.messages)
