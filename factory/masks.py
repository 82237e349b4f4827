"""Spans of a sample's texts: named alike by the filters that find them and by the release that blacks them out.

A filter writes `"mask": [[part, start, end, KIND], ...]` into a verdict's detail; the parts are in `schemas/verdict.py`. A release puts
`[KIND]` in the place of every span. The sample keeps its id, so lineage and verdicts still speak of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import polars as pl

from factory.errors import ReleaseError
from factory.records import RunFolder
from factory.store import SAMPLES, samples_frame, samples_of
from schemas.sample import Message, Sample

TURNS = ("messages", "chosen", "rejected")
HIDDEN = "(not shown: this row fell out before anything was looked for in it)"
SHORTEST = 6  # characters of a masked text that is replaced wherever else it stands; a shorter one stands in other words as well


class Span(NamedTuple):
    """Characters `start` to `end` of one part of a sample, and what they are."""

    part: str
    start: int
    end: int
    kind: str


def texts_of(samples: pl.DataFrame) -> pl.DataFrame:
    """Every text of every sample, a row a text: `id`, `part` ("messages.0", "chosen.0", "rejected.0" or "text"), `role` and `text`."""
    turns = [
        samples.select("id", turn=pl.col(name), at=pl.int_ranges(pl.col(name).list.len()))
        .explode("turn", "at")
        .drop_nulls("turn")
        .select(
            "id",
            part=pl.format(f"{name}.{{}}", "at"),
            role=pl.col("turn").struct.field("role"),
            text=pl.col("turn").struct.field("content"),
        )
        for name in TURNS
    ]
    plain = samples.filter(pl.col("text").is_not_null()).select("id", part=pl.lit("text"), role=pl.lit("text"), text="text")
    return pl.concat([*turns, plain])


def spans_in(verdicts: pl.DataFrame) -> dict[str, dict[str, list[Span]]]:
    """What the last verdict of each filter on each sample wants masked: sample, filter, spans. ReleaseError: it can't be read."""
    told = verdicts.filter(pl.col("detail").str.contains('"mask":', literal=True)).select("sample", "by", "detail")
    # The last verdict counts, even where it masks nothing any more.
    last = verdicts.join(told.select("sample", "by").unique(), on=["sample", "by"], how="semi").unique(["sample", "by"], keep="last")
    found: dict[str, dict[str, list[Span]]] = {}
    for sample, by, detail in last.sort("sample", "by").select("sample", "by", "detail").iter_rows():
        try:
            spans = [Span(str(part), int(start), int(end), str(kind)) for part, start, end, kind in json.loads(detail).get("mask", ())]
        except (TypeError, ValueError) as error:
            raise ReleaseError(
                f"what {by} wants masked in sample {sample} can't be read: {error}",
                next='Its detail must say "mask": [[part, start, end, "KIND"], ...].',
            ) from error
        if spans:
            found.setdefault(sample, {})[by] = spans
    return found


def masked(samples: pl.DataFrame, spans: Mapping[str, Iterable[Span]]) -> pl.DataFrame:
    """`samples` with `[KIND]` for every span, in the same order and with the ids that they had; a loop over the masked rows alone.

    What is masked in the texts is masked in label, axes and meta as well. ReleaseError: a span that is not in its sample.
    """
    hit = samples.filter(pl.col("id").is_in(list(spans)))
    if hit.is_empty():
        return samples
    new = samples_frame(mask(sample, list(spans[sample.id])) for sample in samples_of(hit))
    new = new.with_columns(hit["id"]).select(samples.columns)
    return samples.update(new, on="id", how="left", include_nulls=True)


