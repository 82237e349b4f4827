"""What can be said against a sample without asking a model: the checks that cost nothing, so they come first.

Every rule is a polars expression over a whole batch, but for the language, whose classifier takes a text at a time. The
first rule that a sample breaks, in the order of `NAMES`, is its verdict's reason.

The seeds outrank the rules. Lengths, language and labels are taken from them, and what a rule of form (`data/form.yaml`, and
the measures of letters and repetition) forbids but real rows do as well is allowed, and is reported under `off`: a task may
have answers in Markdown, or questions that hold placeholders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from factory.stage import Context, Filter
from factory.store import verdicts_from

Name = Literal[
    "empty",
    "control characters",
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
    "few letters",
    "language",
    "repetition",
    "copied",
    "unknown label",
    "no preference",
    "required",
    "forbidden",
]
NAMES: tuple[Name, ...] = get_args(Name)

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # scripts without spaces: a letter counts as a word
PARTS = ("input", "output")
TOLERANCE = 0.02  # the share of seeds that may break a rule of form before it is off
SHORT = 12  # words: a text up to here is compared letter by letter, a longer one by its runs of words
RUN = 5
FEW_LETTERS = 0.5  # of the characters that are no space
# The language is unwanted where the wanted ones' probability is below UNWANTED, and another's at least SURE. An answer may be
# a list of names or code, which is like no language: there, nearly certain.
UNWANTED, SURE, VERY_SURE = 0.05, 0.25, 0.95


class Bounds(BaseModel):
    """What the user demands of a text: words and characters, and patterns (of Rust's `regex`) that must or must not be found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_chars: int | None = Field(None, ge=0)
    max_chars: int | None = Field(None, ge=1)
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)


