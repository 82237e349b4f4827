"""The source of every run: real examples in whatever file they come in, and an account of every line that could not be used.

The shape of a row is told by its keys, the first that fits:

| keys | becomes |
| --- | --- |
| `chosen`, `rejected` and `prompt` (texts or lists of turns; without `prompt`, the turns that both share) | a preference |
| `messages` or `conversations`: turns of `role`/`content` or of `from`/`value` (ShareGPT) | chat |
| `instruction`, `output` or `response`, and perhaps `input` (Alpaca) | chat |
| `prompt` (a text or turns) and `completion` or `response` | chat |
| `question`, `answer`; `query`, `response`; `input`, `output` | chat |
| `text` and a label column (`label`, `intent`, `class`, `category`, or the recipe's) | chat: the text, answered by its label |
| `text`, or a bare JSON string, or a line of a .txt file | text |

A `system` text goes in front of the turns. Every other key goes to `meta`, into which a `meta` object is merged.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import polars as pl
from pydantic import Field, model_validator

from factory.errors import GristmillError
from factory.stage import Context, Generator, RecipeFile
from generators.rows import COLUMNS, LABELS, PAIRS, Unreadable, read_file, read_hub
from schemas.canonical import content_hash
from schemas.sample import Failure, Message, Provenance, Role, Sample

ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function"), "tool"),
}
LABEL_WORDS = 6
SHOWN = 500  # characters of a line that a Failure quotes


class Seeds(Generator):
    """Reads the real examples.

    path: a JSONL, JSON, CSV, TSV, Parquet or text file, or a folder written by `datasets` `save_to_disk`.
    dataset: a data set on the hub instead, "org/name", "org/name:config" or either with "@revision"; split: which part of it
    (or of a folder that has parts).
    columns: unusual names, ours to the file's (`{question: frage}`; dots lead into objects).
    label: the class that a labelled task balances over. "auto": the answers, if they are few and short; else a column of
    `LABELS`. "output": the answers. A name ("intent" or "meta.intent"): that column. null: none, and text stays plain text.
    holdout: how many seeds (a whole number) or which share of them no teacher is ever shown, for test.
    limit: read no more than this many usable rows.
    """

    key: ClassVar[str] = "seeds"
    once: ClassVar[bool] = True

    path: Annotated[Path | None, RecipeFile()] = None
    dataset: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    label: str | None = "auto"
    holdout: int | float = Field(0, ge=0)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_place(self) -> Seeds:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("seeds need either `path` (a file or folder) or `dataset` (a name on the hub), and not both")
        if isinstance(self.holdout, float) and self.holdout >= 1:
            raise ValueError("holdout is a share below 1 (0.2) or a whole number of seeds (10)")
        if unknown := self.columns.keys() - COLUMNS:
            raise ValueError(f"columns renames to {', '.join(sorted(unknown))}; known: {', '.join(sorted(COLUMNS))}")
        return self

    def generate(self, samples: pl.DataFrame, ctx: Context) -> Iterator[Sample | Failure]:
        """Yield a Failure for every row that is of no use, then a sample for every other; GristmillError if none is usable."""
        where = str(self.path or self.dataset)
        records = read_file(self.path, self.split) if self.path else read_hub(where, self.split, streaming=self.limit is not None)
        seeds: list[Sample] = []
        failures: list[Failure] = []
        for row in _rows(records, ctx.stage, self.columns, _label_columns(self.label)):
            if isinstance(row, Failure):
                failures.append(row)
                continue
            seeds.append(row)
            ctx.progress(len(seeds))
            if len(seeds) == self.limit:
                break
        if not seeds:
            first = "".join(f"; first, {f.source}: {f.reason} ({f.detail})" for f in failures[:1])
            raise GristmillError(
                f"none of its {len(failures)} rows can be used{first}" if failures else "there are no rows in it",
                where=where,
                next='A row can be {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} or '
                '{"question": "…", "answer": "…"}; name unusual columns under `columns`.',
            )
        seeds = _labelled(seeds, self.label, where)
        ctx.report("labels", dict(Counter(seed.label for seed in seeds if seed.label is not None).most_common()))
        yield from failures
        yield from _set_aside(seeds, self.holdout, where)


def read_rows(
    path: Path, *, split: str = "train", columns: Mapping[str, str] | None = None, stage: str = "seeds"
) -> Iterator[Sample | Failure]:
    """Yield a sample or a Failure for every row of anybody's file, in its order; blank lines are no rows.

    Formats and shapes are those of `Seeds`; labels are not chosen. GristmillError where the file as a whole can't be read.
    """
    return _rows(read_file(path, split), stage, columns or {}, LABELS)


def read_raw(path: Path, *, split: str = "train", stage: str = "rows") -> Iterator[tuple[Any, Sample | Failure]]:
    """As `read_rows`, each with the row as it stands in the file, and repeated rows as samples as well."""
    for source, record in read_file(path, split):
        yield record, _row(source, record, stage, {}, LABELS)


# Labels and the rows set aside: both need all seeds at once.


def _label_columns(label: str | None) -> tuple[str, ...]:
    """The columns that may answer a text: none when labels are not wanted, the recipe's own when it names one."""
    if label is None:
        return ()
    return LABELS if label in ("auto", "output") else (label.removeprefix("meta."),)