def mask(sample: Sample, spans: Sequence[Span]) -> Sample:
    """A sample with `[KIND]` in the place of each span; spans that overlap become one, of the kind of the longest."""
    places: dict[tuple[str, int], list[Span]] = {}
    for span in spans:
        for field, turn, begins in (pieces := _pieces(sample, span.part)):
            text = _text(sample, field, turn)
            start, end = max(0, span.start - begins), min(len(text), span.end - begins)
            if start < end:
                places.setdefault((field, turn), []).append(Span(span.part, start, end, span.kind))
        last = pieces[-1] if pieces else None
        if last is None or not 0 <= span.start < span.end <= last[2] + len(_text(sample, *last[:2])):
            raise ReleaseError(
                f"{list(span)} is to be masked in sample {sample.id}, which has no such place",
                next="This is a bug in the filter that said so.",
            )
    changes: dict[str, object] = {}
    raw: dict[str, str] = {}
    for (field, turn), here in places.items():
        text = _text(sample, field, turn)
        for span in reversed(_merged(here)):
            raw[text[span.start : span.end]] = f"[{span.kind}]"
            text = f"{text[: span.start]}[{span.kind}]{text[span.end :]}"
        if field == "text":
            changes["text"] = text
        else:
            changed = changes.get(field)
            turns: list[Message] = list(changed if isinstance(changed, tuple) else getattr(sample, field))
            turns[turn] = turns[turn].model_copy(update={"content": text})
            changes[field] = tuple(turns)
    for field in TURNS:  # the same value elsewhere in the row, where nothing beside it gave it away
        left = changes.get(field, getattr(sample, field))
        assert isinstance(left, tuple)
        changes[field] = tuple(turn.model_copy(update={"content": _replaced(turn.content, raw)}) for turn in left)
    if sample.text is not None:
        changes["text"] = _replaced(str(changes.get("text", sample.text)), raw)
    changes["label"] = None if sample.label is None else _replaced(sample.label, raw)
    changes["meta"] = _hidden(sample.meta, raw)
    changes["provenance"] = sample.provenance.model_copy(update={"axes": _hidden(sample.provenance.axes, raw)})
    return sample.model_copy(update=changes)


def _replaced(text: str, raw: Mapping[str, str]) -> str:
    for secret, instead in sorted(raw.items(), key=lambda pair: -len(pair[0])):  # what holds another first
        if text == secret:
            text = instead
        elif len(secret) >= SHORTEST:
            text = text.replace(secret, instead)
    return text


def _hidden(value: Any, raw: Mapping[str, str]) -> Any:
    """A JSON value with what is masked replaced in all of its texts."""
    if isinstance(value, str):
        return _replaced(value, raw)
    if isinstance(value, list):
        return [_hidden(item, raw) for item in value]
    if isinstance(value, dict):
        return {_replaced(key, raw): _hidden(item, raw) for key, item in value.items()}
    return value


def _escaped(secret: str) -> str:
    return json.dumps(secret, ensure_ascii=False)[1:-1]


def _pieces(sample: Sample, part: str) -> list[tuple[str, int, int]]:
    """The texts that a part is made of: field, turn, and where in the part it begins; none for a part that the sample has not."""
    if part == "output":
        field = "chosen" if sample.chosen else "messages"
        turns = getattr(sample, field)
        return [(field, len(turns) - 1, 0)] if turns and turns[-1].role == "assistant" else []
    if part == "text" or (part == "input" and sample.text is not None):
        return [("text", 0, 0)] if sample.text is not None else []
    if part == "input":
        before = sample.messages[:-1] if sample.kind == "chat" and sample.messages[-1].role == "assistant" else sample.messages
        if len(before) == 1:
            return [("messages", 0, 0)]
        pieces, at = [], 0
        for turn, message in enumerate(before):  # as Sample.input writes them: "role: content", a line each
            at += len(message.role) + 2
            pieces.append(("messages", turn, at))
            at += len(message.content) + 1
        return pieces
    field, _, number = part.partition(".")
    known = field in TURNS and number.isdecimal() and int(number) < len(getattr(sample, field))
    return [(field, int(number), 0)] if known else []


def _text(sample: Sample, field: str, turn: int) -> str:
    content: str = sample.text or "" if field == "text" else getattr(sample, field)[turn].content
    return content


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[tuple[Span, int]] = []  # with the length of the longest that went into it
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        long = span.end - span.start
        if merged and span.start < merged[-1][0].end:
            last, longest = merged[-1]
            kind = span.kind if long > longest else last.kind
            merged[-1] = last._replace(end=max(last.end, span.end), kind=kind), max(long, longest)
        else:
            merged.append((span, long))
    return [span for span, _ in merged]


