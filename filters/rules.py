"""What can be said against a sample without asking a model: the checks that cost nothing, so they come first.

What is counted in texts (`filters/measures.py`), their languages, formats and patterns come for a whole batch at once, so a rule is a
comparison of arrays. The first rule that a sample breaks, in the order of `NAMES`, is its verdict's reason.

The seeds outrank the rules. Lengths, language, labels, and how much an answer may repeat of its question are taken from them, and
what a rule of form (`data/form.yaml`, and the measures of letters, repetition, Markdown and turns) forbids but real rows do as well is
allowed, and is reported under `off`: a task may have answers in Markdown, or questions that hold placeholders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from factory.errors import GristmillError
from factory.stage import Context, Filter, RecipeFile
from factory.store import verdicts_from
from filters import formats, markdown, measures
from filters.language import codes, languages

Name = Literal[
    "empty",
    "roles",
    "control characters",
    "encoding",
    "too short",
    "too long",
    "refusal",
    "boilerplate",
    "scaffolding",
    "placeholder",
    "markup",
    "url",
    "unbalanced",
    "unfinished",
    "markdown",
    "few letters",
    "language",
    "repetition",
    "copied",
    "echo",
    "system prompt",
    "unknown label",
    "no preference",
    "format",
    "schema",
    "tool call",
    "required",
    "forbidden",
]
NAMES: tuple[Name, ...] = get_args(Name)
Part = Literal["input", "output", "other", "row"]
Flags = NDArray[np.bool_]

PARTS: tuple[Part, ...] = ("input", "output")
BLOCK = 4096  # rows that a thread works at at a time; what is measured of them is let go before the next
TOLERANCE = 0.02  # the share of seeds that may break a rule of form before it is off
FEW_LETTERS = 0.5  # of the characters that are no space
RUN_OF_LETTERS, RUN_OF_ANY = 4, 100  # the same letter, "!" or "?" so often in a row; any other character but spaces
RUN_OF_WORDS = 5  # the same word so often in a row
LAST_LINE = 3  # characters with which the last line of nearly every seed's answer begins, that make it a form: "#### "
# What of such a beginning is form: up to a colon, marks of Markdown, or a tag. `return x +` and the 0. of `Confidence: 0.` are content.
_FORM = re.compile(r".*[:：]\**|[#*=>`|~_-]+|<[^<>]+>")
ECHO, SYSTEM_WORDS = (
    0.9,
    12,
)  # how much of an answer may stand in its question, and words in a row of its system prompt, if the seeds' do not more
PROSE, MANY = 20, 10  # words of an answer that should end with a sign, where so many seeds of that length all do
# The language is unwanted where the wanted ones' probability is below UNWANTED, and another's at least SURE. An answer may be
# a list of names or code, which is like no language: there, nearly certain.
UNWANTED, SURE, VERY_SURE = 0.05, 0.25, 0.95
LONG, GLANCE = 500, 100  # characters: a text from where on it is not read whole, and how much is read in three places
_TURNS = r"^s?(?:ua(?:t+a)*)*(?:u|ua(?:t+a)*t+)?$"  # roles by their first letters; a conversation may be given up to any turn
_PROMPT = r"^s?(?:ua(?:t+a)*)*(?:u|ua(?:t+a)*t+)$"  # what a preference answers


class Bounds(BaseModel):
    """What the user demands of a text: sizes, a format, and patterns (of Rust's `regex`) that must or must not be found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_chars: int | None = Field(None, ge=0)
    max_chars: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0, description="of the tokenizer that `tokenizer` or `tokenizer_file` names")
    max_tokens: int | None = Field(None, ge=1, description="as above")
    format: formats.Format | None = Field(None, description="json, yaml or xml; in one code fence only where the seeds have one")
    schema_file: Annotated[Path | None, RecipeFile()] = Field(None, description="a JSON schema (.json, .yaml) that JSON or YAML must fit")
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)

    @field_validator("schema_file")
    @classmethod
    def _schema(cls, path: Path | None) -> Path | None:
        return _schema(path)

    @model_validator(mode="after")
    def _readable(self) -> Bounds:
        _has_schema(self.format, self.schema_file)
        return self