class Rules(Filter):
    """Rejects what is broken in form, in the wrong language, copied from a seed, or left over from the prompt.

    min_words … forbid: demands on the input; `output`: the same on the output.
    length: how many times shorter than the shortest seed, or longer than the longest, a text may be (in characters).
    language: "auto", the languages of the seeds; or a list of ISO 639-1 codes. A text too short to tell is let through.
    copied: how much of an input may stand in one seed, or of a seed in it: from there on it is a copy. repeated: which share
    of a text's word trigrams may be repeats.
    off: rules that are not to hold, by their names. length, language, copied and repeated can be null as well.
    """

    key: ClassVar[str] = "rules"

    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_chars: int | None = Field(None, ge=0)
    max_chars: int | None = Field(None, ge=1)
    require: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    output: Bounds = Bounds()
    length: float | None = Field(4.0, ge=1)
    language: Literal["auto"] | tuple[str, ...] | None = "auto"
    copied: float | None = Field(0.9, gt=0, le=1)
    repeated: float | None = Field(0.4, gt=0, lt=1)
    off: tuple[Name, ...] = ()

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)

    @field_validator("language")
    @classmethod
    def _codes(cls, language: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        if isinstance(language, tuple) and (unknown := sorted(set(language) - set(_classifier().labels))):
            raise ValueError(f"no language has the code {', '.join(unknown)}; codes are those of ISO 639-1, like en, de, zh")
        return language

    def judge(self, samples: pl.DataFrame, ctx: Context) -> pl.DataFrame:
        """Verdicts whose score is the measure that broke its limit, where the rule has one.

        detail: rule, part ("input" or "output"), value and limit of a rejected sample, and of every one its `words`, `copied`
        and `repeated`, so that these limits can be moved later.
        """
        seeds = _texts(ctx.seeds)
        texts = _texts(samples)
        texts = texts.with_columns(copied=_copied(texts["input"], seeds["input"]))
        texts, spoken = self._spoken(texts, seeds)
        checks = [*self._own_checks(seeds), *self._form_checks(seeds, ctx), *spoken]
        checks = sorted((check for check in checks if check.rule not in self.off), key=lambda check: NAMES.index(check.rule))
        texts = texts.with_columns(breach=pl.coalesce(pl.lit(None, _BREACH), *(check.breach() for check in checks))).unnest("breach")
        measures = ("words", "copied", "repeated")
        texts = texts.rename({"words_input": "words", "repeated_input": "repeated"}).with_columns(
            pl.col("copied", "repeated").cast(pl.Float64).round(3), value=pl.col("value").round(4)
        )
        texts = texts.with_columns(
            detail=pl.when(pl.col("rule").is_null())
            .then(pl.struct(*measures).struct.json_encode())
            .otherwise(pl.struct("rule", "part", "value", "limit", *measures).struct.json_encode())
        )
        return verdicts_from(texts["id"], keep=texts["rule"].is_null(), reason=texts["rule"], score=texts["value"], detail=texts["detail"])

    def _own_checks(self, seeds: pl.DataFrame) -> Iterator[_Check]:
        """What the recipe demands, and the measures that it takes from the seeds."""
        yield _Check("empty", "input", ~pl.col("input").str.contains(r"[\p{L}\p{N}]"))
        yield _Check("empty", "output", pl.col("other").str.strip_chars() == "")
        yield _Check("no preference", "output", pl.col("other") == pl.col("output"))
        if len(seeds) and (seeds["output"] != "").all():
            yield _Check("empty", "output", pl.col("output").str.strip_chars() == "")
        yield from _demands("input", Bounds(**{name: getattr(self, name) for name in Bounds.model_fields}))
        yield from _demands("output", self.output)
        if self.copied is not None:
            yield _above("copied", "input", pl.col("copied"), self.copied, closed=True)
        labels = seeds["label"].drop_nulls().unique().implode()
        if len(labels.item()):
            yield _Check("unknown label", "output", pl.col("label").is_not_null() & ~pl.col("label").is_in(labels))
            if _answers_are_labels(seeds):
                yield _Check("unknown label", "output", ~pl.col("output").is_in(labels))
        if self.length is not None and len(seeds):
            for part in PARTS:
                shortest, longest = seeds[part].str.len_chars().min(), seeds[part].str.len_chars().max()
                assert isinstance(shortest, int) and isinstance(longest, int)
                yield _below("too short", part, pl.col(part).str.len_chars(), shortest / self.length)
                yield _above("too long", part, pl.col(part).str.len_chars(), longest * self.length)

    def _form_checks(self, seeds: pl.DataFrame, ctx: Context) -> Iterator[_Check]:
        """The rules about form, without what the seeds do as well; that is reported."""
        off: list[str] = []

        def holds(check: _Check, what: str) -> bool:
            broken = seeds.select(check.broken.sum()).item() > TOLERANCE * len(seeds)
            if broken:
                off.append(f"{check.rule} ({check.part}): {what}")
            return not broken

        for part in PARTS[:1] if _answers_are_labels(seeds) else PARTS:
            for rule, patterns in _form(part):
                kept = [pattern for pattern in patterns if holds(_found(rule, part, [pattern]), pattern)]
                if kept:
                    yield _found(rule, part, kept)
            lines = pl.col(part).str.split("\n").list.eval(pl.element().str.strip_chars().filter(pl.element().str.len_chars() >= 12))
            measured = [_above("repetition", part, lines.list.len() - lines.list.n_unique(), 1)]
            if self.repeated is not None:
                measured.append(_above("repetition", part, pl.col(f"repeated_{part}"), self.repeated))
            if part == "input":
                letters = pl.col(part).str.count_matches(r"\p{L}") / pl.col(part).str.count_matches(r"\S")
                measured.append(_below("few letters", part, letters, FEW_LETTERS))
            yield from (check for check in measured if holds(check, "measured"))
        ctx.report("off", off)

    def _spoken(self, texts: pl.DataFrame, seeds: pl.DataFrame) -> tuple[pl.DataFrame, list[_Check]]:
        """`texts` with the probability of each part's being in a language that is wanted, and the checks of it."""
        checks = []
        for part, sure in (("input", SURE), ("output", VERY_SURE)):
            if self.language is None or "language" in self.off or (part == "output" and _answers_are_labels(seeds)):
                continue
            if self.language == "auto":
                said = _languages(seeds[part]).filter(pl.col("probability") >= 0.8)["language"].value_counts()
                wanted = said.filter(pl.col("count") > TOLERANCE * len(seeds))["language"].to_list()
            else:
                wanted = list(self.language)
            if wanted:
                wanted_probability = _languages(texts[part], wanted)
                texts = texts.with_columns(
                    pl.when(wanted_probability["probability"] >= sure).then(wanted_probability["wanted"]).alias(f"wanted_{part}")
                )
                checks.append(_below("language", part, pl.col(f"wanted_{part}"), UNWANTED))
        return texts, checks


@dataclass(frozen=True, eq=False)
class _Check:
    """One expression that is true where a rule is broken, with what it measured against which limit."""

    rule: Name
    part: str
    broken: pl.Expr
    value: pl.Expr = pl.lit(None)
    limit: float | None = None

    def breach(self) -> pl.Expr:
        value, limit = self.value.cast(pl.Float64), pl.lit(self.limit, pl.Float64)
        return pl.when(self.broken).then(pl.struct(rule=pl.lit(self.rule), part=pl.lit(self.part), value=value, limit=limit))


_BREACH = pl.Struct({"rule": pl.String(), "part": pl.String(), "value": pl.Float64(), "limit": pl.Float64()})


def _below(rule: Name, part: str, value: pl.Expr, limit: float) -> _Check:
    return _Check(rule, part, value < limit, value, limit)


def _above(rule: Name, part: str, value: pl.Expr, limit: float, *, closed: bool = False) -> _Check:
    return _Check(rule, part, value >= limit if closed else value > limit, value, limit)


@cache
def _form(part: str) -> list[tuple[Name, list[str]]]:
    """Each rule of `filters/data/form.yaml` with the patterns that must not be found in this part."""
    form = yaml.safe_load((Path(__file__).parent / "data" / "form.yaml").read_text(encoding="utf-8"))
    return [(rule, patterns) for rule, parts in form.items() if (patterns := parts.get("both", []) + parts.get(part, []))]


def _found(rule: Name, part: str, patterns: list[str]) -> _Check:
    return _Check(rule, part, pl.col(part).str.contains("(?i)" + "|".join(f"(?:{pattern})" for pattern in patterns)))


def _demands(part: str, bounds: Bounds) -> Iterator[_Check]:
    sizes = (
        (pl.col(f"words_{part}"), bounds.min_words, bounds.max_words),
        (pl.col(part).str.len_chars(), bounds.min_chars, bounds.max_chars),
    )
    for size, least, most in sizes:
        if least is not None:
            yield _below("too short", part, size, least)
        if most is not None:
            yield _above("too long", part, size, most)
    for pattern in bounds.require:
        yield _Check("required", part, ~pl.col(part).str.contains(pattern))
    for pattern in bounds.forbid:
        yield _Check("forbidden", part, pl.col(part).str.contains(pattern))


def _compiled(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            pl.Series([""]).str.contains(pattern)
        except pl.exceptions.ComputeError as error:
            raise ValueError(f"{pattern!r} is not a pattern of Rust's regex (no lookaround, no backreferences): {error}") from error
    return patterns


def _answers_are_labels(seeds: pl.DataFrame) -> bool:
    return len(seeds) > 0 and bool((seeds["label"].is_not_null() & (seeds["label"] == seeds["output"])).all())


def _texts(samples: pl.DataFrame) -> pl.DataFrame:
    """The texts to be judged, and what is measured of each alone.

    input: the user's turns (a text sample: the text), not the roles and the system prompt around them; other: the answer of
    a preference that was not chosen, else null.
    """
    said = pl.col("messages").list.eval(
        pl.when(pl.element().struct.field("role") == "user").then(pl.element().struct.field("content")).drop_nulls()
    )
    other = pl.when(pl.col("kind") == "preference").then(pl.col("rejected").list.last().struct.field("content"))
    texts = samples.select("id", "label", "output", other=other, input=pl.coalesce("text", said.list.join("\n")))
    return texts.with_columns(
        *[pl.col(part).str.count_matches(rf"{_UNSPACED}|[\S--{_UNSPACED}]+").alias(f"words_{part}") for part in PARTS],
        *[_repeated(pl.col(part)).alias(f"repeated_{part}") for part in PARTS],
    )


def _words(text: pl.Expr) -> pl.Expr:
    """Lower-case words without punctuation; in scripts without spaces, letters."""
    return text.str.to_lowercase().str.extract_all(rf"{_UNSPACED}|[\p{{L}}\p{{M}}\p{{N}}--{_UNSPACED}]+")


def _grams(items: pl.Expr, n: int) -> pl.Expr:
    return items.list.eval(pl.concat_str([pl.element().shift(-i) for i in range(n)], separator="\x1f").drop_nulls())


def _repeated(text: pl.Expr) -> pl.Expr:
    """The share of a text's word trigrams that stood in it before (after Rae et al. 2021, A.1.1); 0 with fewer than six."""
    grams = _grams(_words(text), 3)
    return pl.when(grams.list.len() >= 6).then(1 - grams.list.n_unique() / grams.list.len()).otherwise(0.0)


def _copied(texts: pl.Series, seeds: pl.Series) -> pl.Series:
    """How much of each text stands in one seed, or of a seed in it; 0 to 1.

    Of long texts, the share of words that stand in runs of five or more words of the other. Of those of at most twelve words,
    which a run says little of, the Dice coefficient of their letter trigrams: it stands for edit similarity, and is a join
    instead of a loop over pairs.
    """
    words = _words(pl.col("text"))
    letters = pl.concat_str(pl.lit("  "), words.list.join(" "), pl.lit(" ")).str.extract_all("(?s).")
    short = words.list.len() <= SHORT
    these, those = (
        pl.DataFrame({"text": series})
        .with_row_index("row")
        .with_columns(runs=_grams(words, RUN), trigrams=pl.when(short).then(_grams(letters, 3).list.unique()), words=words.list.len())
        for series in (texts, seeds)
    )
    spread = [pl.concat_list([pl.col(at) + i for i in range(RUN)]).explode().n_unique() for at in ("at", "at_seed")]
    runs = _shared(these, those, "runs").agg(pl.col("words", "words_seed").first(), text=spread[0], seed=spread[1])
    trigrams = _shared(these, those, "trigrams").agg(pl.len(), pl.col("n", "n_seed").first())
    long = [
        pl.when(pl.col(words) > SHORT).then(pl.col(covered) / pl.col(words))
        for covered, words in (("text", "words"), ("seed", "words_seed"))
    ]
    scores = [
        runs.select("row", score=pl.max_horizontal(*long)),
        trigrams.select("row", score=2 * pl.col("len") / (pl.col("n") + pl.col("n_seed"))),
    ]
    best = pl.concat(scores).group_by("row").agg(pl.col("score").max())
    return these.join(best, on="row", how="left", maintain_order="left")["score"].fill_null(0.0)


def _shared(texts: pl.DataFrame, seeds: pl.DataFrame, grams: str) -> Any:
    """The grams that texts and seeds have in common, by pairs: `at` and `at_seed` their places, `n` and `n_seed` how many each has."""
    this, that = (
        frame.select("row", "words", gram=pl.col(grams), n=pl.col(grams).list.len(), at=pl.int_ranges(pl.col(grams).list.len()))
        .explode("gram", "at")
        .drop_nulls("gram")
        for frame in (texts, seeds)
    )
    return this.join(that, on="gram", suffix="_seed").group_by("row", "row_seed")


@cache
def _classifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # 97 languages, 4.5 MB, loaded when first asked

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _languages(texts: pl.Series, wanted: Sequence[str] = ()) -> pl.DataFrame:
    """For each text its likeliest `language`, that one's `probability`, and the probability of its being in a `wanted` one.

    A naive Bayes over byte n-grams (Lui and Baldwin 2012). Unsure texts get small probabilities in all languages. The one
    loop a row of this module: the classifier takes a text at a time, at 26,000 short ones a second.
    """
    rank, sought = _classifier().rank, set(wanted)
    ranked = [rank(text) for text in texts]
    return pl.DataFrame(
        {
            "language": [first[0] for first, *_ in ranked],
            "probability": [float(first[1]) for first, *_ in ranked],
            "wanted": [float(sum(p for language, p in row if language in sought)) for row in ranked],
        },
        schema={"language": pl.String(), "probability": pl.Float64(), "wanted": pl.Float64()},
    )