@dataclass(frozen=True)
class MaskedRun(RunFolder):
    """A run as people outside may see it, for the report of a version.

    Where a filter has looked for what is to be hidden (its details say what it `found`), spans are masked in rejected rows as
    well, and what it was never shown (rows that fell out before it, answers that became no sample) is told without its text.
    """

    @cached_property
    def raw(self) -> RunFolder:
        """The run as it is."""
        return RunFolder(self.path)

    @cached_property
    def spans(self) -> dict[str, dict[str, list[Span]]]:
        """As `spans_in`, of all verdicts."""
        return spans_in(self.raw.verdicts)

    @cached_property
    def looked_into(self) -> pl.Series:
        """The ids of the samples that such a filter has judged; empty: there was none."""
        return self.raw.verdicts.filter(pl.col("detail").str.contains('"found":', literal=True))["sample"].unique()

    @cached_property
    def status(self) -> dict[str, Any]:
        """As in the run; reasons, names of clusters and alarms lose what is masked."""
        told: dict[str, Any] = self.told(self.raw.status)
        return told

    @cached_property
    def samples(self) -> pl.DataFrame:
        """As in the run, masked; of what is hidden nothing is left but a word in `input`."""
        raw = masked(self.raw.samples, all_spans(self.spans))
        if self.looked_into.is_empty():
            return raw
        instead: dict[str, Any] = {"input": HIDDEN, "output": "", "text": None, "axes": "{}", "meta": "{}"} | {turns: [] for turns in TURNS}
        hidden = (pl.col("origin") == "made") & ~pl.col("id").is_in(self.looked_into.implode())
        return raw.with_columns(
            pl.when(hidden).then(pl.lit(value, dtype=SAMPLES[name])).otherwise(name).alias(name) for name, value in instead.items()
        )

    @cached_property
    def verdicts(self) -> pl.DataFrame:
        """As in the run; details lose what is masked, and on hidden samples all but the twin."""
        raw = self.raw.verdicts
        if secrets := self._secrets:
            told = pl.col("detail").str.contains_any([_escaped(secret) for secret in secrets])
            hit = raw.filter(told)["detail"].unique()  # a loop over those: a number of the detail is no text to be masked
            new = [json.dumps(_hidden(json.loads(detail), secrets), ensure_ascii=False) for detail in hit]
            raw = raw.with_columns(pl.col("detail").replace(hit, pl.Series(new, dtype=pl.String)))
            reasons = raw["reason"].drop_nulls().unique()  # a check of the user's own may quote a row
            raw = raw.with_columns(pl.col("reason").replace(reasons, pl.Series([self.told(reason) for reason in reasons], dtype=pl.String)))
        if self.looked_into.is_empty():
            return raw
        made = self.raw.samples.filter(pl.col("origin") == "made")["id"].implode()
        hidden = pl.col("sample").is_in(made) & ~pl.col("sample").is_in(self.looked_into.implode())
        twin = pl.col("detail").str.json_path_match("$.twin")
        bare = pl.when(twin.is_null()).then(pl.lit("{}")).otherwise(pl.struct(twin=twin).struct.json_encode())
        return raw.with_columns(detail=pl.when(hidden).then(bare).otherwise("detail"))

    @cached_property
    def failures(self) -> pl.DataFrame:
        """As in the run; without a word of the answers where a filter has looked for what is to be hidden."""
        raw = self.raw.failures
        return raw if self.looked_into.is_empty() else raw.with_columns(detail=pl.lit(""), text=pl.lit(""))

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """As in the run; reasons by which rows were counted lose what is masked."""
        return [{**stage, **{name: self._counted(stage.get(name, {})) for name in ("rejected", "lost")}} for stage in self.raw.stages]

    def _counted(self, reasons: Mapping[str, int]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for reason, n in reasons.items():
            counts[_replaced(reason, self._secrets)] += n
        return dict(counts)

    def told(self, value: Any) -> Any:
        """A JSON value (a recipe, which may quote a row) as people outside may see it."""
        return _hidden(value, self._secrets)

    @cached_property
    def _secrets(self) -> dict[str, str]:
        """What is masked, and what stands for it."""
        found: dict[str, str] = {}
        spans = all_spans(self.spans)
        for sample in samples_of(self.raw.samples.filter(pl.col("id").is_in(list(spans)))):
            for span in spans[sample.id]:
                for field, turn, begins in _pieces(sample, span.part):
                    secret = _text(sample, field, turn)[max(0, span.start - begins) : max(0, span.end - begins)]
                    if len(secret) >= SHORTEST:
                        found[secret] = f"[{span.kind}]"
        return found


def all_spans(spans: Mapping[str, Mapping[str, Sequence[Span]]]) -> dict[str, list[Span]]:
    """The spans of all filters together, by sample."""
    return {sample: [span for found in by.values() for span in found] for sample, by in spans.items()}


def kinds_of(spans: Mapping[str, Iterable[Span]]) -> dict[str, int]:
    """How many spans there are of each kind, the commonest first."""
    return dict(sorted(Counter(span.kind for found in spans.values() for span in found).items(), key=lambda item: (-item[1], item[0])))
