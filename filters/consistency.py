"""Asks a sample's teacher its input afresh, several times: an answer that it does not come to again was luck, or a slip."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from factory.stage import Context, Filter, TeacherNames
from factory.store import verdicts_frame
from filters.question import NOT_JUDGED, labels_of, silence, teachers_of, together, who, with_defaults
from filters.twins import plain
from schemas.call import Answer, Call, Params
from schemas.sample import Message
from schemas.verdict import Verdict

Compare = Literal["exact", "number", "meaning"]

DIFFER = "answers differ"
FIRST_DRAW = 1 << 20  # draws of the making count from 0: the same question must not be answered by the ledger
SHORT_WORDS = 5  # an output up to here is compared word for word
_TEMPERATURE = 0.7  # at 0 all draws are one
_SHOWN = 300  # characters of each answer that are kept in the detail

_LABELS = "Say which of these labels fits what the user writes. Answer with the label alone.\n\n"

_DIGITS = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
_NUMBER = re.compile(rf"(?<![\w.,]){_DIGITS}(?!\d)")
_QUANTITY = re.compile(rf"[$€£]?\s*({_DIGITS})\s*(?:%|[^\W\d]{{1,20}})?\.?")  # a number with a currency or a unit
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_BOX = "\\boxed{"
_LONGEST = 100_000  # characters at an answer's end in which its number is looked for


class Consistency(Filter):
    """Keeps a sample when at least `at_least` of `draws` fresh answers to its input agree with its output.

    Asked is the teacher that made the sample (where nobody did, or it is not in the recipe: one of all), or `teachers` in turn. It is
    shown the turns before the answer, `shots` seeds as turns of their own, and where the seeds' answers are labels, all of them.
    That many independent answers to one question rarely agree on a wrong one is self-consistency (Wang et al. 2022, arXiv
    2203.11171); there the majority becomes the answer, here it is only compared with the answer that is there.

    compare: "exact", the same words but for case, punctuation and space (or the only label that the answer names); "number", what
    stands behind "####" or in \\boxed{}, or else the last number; "meaning", a cosine of `threshold` between the embeddings. That groups
    answers by meaning as semantic entropy does (Kuhn et al. 2023, arXiv 2302.09664), with a cosine in place of its test of mutual
    entailment, so a negation in a long answer can escape it. "auto" takes "number" where the output marks its result or is a
    number, "exact" where it is a label or has at most five words, and else "meaning".

    Score: the share of answers that agree. A draw without an answer, or one that was cut before its number, does not count; unless
    more than half of the draws count, and where a sample has no output, the reason is "not judged", and `on_failure` decides.
    """

    key = "consistency"
    ranks = True
    scope = "sample"

    teachers: Annotated[tuple[str, ...], TeacherNames()] = Field((), description="who is asked; by default each sample's own teacher")
    draws: int = Field(5, ge=1, le=64, description="how often each input is asked")
    compare: Literal["auto", "exact", "number", "meaning"] = "auto"
    threshold: float = Field(0.8, gt=0, le=1, description="cosine from which two answers mean the same")
    shots: int = Field(3, ge=0, le=20, description="seeds shown as answered before")
    at_least: float = Field(0.5, gt=0, le=1, description="share of answers that must agree")
    on_failure: Literal["reject", "keep"] = "reject"
    params: Params = Field(Params(), description="unset: temperature 0.7 and max_tokens 600")

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """One verdict a sample; `detail` holds the answers, cut to 300 characters, which of them agree, how they were compared, and calls.

        Of "exact" and "number" it also says which answer was the most frequent, as `most`.
        """
        verdicts = [
            Verdict(sample=id_, by="", keep=self.on_failure == "keep", reason=NOT_JUDGED, detail={"error": "this row has no answer"})
            for id_ in samples.filter(~_ANSWERED)["id"]
        ]
        rows = {row["id"]: row for row in samples.filter(_ANSWERED).select("id", "output", "label").iter_rows(named=True)}
        names = list(labels_of(ctx.seeds).values())
        asked: dict[str, list[Answer]] = {}
        for sample, answers in together(self.questions(samples, ctx), ctx, self.draws):
            asked[sample] = answers
            ctx.progress(len(verdicts) + len(asked), samples.height)
        compare = {id_: self._compared(rows[id_]) for id_ in asked}
        said = {id_: [_said(answer, compare[id_]) for answer in answers] for id_, answers in asked.items()}
        alike = self._alike({id_: (rows[id_]["output"], said[id_]) for id_ in asked if compare[id_] == "meaning"}, ctx)
        for id_, answers in asked.items():
            most = None
            if (how := compare[id_]) != "meaning":
                reduced = _reduced([rows[id_]["output"], *(text or "" for text in said[id_])], how, names)
                alike[id_] = [None if text is None else one == reduced[0] for text, one in zip(said[id_], reduced[1:], strict=True)]
                given = Counter(one for text, one in zip(said[id_], reduced[1:], strict=True) if text is not None and one)
                most = min(given, key=lambda one: (-given[one], one)) if given else None
            verdicts.append(self._verdict(id_, answers, alike[id_], how, most))
        return verdicts_frame(verdicts)

    def questions(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Call]:
        """`draws` calls a sample that has an output; a loop over rows, since each is a request of its own."""
        rows = samples.filter(_ANSWERED)
        if rows.is_empty():
            return
        everyone = teachers_of(ctx.stage, self.teachers, ctx)
        params = with_defaults(self.params, temperature=_TEMPERATURE)
        labels = labels_of(ctx.seeds)
        answers = set(labels.values())
        shown = [seed for seed in ctx.seeds.select("id", "kind", "messages").to_dicts() if _is_shot(seed)]
        for row in rows.select("id", "kind", "messages", "output", "teacher").iter_rows(named=True):
            rng = random.Random(row["id"])
            others = [seed for seed in shown if seed["id"] != row["id"]]
            shots = rng.sample(others, min(self.shots, len(others)))
            teachers = (row["teacher"],) if not self.teachers and row["teacher"] in ctx.teachers else everyone
            first = 0 if self.teachers else rng.randrange(len(teachers))
            messages = _asked(row, shots, sorted(answers) if len(labels) > 1 and row["output"] in answers else ())
            for draw in range(self.draws):
                teacher = teachers[(first + draw) % len(teachers)] if self.teachers else teachers[first]
                yield Call(teacher=teacher, messages=messages, params=params, draw=FIRST_DRAW + draw, ref=row["id"])

    def _compared(self, row: dict[str, Any]) -> Compare:
        if self.compare != "auto":
            return self.compare
        output = row["output"]
        if _marked(output) is not None or _QUANTITY.fullmatch(output.strip()):
            return "number"
        return "exact" if output == row["label"] or len(output.split()) <= SHORT_WORDS else "meaning"

    def _alike(self, texts: dict[str, tuple[str, list[str | None]]], ctx: Context) -> dict[str, list[bool | None]]:
        """By sample, whether each answer means what the output means; None where there is no answer. Embeds each text once."""
        once = dict.fromkeys(text for output, said in texts.values() for text in (output, *said) if text is not None)
        if not once:
            return {id_: [None] * len(said) for id_, (_, said) in texts.items()}
        place = {text: i for i, text in enumerate(once)}
        vectors = ctx.embed(list(once))
        return {
            id_: [None if text is None else bool(np.dot(vectors[place[output]], vectors[place[text]]) >= self.threshold) for text in said]
            for id_, (output, said) in texts.items()
        }

    def _verdict(self, sample: str, answers: list[Answer], agree: list[bool | None], how: Compare, most: str | None) -> Verdict:
        counted = [one for one in agree if one is not None]
        keys = [answer.key for answer in answers]
        shown = [answer.reply.text[:_SHOWN] if answer.reply else None for answer in answers]
        detail: dict[str, Any] = {"answers": shown, "agree": agree, "compare": how, "limit": self.at_least}
        detail |= {"most": most[:_SHOWN]} if most else {}
        detail |= {"teachers": list(dict.fromkeys(map(who, answers))), "call": keys[0], "calls": keys}
        if 2 * len(counted) <= self.draws:
            silent = next(answer for answer, one in zip(answers, agree, strict=True) if one is None) if None in agree else answers[0]
            detail |= {"error": f"{len(counted)} of {self.draws} answers can be compared"} | silence(silent)
            return Verdict(sample=sample, by="", keep=self.on_failure == "keep", reason=NOT_JUDGED, detail=detail)
        score = sum(counted) / len(counted)
        keep = score >= self.at_least
        return Verdict(sample=sample, by="", keep=keep, reason=None if keep else DIFFER, score=score, detail=detail)


_ANSWERED = (pl.col("output").str.strip_chars() != "") & (pl.col("kind") != "text")


def _is_shot(seed: dict[str, Any]) -> bool:
    """Whether a seed is one turn each way: only then it is clear where one example ends and the next begins."""
    return seed["kind"] == "chat" and [turn["role"] for turn in seed["messages"] if turn["role"] != "system"] == ["user", "assistant"]


def _asked(row: dict[str, Any], shots: Sequence[dict[str, Any]], labels: Sequence[str]) -> tuple[Message, ...]:
    """The turns that a teacher is shown: the row's system turn with the labels, the shots, and the row's own turns before its answer."""
    own = [Message.model_validate(turn) for turn in row["messages"]]
    if row["kind"] == "chat":
        own = own[:-1]
    system = [turn.content for turn in own if turn.role == "system"]
    if labels:
        system.append(_LABELS + "\n".join(f"- {label}" for label in labels))
    shown = [Message.model_validate(turn) for seed in shots for turn in seed["messages"] if turn["role"] != "system"]
    head = [Message(role="system", content="\n\n".join(system))] if system else []
    return (*head, *shown, *(turn for turn in own if turn.role != "system"))


def _said(answer: Answer, how: Compare) -> str | None:
    """What an answer says; None where there is none that can be compared: of one that was cut, the end may have said something else."""
    reply = answer.reply
    if reply is None or not reply.text.strip() or reply.finish == "refused" or (reply.finish == "length" and how != "meaning"):
        return None
    return reply.text


def _reduced(texts: Sequence[str], how: Compare, labels: Sequence[str]) -> list[str]:
    """What is compared of an output and the answers to it: the first text is the output."""
    if how == "number":
        results = [result_of(text) for text in texts]
        if results[0] is not None:
            return [result or "" for result in results]
    whole, names = _plain(texts), _plain(labels)
    if whole[0] not in names:
        return whole
    return [text if text in names else _named(text, names) or text for text in whole]


def _plain(texts: Sequence[str]) -> list[str]:
    bare = pl.Series("text", texts, dtype=pl.String).to_frame().select(plain(pl.col("text"))).to_series()
    return [text or whole.strip() for text, whole in zip(bare, texts, strict=True)]  # "?" is nothing but punctuation, and no "!"


def _named(text: str, labels: Sequence[str]) -> str | None:
    """The only label that a text names, as a word of its own; None where it names none, or several."""
    found = [label for label in labels if label and re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)]
    longest = [label for label in found if not any(label != other and label in other for other in found)]
    return longest[0] if len(longest) == 1 else None


def result_of(text: str) -> str | None:
    """What a worked answer comes to: what stands behind "####" or in \\boxed{}, or else its last number; None: nothing of the kind.

    A number is given as plain digits, without currency and unit: "$1,200.50" and "1200.5" are one. Anything else in its place
    (a fraction, a formula) is given without its spaces, and is only like what is written in the same way.
    """
    end = text[-_LONGEST:]
    if (marked := _marked(end)) is not None:
        bare = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", marked).replace("\\", "").strip("* ")
        return _digits(number[1]) if (number := _QUANTITY.fullmatch(bare)) else re.sub(r"\s+", "", marked).lower()
    found = _NUMBER.findall(end)
    return _digits(found[-1]) if found else None


def _marked(text: str) -> str | None:
    """What the last "####" or \\boxed{} of a text marks as its result."""
    hashes = _HASHES.findall(text)
    if hashes:
        return str(hashes[-1]).strip()
    _, box, rest = text.rpartition(_BOX)
    depth = 1
    for place, brace in ((match.start(), match[0]) for match in re.finditer(r"[{}]", rest)) if box else ():
        depth += 1 if brace == "{" else -1
        if depth == 0:
            return rest[:place].strip()
    return None


def _digits(number: str) -> str:
    whole, _, part = number.replace(",", "").partition(".")
    sign, whole, part = "-" if whole.startswith("-") else "", whole.lstrip("-").lstrip("0") or "0", part.rstrip("0")
    size = f"{whole}.{part}" if part else whole
    return size if size == "0" else sign + size