class Rules(Filter):
    """Rejects what is broken in form, in the wrong language, copied from a seed, or left over from the prompt.

    min_words … forbid: demands on the input; `output`: the same on the output.
    tokenizer_file, tokenizer: whose tokens min_tokens, max_tokens and total_tokens count: a tokenizer.json or a folder with one, whose
    bytes are part of the run's identity; or a model in Hugging Face's cache, by its name. Not both.
    length: how many times shorter than the shortest seed, or longer than the longest, a text may be (in characters).
    language: "auto", the languages of the seeds; or a list of ISO 639-1 codes. A text too short to tell is let through.
    copied: how much of an input may stand in one seed, or of a seed in it: from there on it is a copy. echo: how much of an output
    may stand in its own input ("auto": 0.9, or half way from the most that a seed's does to all). repeated: which share of a text's word
    trigrams may be repeats.
    tools_file: tools that may be called, a JSON list as the OpenAI API takes it; a sample's own stand in its meta, as `tools`.
    off: rules that are not to hold, by their names. length, language, copied, echo and repeated can be null as well.
    """

    key: ClassVar[str] = "rules"

    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_chars: int | None = Field(None, ge=0)
    max_chars: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    format: formats.Format | None = None
    schema_file: Annotated[Path | None, RecipeFile()] = None
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    output: Bounds = Field(default_factory=Bounds)
    tokenizer_file: Annotated[Path | None, RecipeFile()] = Field(None, description="a tokenizer.json, or a folder with one")
    tokenizer: str | None = Field(None, description="or the name of a model in Hugging Face's cache")
    total_tokens: int | None = Field(None, ge=1, description="the most tokens that all turns of a row may have")
    length: float | None = Field(4.0, ge=1)
    language: Literal["auto"] | tuple[str, ...] | None = "auto"
    copied: float | None = Field(0.9, gt=0, le=1)
    echo: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] | None = "auto"
    repeated: float | None = Field(0.4, gt=0, lt=1)
    tools_file: Annotated[Path | None, RecipeFile()] = Field(None, description="a JSON list of tools, as the OpenAI API takes it")
    off: tuple[Name, ...] = ()

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)

    @field_validator("schema_file")
    @classmethod
    def _schema(cls, path: Path | None) -> Path | None:
        return _schema(path)

    @field_validator("language")
    @classmethod
    def _codes(cls, language: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if isinstance(language, tuple) and (unknown := sorted(set(language) - codes())):
            raise ValueError(f"no language has the code {', '.join(unknown)}; codes are those of ISO 639-1, like en, de, zh")
        return language

    @field_validator("tokenizer")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None:
            formats.tokenizer(name)
        return name

    @field_validator("tokenizer_file")
    @classmethod
    def _tokenizer(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        path = path / "tokenizer.json" if path.is_dir() else path  # of a model's folder, its weights need not be hashed
        formats.tokenizer(path)
        return path

    @field_validator("tools_file")
    @classmethod
    def _tools(cls, path: Path | None) -> Path | None:
        if path is not None:
            _told(formats.read_tools, path)
        return path

    @model_validator(mode="after")
    def _readable(self) -> Rules:
        _has_schema(self.format, self.schema_file)
        if self.tokenizer is not None and self.tokenizer_file is not None:
            raise ValueError("two tokenizers: leave out tokenizer, or tokenizer_file")
        if (self.tokenizer_file or self.tokenizer) is None and any(
            limit is not None
            for limit in (self.min_tokens, self.max_tokens, self.output.min_tokens, self.output.max_tokens, self.total_tokens)
        ):
            raise ValueError("tokens of which model? Name its tokenizer: tokenizer_file, or the model's name as tokenizer")
        return self

    def check(self, samples: pl.DataFrame) -> str | None:
        """A format that most seeds are not in, before any teacher is paid for rows like them."""
        task = _learn(self, _Key.of(samples))
        for check in task.checks:
            if check.rule in ("format", "schema") and len(samples):
                broken = check.broken(task.seeds)
                if broken.sum() > len(samples) / 2:
                    what = check.what(task.seeds)[int(broken.argmax())] if callable(check.what) else None
                    wanted = "its schema" if check.rule == "schema" else (self if check.part == "input" else self.output).format
                    return (
                        f"{broken.sum()} of {len(samples)} seeds' {check.part}s are not as {wanted or 'json'} asks, the first: {what};"
                        f" mend the seeds, or what `rules` asks of the {check.part}"
                    )
        return None

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """Verdicts whose score is the measure that broke its limit, where the rule has one.

        detail: rule, part ("input", "output", "other": the answer that was not chosen, "row"), value and limit of a rejected sample,
        `what` was wrong where a rule tells, and of every one its `words`, `copied` and `repeated`, and `echo` where it has an output
        of some length, so that these limits can be moved later. Blocks of rows run beside each other.
        """
        task = _learn(self, _Key.of(ctx.seeds))
        ctx.report("off", list(task.off))
        starts = range(0, max(len(samples), 1), BLOCK)

        def judged(start: int) -> pl.DataFrame:
            return _verdicts(_Block(samples[start : start + BLOCK], task.find, self), task.checks)

        if len(starts) == 1:
            return judged(0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return pl.concat(list(pool.map(judged, starts)))


# -- what the seeds teach ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Check:
    """One rule about one part: which rows of a block break it, what was measured of them, against which limit, and what is wrong."""

    rule: Name
    part: Part
    broken: Callable[[_Block], Flags]
    value: Callable[[_Block], NDArray[Any]] | None = None
    limit: float | None = None
    what: str | Callable[[_Block], Sequence[str | None]] | None = None


@dataclass(frozen=True, eq=False)
class _Task:
    """The checks that hold for samples like the seeds, in the order of their rules, and what the seeds have switched off."""

    seeds: _Block
    checks: tuple[_Check, ...]
    off: tuple[str, ...]
    find: Any


@dataclass(frozen=True)
class _Key:
    """Seeds by what is judged of them, so that a task is learned from them once and not for each batch."""

    names: tuple[tuple[str, str | None], ...]
    frame: pl.DataFrame = field(compare=False)

    @classmethod
    def of(cls, seeds: pl.DataFrame) -> _Key:
        return cls(tuple(seeds.select("id", "label").iter_rows()), seeds)


@lru_cache(maxsize=8)
def _learn(rules: Rules, key: _Key) -> _Task:
    seeds = _Block(key.frame, _form().find, rules)
    off: list[str] = []

    def holds(check: _Check, what: str) -> bool:
        broken = bool(check.broken(seeds).sum() > TOLERANCE * len(seeds))
        if broken:
            off.append(f"{check.rule} ({check.part}): {what}")
        return not broken

    parts = PARTS[:1] if seeds.labels_alone else PARTS
    checks = [*_own_checks(rules, seeds)]
    for part in parts:
        for rule, patterns in _form().patterns[part].items():
            wanted = [pattern for pattern in patterns if rule not in rules.off and holds(_found(rule, part, (pattern,)), pattern.find)]
            if wanted:
                checks.append(_found(rule, part, tuple(wanted)))
        checks += [check for check in _measured(rules, part) if check.rule not in rules.off and holds(check, str(check.what or "measured"))]
        checks += _language(rules, part, seeds)
    if "output" in parts:
        checks += _closed(seeds)
        checks += [check for check in _last_lines(seeds) if holds(check, str(check.what))]
        checks += _echoes(rules, seeds)
    checks += [check for check in _of_turns() if holds(check, str(check.what))]
    kept = sorted((check for check in checks if check.rule not in rules.off), key=lambda check: NAMES.index(check.rule))
    return _Task(seeds, tuple(kept), tuple(off), _form().find)


def _own_checks(rules: Rules, seeds: _Block) -> Iterator[_Check]:
    """What the recipe demands, and the measures that it takes from the seeds."""
    yield _Check("empty", "input", lambda rows: rows.counts("input")[:, measures.MEANT] == 0)
    yield _Check("empty", "output", lambda rows: rows.has_other & (rows.counts("other")[:, measures.VISIBLE] == 0))
    yield _Check(
        "no preference", "output", lambda rows: rows.has_other & (rows.texts["other"] == rows.texts["output"]).fill_null(False).to_numpy()
    )
    if len(seeds) and (seeds.texts["output"] != "").all():
        yield _Check("empty", "output", lambda rows: rows.counts("output")[:, measures.VISIBLE] == 0)
    yield from _demands("input", Bounds(**{name: getattr(rules, name) for name in Bounds.model_fields}), seeds)
    yield from _demands("output", rules.output, seeds)
    if rules.total_tokens is not None:
        yield _above("too long", "row", lambda rows: rows.total_tokens, rules.total_tokens, what="tokens")
    if rules.copied is not None and len(seeds):
        yield _above("copied", "input", lambda rows: rows.copied(seeds), rules.copied, closed=True)
    labels = seeds.texts["label"].drop_nulls().unique()
    if len(labels):
        named = labels.implode()
        yield _Check(
            "unknown label",
            "output",
            lambda rows: rows.texts.select(pl.col("label").is_not_null() & ~pl.col("label").is_in(named)).to_series().to_numpy(),
        )
        if seeds.labels_alone:
            yield _Check("unknown label", "output", lambda rows: ~rows.texts["output"].is_in(named).to_numpy())
    if rules.length is not None and len(seeds):
        for part in PARTS:
            chars = seeds.counts(part)[:, measures.CHARS]
            yield _below("too short", part, _counted(part, measures.CHARS), int(chars.min()) / rules.length)
            yield _above("too long", part, _counted(part, measures.CHARS), int(chars.max()) * rules.length)
    yield _Check("tool call", "output", lambda rows: rows.broken_calls, what=lambda rows: rows.call_faults)


def _demands(part: Part, bounds: Bounds, seeds: _Block) -> Iterator[_Check]:
    tokens = lambda rows: rows.tokens(part)  # noqa: E731
    sizes = (
        (_counted(part, measures.WORDS), bounds.min_words, bounds.max_words, None),
        (_counted(part, measures.CHARS), bounds.min_chars, bounds.max_chars, None),
        (tokens, bounds.min_tokens, bounds.max_tokens, "tokens"),
    )
    for size, least, most, unit in sizes:
        if least is not None:
            yield _below("too short", part, size, least, what=unit)
        if most is not None:
            yield _above("too long", part, size, most, what=unit)
    if bounds.format is not None or bounds.schema_file is not None:
        fenced = bool(formats.is_fenced(seeds.texts[part]).sum() > TOLERANCE * len(seeds))
        of_schema: dict[Name, bool] = {"format": False, "schema": True}
        for rule, is_schema in of_schema.items():
            yield _Check(
                rule,
                part,
                lambda rows, is_schema=is_schema: rows.misformed(part, bounds, fenced, is_schema),  # type: ignore[misc]
                what=lambda rows: [None if fault is None else fault.what for fault in rows.format_faults(part, bounds, fenced)],
            )
    for pattern in bounds.require:
        yield _Check("required", part, lambda rows, pattern=pattern: ~rows.texts[part].str.contains(pattern).to_numpy())  # type: ignore[misc]
    for pattern in bounds.forbid:
        yield _Check("forbidden", part, lambda rows, pattern=pattern: rows.texts[part].str.contains(pattern).to_numpy())  # type: ignore[misc]


def _measured(rules: Rules, part: Part) -> Iterator[_Check]:
    """Rules of form that are counted. What the seeds break as well does not hold."""
    yield _Check("control characters", part, lambda rows: rows.counts(part)[:, measures.CONTROLS] > 0)
    yield _above("repetition", part, _counted(part, measures.LINES), 1)
    yield _above("repetition", part, _counted(part, measures.RUN_OF_LETTERS), RUN_OF_LETTERS)
    yield _above("repetition", part, _counted(part, measures.RUN_OF_ANY), RUN_OF_ANY)
    yield _above("repetition", part, _counted(part, measures.RUN_OF_WORDS), RUN_OF_WORDS, what="the same word again and again")
    if rules.repeated is not None:
        yield _above("repetition", part, lambda rows: rows.measured(part).repeated, rules.repeated)
    if part == "input":
        yield _below("few letters", part, lambda rows: rows.letters(part), FEW_LETTERS)
    yield _Check("unfinished", part, lambda rows: rows.counts(part)[:, measures.OPEN] > 0, what="a bracket is not closed")
    for number, fault in enumerate(markdown.FAULTS):
        if fault:
            rule: Name = "unfinished" if number == markdown.FENCE else "markdown"
            yield _Check(rule, part, lambda rows, number=number: rows.counts(part)[:, measures.MARKDOWN] == number, what=fault)  # type: ignore[misc]


def _of_turns() -> Iterator[_Check]:
    yield _Check("roles", "row", lambda rows: ~rows.orderly, what="the order of the turns")
    yield _Check("roles", "row", lambda rows: rows.texts["blank_turn"].to_numpy(), what="an empty turn")


def _closed(seeds: _Block) -> Iterator[_Check]:
    """Answers of some length end with a full stop or the like, where the seeds' do; so do texts."""
    part: Part = "input" if len(seeds) and (seeds.texts["kind"] == "text").all() else "output"

    def long(rows: _Block) -> Flags:
        return rows.counts(part)[:, measures.WORDS] >= PROSE

    def open_end(rows: _Block) -> Flags:
        return long(rows) & (rows.counts(part)[:, measures.CLOSED] == 0)  # type: ignore[no-any-return]

    many = int(long(seeds).sum())
    if many >= MANY and open_end(seeds).sum() <= TOLERANCE * many:
        yield _Check("unfinished", part, open_end, what="it does not end with a full stop or the like, as seeds of this length do")


def _last_lines(seeds: _Block) -> Iterator[_Check]:
    """Answers of several lines end with a line that begins as the seeds' do: what stands before a result, as in GSM8K."""

    def last(rows: _Block) -> pl.Series:
        return rows.texts["output"].str.strip_chars().str.split("\n").list.last().str.strip_chars()

    several = seeds.texts.filter(pl.col("output").str.strip_chars().str.contains("\n", literal=True))
    if several.height < max(MANY, (1 - TOLERANCE) * len(seeds)):
        return
    lines = sorted(last(seeds).to_list())
    few = int(TOLERANCE * len(lines))  # others may stand before or behind those that begin alike
    begins = max((_shared(lines[at], lines[at + len(lines) - few - 1]) for at in range(few + 1)), key=len)
    begins = form[0] if (form := _FORM.match(begins)) else ""
    if len(begins) >= LAST_LINE:
        what = f"its last line does not begin with {begins!r}, as the seeds' do"
        yield _Check("unfinished", "output", lambda rows: ~last(rows).str.starts_with(begins).to_numpy(), what=what)


def _shared(one: str, other: str) -> str:
    """What two texts begin with alike."""
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _echoes(rules: Rules, seeds: _Block) -> Iterator[_Check]:
    """How much an answer may repeat of its question, and of the instructions that stood before it."""
    shares, runs = seeds.echoes
    most = _most(shares[~np.isnan(shares)])
    limit = max(ECHO, (1 + (most or 0.0)) / 2) if rules.echo == "auto" else rules.echo
    if limit is not None and (limit < 1 or rules.echo != "auto"):
        yield _above("echo", "output", lambda rows: rows.echoes[0], limit, closed=True)
    most = _most(runs)
    yield _above("system prompt", "output", lambda rows: rows.echoes[1], max(SYSTEM_WORDS, 1.5 * (most or 0)))


def _most(values: NDArray[Any]) -> float | None:
    """The largest value but for the few that are tolerated."""
    return float(np.sort(values)[-1 - int(TOLERANCE * len(values))]) if len(values) else None


def _language(rules: Rules, part: Part, seeds: _Block) -> Iterator[_Check]:
    if rules.language is None or "language" in rules.off:
        return
    wanted = list(rules.language)
    if rules.language == "auto":
        said = languages(seeds.texts[part]).filter(pl.col("probability") >= 0.8)["language"].value_counts()
        wanted = said.filter(pl.col("count") > TOLERANCE * len(seeds))["language"].to_list()
    if wanted:
        sure = SURE if part == "input" else VERY_SURE
        yield _below("language", part, lambda rows: rows.in_language(part, tuple(sorted(wanted)), sure), UNWANTED)


def _counted(part: Part, column: int) -> Callable[[_Block], NDArray[Any]]:
    return lambda rows: rows.counts(part)[:, column]


def _below(rule: Name, part: Part, value: Callable[[_Block], NDArray[Any]], limit: float, *, what: str | None = None) -> _Check:
    return _Check(rule, part, lambda rows: value(rows) < limit, value, limit, what)


def _above(
    rule: Name, part: Part, value: Callable[[_Block], NDArray[Any]], limit: float, *, closed: bool = False, what: str | None = None
) -> _Check:
    return _Check(rule, part, lambda rows: value(rows) >= limit if closed else value(rows) > limit, value, limit, what)


# -- patterns ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A regular expression that must not be found, and what a text must have for it to be searched: bits of what `measures` saw in it."""

    find: str
    words: int = 0  # one of these words
    seen: int = 0  # one of these characters, below 64
    seen_too: int = 0  # or these


@dataclass(frozen=True, eq=False)
class Form:
    """`filters/data/form.yaml`: patterns by part and rule, and the table of the words that they need."""

    patterns: dict[Part, dict[Name, list[Pattern]]]
    find: tuple[NDArray[np.uint64], NDArray[np.int64]]


@cache
def _form() -> Form:
    form = yaml.safe_load((Path(__file__).parent / "data" / "form.yaml").read_text(encoding="utf-8"))
    entries = [entry for parts in form.values() for listed in parts.values() for entry in listed if isinstance(entry, dict)]
    words = sorted({word for entry in entries for word in entry.get("words", ())})
    patterns: dict[Part, dict[Name, list[Pattern]]] = {
        part: {rule: [_pattern(entry, words) for entry in parts.get("both", []) + parts.get(part, [])] for rule, parts in form.items()}
        for part in PARTS
    }
    return Form(patterns, measures.words_to_find(words))


def _pattern(entry: str | dict[str, Any], words: list[str]) -> Pattern:
    if isinstance(entry, str):
        return Pattern(entry)
    seen, seen_too = 0, 0
    for character in entry.get("chars", ""):
        code = ord(character)
        if code < 64:
            seen |= 1 << code
        else:
            seen_too |= 1 << min(code - 64, measures.BEYOND_ASCII)
    return Pattern(entry["find"], sum(1 << words.index(word) for word in entry.get("words", ())), seen, _signed(seen_too))


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _found(rule: Name, part: Part, patterns: tuple[Pattern, ...]) -> _Check:
    return _Check(rule, part, lambda rows: rows.found(part, patterns))


def _compiled(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            pl.Series([""]).str.contains(pattern)
        except pl.exceptions.ComputeError as error:
            raise ValueError(f"{pattern!r} is not a pattern of Rust's regex (no lookaround, no backreferences): {error}") from error
    return patterns


def _schema(path: Path | None) -> Path | None:
    if path is not None:
        _told(formats.validator, path)
    return path


def _has_schema(format: formats.Format | None, schema_file: Path | None) -> None:
    if format == "xml" and schema_file is not None:
        raise ValueError("a JSON schema says nothing of XML: leave out schema_file, or format")


def _told(read: Callable[[Path], Any], path: Path) -> None:
    """Read a file of the recipe, so that it is known to be sound before anything is asked."""
    try:
        read(path)
    except GristmillError as error:
        raise ValueError(f"{error.what} ({path})") from error


# -- a block of rows ---------------------------------------------------------------------------------------------------------


class _Block:
    """Rows that are judged together, and what is measured of them: once, and only where a check asks."""

    def __init__(self, samples: pl.DataFrame, find: Any, rules: Rules) -> None:
        self.texts, self.find, self.rules = _texts(samples), find, rules
        self.samples = samples
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def labels_alone(self) -> bool:
        """Whether every answer is its label."""
        labels, outputs = self.texts["label"], self.texts["output"]
        return len(self) > 0 and bool((labels.is_not_null() & (labels == outputs)).all())

    @cached_property
    def has_other(self) -> Flags:
        return self.texts["other"].is_not_null().to_numpy()

    def packed(self, column: str) -> Any:
        return self._once(("packed", column), lambda: measures.packed(self.texts[column]))

    def measured(self, part: Part) -> measures.Measured:
        return self._once(("measured", part), lambda: measures.measure(self.packed(part), self.find))  # type: ignore[no-any-return]

    def counts(self, part: Part) -> NDArray[np.int64]:
        return self.measured(part).counts

    def letters(self, part: Part) -> NDArray[np.float64]:
        """Which share of the characters that are no space are letters; NaN where there are none."""
        counts = self.counts(part)
        visible = counts[:, measures.VISIBLE].astype(np.float64)
        visible[visible == 0] = np.nan
        return counts[:, measures.LETTERS] / visible

    def copied(self, seeds: _Block) -> NDArray[np.float64]:
        index = seeds._once("index", lambda: measures.index(seeds.packed("input")))
        return self._once("copied", lambda: measures.copied(self.packed("input"), index))  # type: ignore[no-any-return]

    @cached_property
    def echoes(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        return measures.echoed(self.packed("output"), self.packed("input"), self.packed("system"))

    def in_language(self, part: Part, wanted: tuple[str, ...], sure: float) -> NDArray[np.float64]:
        """The probability of being in a wanted language; NaN where no language is likely enough.

        A long text is read at its start, middle and end first: where each is rather in a wanted language than not, NaN as well.
        """

        def probabilities() -> NDArray[np.float64]:
            texts, chars = self.texts[part], self.counts(part)[:, measures.CHARS]
            asked = np.ones(len(self), np.bool_)
            asked[long := np.flatnonzero(chars > LONG)] = False
            if len(long):
                these, n = texts.gather(long), len(long)
                middle = pl.Series(chars[long] // 2 - GLANCE // 2)
                ends = pl.concat([these.str.head(GLANCE), these.str.slice(middle, GLANCE), these.str.tail(GLANCE)])
                sure_of = languages(ends, wanted)["wanted"].to_numpy().reshape(3, n).min(axis=0) >= 0.5
                asked[long[~sure_of]] = True
            found = languages(texts.filter(asked), wanted)
            value = np.full(len(self), np.nan)
            value[asked] = np.where(found["probability"].to_numpy() >= sure, found["wanted"].to_numpy(), np.nan)
            return value

        return self._once(("language", part), probabilities)  # type: ignore[no-any-return]

    def found(self, part: Part, patterns: tuple[Pattern, ...]) -> Flags:
        """In which texts one of the patterns is found."""
        counts = self.counts(part)
        found = np.zeros(len(self), np.bool_)
        for pattern in patterns:
            asked = ~found
            if pattern.words:
                asked &= (counts[:, measures.FOUND] & pattern.words) != 0
            if pattern.seen or pattern.seen_too:
                asked &= ((counts[:, measures.SEEN] & pattern.seen) | (counts[:, measures.SEEN_TOO] & pattern.seen_too)) != 0
            rows = np.flatnonzero(asked)
            if len(rows):
                texts = self.texts[part] if len(rows) == len(self) else self.texts[part].gather(rows)
                found[rows] = texts.str.contains(f"(?i){pattern.find}").to_numpy()
        return found

    def tokens(self, part: Part) -> NDArray[np.int64]:
        return self._once(("tokens", part), lambda: self._token_counts(self.texts[part]))  # type: ignore[no-any-return]

    def _token_counts(self, texts: pl.Series) -> NDArray[np.int64]:
        where = self.rules.tokenizer_file or self.rules.tokenizer
        assert where is not None
        return formats.token_counts(texts, where)  # type: ignore[no-any-return]

    @cached_property
    def total_tokens(self) -> NDArray[np.int64]:
        """The tokens of all turns of a row, of a preference's both answers, or of its text."""
        turns = pl.concat_list(
            *[pl.col(name).list.eval(pl.element().struct.field("content")).fill_null([]) for name in ("messages", "chosen", "rejected")],
            pl.concat_list("text").list.drop_nulls(),
        )
        said = self.samples.with_row_index("row").select("row", said=turns).explode("said")
        counts = self._token_counts(said["said"])
        return np.bincount(said["row"].to_numpy(), counts, len(self)).astype(np.int64)

    def format_faults(self, part: Part, bounds: Bounds, fenced: bool) -> list[formats.Fault | None]:
        def found() -> list[formats.Fault | None]:
            schema = None if bounds.schema_file is None else formats.validator(bounds.schema_file)
            return formats.faults(self.texts[part], bounds.format or "json", fenced=fenced, schema=schema)

        return self._once(("format", part), found)  # type: ignore[no-any-return]

    def misformed(self, part: Part, bounds: Bounds, fenced: bool, of_schema: bool) -> Flags:
        faults = self.format_faults(part, bounds, fenced)
        return np.fromiter((fault is not None and fault.of_schema == of_schema for fault in faults), np.bool_, len(faults))

    @cached_property
    def orderly(self) -> Flags:
        """Whether turns are in order: instructions first, then user and assistant by turns, tools after an assistant."""
        turns, kinds = self.texts["turns"], self.texts["kind"]
        proper = pl.DataFrame({"turns": turns, "kind": kinds}).select(
            pl.when(pl.col("kind") == "chat")
            .then(pl.col("turns").str.contains(_TURNS))
            .when(pl.col("kind") == "preference")
            .then(pl.col("turns").str.contains(_PROMPT) & pl.lit(True))
            .otherwise(True)
        )
        return proper.to_series().to_numpy()

    @cached_property
    def call_faults(self) -> list[str | None]:
        """What is wrong with the calls of tools in each row; only rows that may hold some take a loop."""
        found: list[str | None] = [None] * len(self)
        common = None if self.rules.tools_file is None else formats.read_tools(self.rules.tools_file)
        assistant = pl.element().struct.field("role") == "assistant"
        content = pl.element().struct.field("content")
        calls = assistant & content.str.contains_any(formats.SIGNS)
        asked = self.samples.with_row_index("row").filter(
            pl.col("messages").list.eval(calls).list.any() | pl.col("chosen").list.eval(calls).list.any()
        )
        for row, turns, chosen, meta in asked.select("row", "messages", "chosen", "meta").iter_rows():
            tools, trouble = _tools_of(meta, common)
            for turn in (*turns, *chosen):
                if turn["role"] == "assistant" and found[row] is None:
                    found[row] = formats.call_fault(turn["content"], tools)
                    if trouble and found[row] is None and formats.OPENING in turn["content"]:
                        found[row] = trouble
        return found

    @cached_property
    def broken_calls(self) -> Flags:
        return np.fromiter((fault is not None for fault in self.call_faults), np.bool_, len(self))


def _tools_of(meta: str, common: formats.Tools | None) -> tuple[formats.Tools | None, str | None]:
    """The tools of a row: its own, else those of the recipe; and what is wrong with its own."""
    if '"tools"' not in meta:
        return common, None
    import json

    try:
        own = json.loads(meta).get("tools")
        return (common, None) if own is None else (formats.tools_of(json.dumps(own)), None)
    except (ValueError, RecursionError) as error:
        return common, f"meta.tools is no list of tools: {error}"


def _texts(samples: pl.DataFrame) -> pl.DataFrame:
    """The texts to be judged.

    input: the user's turns (a text sample: the text), not the roles and the system prompt around them; other: the answer of
    a preference that was not chosen, else null; system: the instructions; turns: the roles by their first letters.
    """
    role, content = pl.element().struct.field("role"), pl.element().struct.field("content")
    messages = pl.col("messages")

    def said(by: str) -> pl.Expr:
        return messages.list.eval(content.filter(role == by)).list.join("\n")

    every = pl.concat_list("messages", "chosen", "rejected")
    return samples.select(
        "id",
        "label",
        "kind",
        "output",
        other=pl.when(pl.col("kind") == "preference").then(pl.col("rejected").list.last().struct.field("content")),
        input=pl.coalesce("text", said("user")),
        system=said("system"),
        turns=messages.list.eval(role.str.slice(0, 1)).list.join(""),
        blank_turn=every.list.eval(content.str.strip_chars() == "").list.any().fill_null(False),
    )


def _verdicts(rows: _Block, checks: tuple[_Check, ...]) -> pl.DataFrame:
    n = len(rows)
    first, value = np.full(n, -1, np.int64), np.full(n, np.nan)
    what: list[str | None] = [None] * n
    for number, check in enumerate(checks):
        broken = np.flatnonzero(check.broken(rows) & (first < 0))
        if not len(broken):
            continue
        first[broken] = number
        if check.value is not None:
            value[broken] = check.value(rows)[broken]
        if check.what is not None:
            words = check.what if isinstance(check.what, str) else check.what(rows)
            for row in broken.tolist():
                what[row] = words if isinstance(words, str) else words[row]
    rule, part, limit = (
        pl.Series([getattr(check, name) for check in checks], dtype=kind)
        for name, kind in (("rule", pl.String), ("part", pl.String), ("limit", pl.Float64))
    )
    broke = pl.Series(first).replace(-1, None)
    counts = rows.measured("input")
    echo = rows.echoes[0] if any(check.rule == "echo" for check in checks) else np.full(n, np.nan)
    told = pl.DataFrame(
        {
            "rule": rule.gather(broke) if len(checks) else pl.Series([None] * n, dtype=pl.String),
            "part": part.gather(broke) if len(checks) else pl.Series([None] * n, dtype=pl.String),
            "value": pl.Series(value, nan_to_null=True).round(4),
            "limit": limit.gather(broke) if len(checks) else pl.Series([None] * n, dtype=pl.Float64),
            "what": pl.Series(what, dtype=pl.String),
            "words": counts.counts[:, measures.WORDS],
            "copied": (rows._kept["copied"] if "copied" in rows._kept else np.zeros(n)).round(3),
            "repeated": counts.repeated.round(3),
            "echo": pl.Series(echo, nan_to_null=True).round(3),
        }
    )
    return verdicts_from(rows.texts["id"], keep=told["rule"].is_null(), reason=told["rule"], score=told["value"], detail=_detail(told))


def _detail(told: pl.DataFrame) -> pl.Series:
    """One JSON object a row, without what is not known of it."""
    broken, measured = ("rule", "part", "value", "limit"), ("words", "copied", "repeated")

    def written(*names: str) -> pl.Expr:
        return pl.struct(*names).struct.json_encode()

    kept = pl.col("rule").is_null()
    bare = pl.col("echo").is_null()
    return told.select(
        pl.when(kept & bare)
        .then(written(*measured))
        .when(kept)
        .then(written(*measured, "echo"))
        .when(pl.col("what").is_null() & bare)
        .then(written(*broken, *measured))
        .when(pl.col("what").is_null())
        .then(written(*broken, *measured, "echo"))
        .when(bare)
        .then(written(*broken, "what", *measured))
        .otherwise(written(*broken, "what", *measured, "echo"))
    ).to_series()