def _labelled(seeds: list[Sample], label: str | None, where: str) -> list[Sample]:
    if label is None:
        return seeds
    outputs = [seed.output for seed in seeds]
    if label == "output" or (label == "auto" and _are_labels(outputs)):
        found: list[Any] = [output or None for output in outputs]
    else:
        columns = _label_columns(label)
        found = [next((seed.meta[column] for column in columns if seed.meta.get(column) is not None), None) for seed in seeds]
    if label != "auto" and not any(value is not None for value in found):
        known = sorted({key for seed in seeds for key in seed.meta})
        raise GristmillError(
            f"no row has the label column {label!r}" if label != "output" else "no row has an answer that could be its label",
            where=where,
            next=f"Set `label` to one of: auto, output, null{''.join(f', {key}' for key in known)}.",
        )
    return [seed if value is None else seed.model_copy(update={"label": _name(value)}) for seed, value in zip(seeds, found, strict=True)]


def _are_labels(outputs: list[str]) -> bool:
    """Few and short answers that repeat are classes: every one of at most six words in one line, half as many as rows or fewer."""
    short = all(output and "\n" not in output and len(output.split()) <= LABEL_WORDS for output in outputs)
    return short and len(set(outputs)) <= len(outputs) / 2


def _name(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _set_aside(seeds: list[Sample], holdout: int | float, where: str) -> list[Sample]:
    """Seeds with `holdout` set on the asked number of them: spread over the labels, and the last seed of a label never.

    Within a label the hash of the id decides, so a seed that is added later can move one choice of its label and no other.
    """
    wanted = holdout if isinstance(holdout, int) else int(holdout * len(seeds) + 0.5)
    strata: defaultdict[str | None, list[tuple[str, Sample]]] = defaultdict(list)
    for seed in seeds:
        strata[seed.label].append((content_hash("h1", seed.id), seed))
    # Systematic sampling: the seed at place i of n in its label stands at (i + 1/2) / n, and the lowest places are taken.
    places = [
        ((i + 0.5) / len(rows), key, seed.id) for rows in strata.values() for i, (key, seed) in enumerate(sorted(rows, key=_first)[:-1])
    ]
    if wanted > len(places):
        raise GristmillError(
            f"can't set {wanted} of {len(seeds)} seeds aside: a teacher must be shown at least one of each of {len(strata)} labels",
            where=where,
            next=f"Set `holdout` to {len(places)} or less.",
        )
    aside = {sample for _, _, sample in sorted(places)[:wanted]}
    return [seed.model_copy(update={"holdout": True}) if seed.id in aside else seed for seed in seeds]


def _first(pair: tuple[str, Sample]) -> str:
    return pair[0]


# From records to samples. Here a row at a time is right: rows differ in shape, and each is to be accounted for by its line.


def _rows(
    records: Iterable[tuple[str, Any]], stage: str, columns: Mapping[str, str], label_columns: tuple[str, ...]
) -> Iterator[Sample | Failure]:
    sources: dict[str, str] = {}
    for source, record in records:
        row = _row(source, record, stage, columns, label_columns)
        if isinstance(row, Sample) and (first := sources.setdefault(row.id, source)) != source:
            row = Failure(reason="repeat", detail=f"{source} repeats {first}", text=_shown(record), source=source)
        yield row


def _row(source: str, record: Any, stage: str, columns: Mapping[str, str], label_columns: tuple[str, ...]) -> Sample | Failure:
    try:
        return _sample(record, Provenance(origin="real", generator=stage, source=source), columns, label_columns)
    except _UnusableRow as error:
        return Failure(reason=error.reason, detail=error.detail, text=_shown(record), source=source)


class _UnusableRow(Exception):
    """A row that is no sample; caught in this module, and never raised out of it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def _sample(record: Any, provenance: Provenance, columns: Mapping[str, str], label_columns: tuple[str, ...]) -> Sample:
    if isinstance(record, Unreadable):
        raise _UnusableRow("unreadable line", record.why)
    if not _is_unicode(record):
        raise _UnusableRow("unreadable line", "bytes that are not UTF-8, or half of a surrogate pair")
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, Mapping):
        raise _UnusableRow("unrecognised row", f"a {type(record).__name__}, where an object was expected")
    row = {key: value for key, value in record.items() if value is not None}
    for ours, theirs in columns.items():
        value: Any = record
        for part in theirs.split(".") if theirs not in record else (theirs,):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            row.pop(theirs, None)
            row[ours] = value
    parts, used = _parts(row, label_columns)
    meta = {str(key): value for key, value in row.items() if key not in used}
    inner = meta.pop("meta", {})
    meta |= inner if isinstance(inner, Mapping) else {"meta": inner}
    return Sample.model_validate({**parts, "meta": _plain(meta), "provenance": provenance})


def _parts(row: Mapping[str, Any], label_columns: tuple[str, ...]) -> tuple[dict[str, Any], set[str]]:
    """The content of a sample by its kind, and the keys of the row that it was taken from."""
    system = [Message(role="system", content=row["system"])] if isinstance(row.get("system"), str) and row["system"].strip() else []
    if {"chosen", "rejected"} <= row.keys():
        chosen, rejected = (_turns(row[key], key, "assistant") for key in ("chosen", "rejected"))
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = _turns(row["prompt"], "prompt", "user") if "prompt" in row else chosen[:shared]
        if not prompt:
            raise _UnusableRow("unrecognised row", "chosen and rejected without a prompt, and with no first turns in common")
        if chosen == rejected:
            raise _UnusableRow("no preference", "chosen and rejected are the same")
        return {"messages": system + prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}, {
            "prompt",
            "chosen",
            "rejected",
            "system",
        }
    for key in ("messages", "conversations"):
        if key in row:
            return {"messages": system + _turns(row[key], key, None)}, {key, "system"}
    for ask, answer in PAIRS:
        if {ask, answer} <= row.keys():
            asked, used = _turns(row[ask], ask, "user"), {ask, answer, "system"}
            if ask == "instruction" and isinstance(row.get("input", ""), str):
                used.add("input")
                if row.get("input", "").strip():
                    asked = [Message(role="user", content=f"{asked[0].content}\n\n{row['input']}")]
            return {"messages": system + asked + _turns(row[answer], answer, "assistant")}, used
    if isinstance(row.get("text"), str):
        label = next((column for column in label_columns if column in row), None)
        if not row["text"].strip():
            raise _UnusableRow("empty", "its text has no words")
        if label is None:
            return {"text": row["text"]}, {"text"}
        # The label column stays in meta: where the answers are too varied for `auto` to take them for classes, it says so.
        classed = _turns(_name(row[label]), label, "assistant")
        return {"messages": [*system, Message(role="user", content=row["text"]), *classed]}, {"text", "system"}
    raise _UnusableRow("unrecognised row", f"its keys are {', '.join(map(str, row)) or 'none'}")


def _turns(value: Any, key: str, role: Role | None) -> list[Message]:
    """The turns under one key: a list of them, also as JSON in a string; or, with `role`, a text that is one such turn."""
    if isinstance(value, str) and role is None:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _UnusableRow("unrecognised row", f"{key} is a text and not a list of turns") from error
    if isinstance(value, str) and role is not None:
        value = [{"role": role, "content": value}]
    if not isinstance(value, list | tuple):
        raise _UnusableRow("unrecognised row", f"{key} is a {type(value).__name__}")
    turns = [_turn(turn, f"turn {i} of {key}") for i, turn in enumerate(value, 1)]
    turns = [turn for turn in turns if turn.content.strip() or turn.role != "system"]  # ShareGPT has empty system turns
    if not turns or not all(turn.content.strip() for turn in turns):
        raise _UnusableRow("empty", f"{key} has a turn without words" if turns else f"{key} has no turns")
    return turns


def _turn(turn: Any, name: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _UnusableRow("unrecognised row", f"{name} is a {type(turn).__name__}")
    said = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise _UnusableRow("unrecognised row", f"{name} calls a tool, which a sample can't hold")
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        content = "\n".join(part["text"] for part in content)  # OpenAI's content parts
    if not isinstance(said, str) or said.lower() not in ROLES:
        raise _UnusableRow("unrecognised row", f"{name} has the role {said!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _UnusableRow("unrecognised row", f"the content of {name} is a {type(content).__name__}")
    return Message(role=ROLES[said.lower()], content=content)


def _plain(value: Any) -> Any:
    """A value that JSON can hold: no NaN or infinity (null), dates and the like as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _is_unicode(record: Any) -> bool:
    """Whether it can be written as UTF-8; Python lets lone surrogates, and bytes read as such, live in its strings."""
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(record: Any) -> str:
    if isinstance(record, Unreadable):
        record = record.text
    text = record if isinstance(record, str) else json.dumps(record, ensure_ascii=False, default=str)
    return text[:SHOWN].encode("utf-8", "replace").decode()
