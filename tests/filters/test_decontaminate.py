from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.passages import Passages, spans
from factory.recipe import Recipe, StageLine
from factory.rows import read_samples
from factory.run import run
from factory.stage import Generator
from factory.still import Still
from factory.store import SAMPLES
from filters.decontaminate import Decontaminate
from generators.seeds import Seeds
from schemas.call import Call
from schemas.recipe import Target
from schemas.sample import Message, Provenance, Sample
from tests.context import FakeContext, chat, frame

ROOT = Path(__file__).parents[2]
DEV = ROOT / "bench" / "data" / "banking77_dev.jsonl"
GSM8K = ROOT / "tests" / "data" / "gsm8k.jsonl"
BANK = ROOT / "examples" / "bank-intents" / "seeds.jsonl"
REPHRASED = [json.loads(line) for line in (ROOT / "tests" / "data" / "rephrased.jsonl").read_text().splitlines()]
WORDS = {"meaning": None}  # by words alone, so that no vector helps


def real(path: Path) -> pl.DataFrame:
    return read_samples(path)


def items(path: Path) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in path.read_text().splitlines()]


def judged(rows: pl.DataFrame, ctx: FakeContext | None = None, **settings: Any) -> list[dict[str, Any]]:
    verdicts = Decontaminate(**settings).judge(rows, ctx or FakeContext(seeds=real(BANK)))
    by_id = {row["sample"]: row | {"detail": json.loads(row["detail"])} for row in verdicts.to_dicts()}
    return [by_id[id_] for id_ in rows["id"]]


def one(text: str, answer: str = "x", ctx: FakeContext | None = None, **settings: Any) -> dict[str, Any]:
    [verdict] = judged(frame(chat(text, answer)), ctx, **settings)
    return verdict


def a_set(tmp_path: Path, *rows: Any, name: str = "set.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = "The quick brown fox jumps over the lazy dog while nine grey owls watch from the old oak tree"  # 19 words
OTHER = "Some words of nobody stand here in front of it all, and say nothing that could be of any use. "


def test_a_copied_item_falls_with_its_set_its_line_and_the_place_of_its_words() -> None:
    item = items(DEV)[174]
    verdict = one(f"Hello. {item} Thanks!", against=DEV, **WORDS)
    assert verdict["keep"] is False
    assert verdict["reason"] == "evaluation item copied"
    detail = verdict["detail"]
    assert detail["set"] == str(DEV)
    assert detail["line"] == "banking77_dev.jsonl:175"
    assert detail["item"] == item[:200]
    assert detail["method"] == "ngram"
    assert detail["limit"] == 13
    assert verdict["score"] == 35
    start, end = detail["span"]
    assert detail["part"] == "input"
    assert f"Hello. {item} Thanks!"[start:end] == item.rstrip(".?")


def test_every_item_falls_as_it_is_and_in_other_case_and_punctuation() -> None:
    texts = items(DEV)
    disguised = [" ".join(text.upper().replace(".", " !! ").replace(",", " ; ").replace("?", "…").split()) for text in texts]
    for rows in (texts, disguised):
        verdicts = judged(
            frame(*[chat(text, "x", origin="made", source=str(n)) for n, text in enumerate(dict.fromkeys(rows))]), against=DEV
        )
        assert {v["keep"] for v in verdicts} == {False}
        assert {v["reason"] for v in verdicts} == {"evaluation item copied"}


def test_seeds_that_are_no_copies_stay_by_words() -> None:
    assert all(v["keep"] for v in judged(real(BANK), against=DEV, **WORDS))


def test_thirteen_words_in_a_row_are_a_copy_and_twelve_are_not(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": LONG})
    words = LONG.split()
    at, below = (one(OTHER + " ".join(words[3 : 3 + n]) + " zzz", against=against, overlap=None, **WORDS) for n in (13, 12))
    assert (at["keep"], at["score"], at["detail"]["limit"]) == (False, 13, 13)
    assert (below["keep"], below["score"], below["detail"]["limit"]) == (True, 12, 13)
    assert below["reason"] is None


def test_most_words_of_an_item_in_pieces_are_an_overlap(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": LONG})
    words = LONG.split()
    pieces = " ".join([*words[:9], "zzz", *words[10:]])  # 9 and 9 of 19
    verdict = one(pieces, against=against, **WORDS)
    assert (verdict["reason"], verdict["score"]) == ("evaluation item overlaps", round(18 / 19, 4))
    assert verdict["detail"]["limit"] == 0.7
    start, end = verdict["detail"]["span"]
    assert pieces[start:end] == pieces
    assert one(pieces, against=against, overlap=0.96, **WORDS)["keep"]
    assert one(pieces, against=against, overlap=None, **WORDS)["keep"]


def test_an_item_that_repeats_itself_is_found_by_its_refrain_and_not_by_pieces_in_another_order(tmp_path: Path) -> None:
    words = LONG.split()
    refrain = " ".join(words[:14])
    against = a_set(tmp_path, {"text": f"{refrain} and so on it goes for a while until {refrain} and then it all ends"})
    verdict = one(OTHER + refrain, against=against, overlap=None, **WORDS)
    assert (verdict["keep"], verdict["score"]) == (False, 13 + 1)
    turned = one(" ".join([*words[6:14], *words[:8]]), against=against, overlap=None, **WORDS)
    assert (turned["keep"], turned["score"]) == (True, 8)
    stammer = a_set(tmp_path, {"text": "no " * 40}, name="stammer.jsonl")
    assert one("no " * 13, against=stammer, overlap=None, **WORDS)["score"] == 13
    assert one("no " * 12, against=stammer, overlap=None, **WORDS)["keep"]


def test_a_short_item_must_stand_whole_and_a_very_short_one_must_be_all(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": "How do I top up?"}, {"text": "why was my last transfer to a friend so late"})
    assert not one("how do i top up", against=against, **WORDS)["keep"]
    assert one("How do I top up my account with a card?", against=against, **WORDS)["keep"]
    assert not one("Hi, why was my last transfer to a friend so late? Thanks", against=against, **WORDS)["keep"]
    assert one("Why was my last transfer to a shop so late?", against=against, **WORDS)["keep"]
    assert not one("Hello, how do I top up my account?", against=against, min_words=5, **WORDS)["keep"]


def test_an_item_is_found_in_any_part_and_in_none_that_is_not_compared(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": LONG})
    answered = frame(chat("Tell me something.", LONG))
    [verdict] = judged(answered, against=against, **WORDS)
    assert verdict["detail"]["part"] == "output"
    assert all(v["keep"] for v in judged(answered, against=against, compare=["input"], **WORDS))
    turn = {"role": "assistant", "content": "no"}
    preference = {"messages": [{"role": "user", "content": "p"}], "chosen": [turn], "rejected": [{"role": "assistant", "content": LONG}]}
    [verdict] = judged(
        frame(Sample.model_validate({**preference, "provenance": {"origin": "made", "generator": "t"}})), against=against, **WORDS
    )
    assert verdict["detail"]["part"] == "rejected"


def test_long_answers_are_items_and_labels_are_not(tmp_path: Path) -> None:
    against = a_set(
        tmp_path, {"question": "What is seen?", "answer": LONG}, {"question": "Which one of them?", "answer": "failed_transfer"}
    )
    assert not one("Describe it.", LONG, against=against, **WORDS)["keep"]
    assert one("Something else.", "failed_transfer", against=against, **WORDS)["keep"]


def test_what_the_seeds_say_as_well_is_a_phrase_of_the_task(tmp_path: Path) -> None:
    form = "Read the message of the customer below and answer with the one intent that fits it best. Message: "
    seeds = frame(*[chat(form + text, "x", origin="real") for text in items(BANK)[:20]])
    against = a_set(tmp_path, *[{"text": form + text} for text in items(DEV)[:8]])
    rows = frame(*[chat(form + text, "x") for text in items(DEV)[100:130]])
    assert all(v["keep"] for v in judged(rows, FakeContext(seeds=seeds), against=against, **WORDS))
    copied = judged(frame(*[chat(form + text, "x") for text in items(DEV)[:8]]), FakeContext(seeds=seeds), against=against, **WORDS)
    assert [v["keep"] for v in copied] == [False] * 8  # what is their own still counts
    bare = judged(rows, FakeContext(), against=against, **WORDS)
    assert not any(v["keep"] for v in bare), "without seeds to tell, the form is what they share"


def test_the_form_that_a_large_set_has_is_no_item_of_it(tmp_path: Path) -> None:
    form = "Question: read the message of the customer and say which of the intents fits it best, please. "
    against = a_set(tmp_path, *[{"text": form + text} for text in items(DEV)[:40]])
    rows = frame(*[chat(form + text, "x") for text in items(DEV)[100:130]])
    assert all(v["keep"] for v in judged(rows, FakeContext(), against=against, **WORDS))


def test_a_seed_that_is_an_item_itself_is_reported_and_hides_nothing() -> None:
    item = items(DEV)[174]
    ctx = FakeContext(seeds=pl.concat([real(BANK), frame(chat(item, "x", origin="real", source="seeds.jsonl:41"))]))
    assert not one(item, ctx=ctx, against=DEV, **WORDS)["keep"]
    [leak] = ctx.reports["seeds_that_are_items"]
    assert (leak["seed"], leak["line"]) == ("seeds.jsonl:41", "banking77_dev.jsonl:175")


def test_our_own_test_split_is_a_set_without_a_word_in_the_recipe() -> None:
    held = frame(chat("Is there a branch in Lower Dunmore that opens on the second Sunday of May?", "x", origin="real", source="s.jsonl:7"))
    ctx = FakeContext(seeds=real(BANK), holdout=held)
    verdict = one("is there a branch in lower Dunmore, that opens on the second Sunday of May", ctx=ctx)
    assert verdict["reason"] == "evaluation item copied"
    assert (verdict["detail"]["set"], verdict["detail"]["line"]) == ("holdout", "s.jsonl:7")
    assert ctx.reports["sets"] == {"holdout": {"items": 1, "unread": 0}}
    assert one("Why was my transfer to a friend rejected again?", ctx=ctx)["keep"]


def test_without_any_set_every_row_is_kept_and_that_is_told() -> None:
    ctx = FakeContext(seeds=real(BANK))
    assert one("anything", ctx=ctx)["keep"]
    assert "holdout" in ctx.reports["unjudged"]


SHAPES = [
    ({"question": LONG}, {}),
    ({"question": LONG, "choices": ["one", "two"], "answer": 0}, {}),  # MMLU: the answer is a number
    ({"ctx": LONG, "endings": ["a", "b"]}, {}),  # HellaSwag
    ({"frage": LONG}, {"columns": ["frage"]}),
    ({"doc": {"text": LONG}}, {"columns": ["doc.text"]}),
    ({"choices": {"label": [1, 2], "text": [LONG, "no"]}}, {"columns": ["choices"]}),
]


@pytest.mark.parametrize(("row", "settings"), SHAPES)
def test_sets_are_read_in_the_shapes_that_they_come_in(tmp_path: Path, row: dict[str, Any], settings: dict[str, Any]) -> None:
    verdict = one(
        OTHER + LONG, against=a_set(tmp_path, {"other": 1} if settings else {"text": "an item of no matter"}, row), **settings, **WORDS
    )
    assert not verdict["keep"]
    assert verdict["detail"]["line"] == "set.jsonl:2"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_without_answers_are_read(tmp_path: Path, ending: str) -> None:
    table = pl.DataFrame({"question": [LONG, "another one"]})
    path = tmp_path / f"set.{ending}"
    table.write_csv(path) if ending == "csv" else table.write_parquet(path)
    assert not one(LONG, against=path, **WORDS)["keep"]


def test_of_a_released_version_test_and_validation_are_held_against_and_train_is_not(tmp_path: Path) -> None:
    version = tmp_path / "v1"
    version.mkdir()
    (version / "manifest.json").write_text("{}")
    a_set(version, {"text": LONG}, name="test.jsonl")
    a_set(version, {"text": items(GSM8K)[0]}, name="train.jsonl")
    assert not one(LONG, against=version, **WORDS)["keep"]
    assert one(items(GSM8K)[0], against=version, **WORDS)["keep"]


def test_a_version_of_several_kinds_is_read_kind_by_kind(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "yes"), ("rejected", "no"))}
    a_set(tmp_path, {"prompt": [{"role": "user", "content": LONG}], **answers}, name="preference-test.jsonl")
    a_set(tmp_path, {"text": items(GSM8K)[1]}, name="text-validation.jsonl")
    a_set(tmp_path, {"text": items(GSM8K)[0]}, name="text-train.jsonl")
    assert not one(LONG, against=tmp_path, **WORDS)["keep"]
    assert not one(items(GSM8K)[1], against=tmp_path, **WORDS)["keep"]
    assert one(items(GSM8K)[0], against=tmp_path, **WORDS)["keep"]


def test_rows_of_a_set_that_cannot_be_read_are_counted_and_a_set_of_none_is_an_error(tmp_path: Path) -> None:
    ctx = FakeContext()
    against = a_set(tmp_path, {"text": LONG}, {"nothing": 1}, ["no", "object"])
    one(LONG, ctx=ctx, against=against, **WORDS)
    assert ctx.reports["sets"] == {str(against): {"items": 1, "unread": 2}}
    with pytest.raises(GristmillError, match=r"no row of this evaluation set") as error:
        one("x", against=a_set(tmp_path, {"frage": LONG}, name="other.jsonl"))
    assert "frage" in (error.value.next or "")
    with pytest.raises(GristmillError, match="no such file"):
        one("x", against=tmp_path / "gone.jsonl")


def test_a_set_that_changes_is_read_again(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": "an item of no matter at all"})
    assert one(LONG, against=against, **WORDS)["keep"]
    a_set(tmp_path, {"text": LONG})
    assert not one(LONG, against=against, **WORDS)["keep"]


@pytest.mark.parametrize(
    "settings", [{"ngram": None, "overlap": None, "meaning": None}, {"teachers": ["big"], "meaning": None}, {"ngram": 1}, {"compare": []}]
)
def test_settings_that_could_find_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Decontaminate(**settings)


# In other words.


def rephrased(name: str) -> pl.DataFrame:
    return frame(*[chat(row["text"], "x") for row in REPHRASED if row["set"] == name])


def test_rephrased_sums_are_found_where_real_rows_are_far_apart() -> None:
    seeds = frame(*[chat(text, "x", origin="real") for text in items(BANK)])
    rows = rephrased("gsm8k.jsonl")
    verdicts = judged(rows, FakeContext(seeds=seeds), against=GSM8K)
    assert len(verdicts) == 15
    assert sum(v["reason"] == "evaluation item near" for v in verdicts) == 15
    lines = [row["of"] for row in REPHRASED if row["set"] == "gsm8k.jsonl"]
    assert [v["detail"]["line"] for v in verdicts] == [f"gsm8k.jsonl:{line}" for line in lines]
    assert all(v["score"] >= v["detail"]["limit"] for v in verdicts)
    assert all(
        v["keep"]
        for v in judged(frame(*[chat(f"How many napkins cost {n} dollars?") for n in range(5)]), FakeContext(seeds=seeds), against=GSM8K)
    )


def test_in_a_narrow_subject_few_real_rows_fall_and_some_rephrasings_do(tmp_path: Path) -> None:
    """Messages to one bank are as near to each other as rephrasings are: no cosine tells them apart, and auto spares the real ones."""
    rows = rephrased("banking77_dev.jsonl")
    chosen = {row["of"] - 1 for row in REPHRASED if row["set"] == "banking77_dev.jsonl"} | set(range(0, 300, 2))
    lines = DEV.read_text().splitlines()
    against = tmp_path / "half.jsonl"
    against.write_text("\n".join(lines[n] for n in sorted(chosen)))
    others = frame(*[chat(text, "x") for n, text in enumerate(items(DEV)) if n not in chosen])
    fell = sum(not v["keep"] for v in judged(others, against=against))
    assert fell / len(others) <= 0.05
    ctx = FakeContext(seeds=real(BANK))
    assert (
        sum(not v["keep"] for v in judged(rows, ctx, against=DEV)) >= 1
    )  # of 15; where every tenth real row may fall, 4: the price is too high
    assert ctx.reports["meaning"]["limits"]["q05"] < 0.87 < 0.9 < ctx.reports["meaning"]["limits"]["q50"]
    assert sum(not v["keep"] for v in judged(real(BANK), against=DEV)) <= 5  # of 40 seeds: some are copies of items but for a word


def test_a_teacher_who_knows_finds_most_rephrasings() -> None:
    rows = rephrased("banking77_dev.jsonl")
    pairs = [(row["text"], items(DEV)[row["of"] - 1]) for row in REPHRASED[:15]]

    def knows(call: Call) -> str:
        question = call.messages[-1].content
        return json.dumps({"evidence": "", "same": any(text in question and item in question for text, item in pairs)})

    ctx = FakeContext(seeds=real(BANK), answers=knows)
    assert sum(not v["keep"] for v in judged(rows, ctx, against=DEV, teachers=["fake"])) >= 13
    assert len(ctx.asked) <= 15
    assert all(v["keep"] for v in judged(real(BANK), ctx, against=DEV, teachers=["fake"], neighbours=3))


def test_a_cosine_of_ones_own_is_held_to() -> None:
    row = REPHRASED[0]["text"]
    score = one(row, against=DEV)["score"]
    assert not one(row, against=DEV, meaning=score - 0.001)["keep"]
    assert one(row, against=DEV, meaning=score + 0.1)["keep"]


def test_teachers_are_asked_about_near_rows_alone_and_their_word_stands() -> None:
    rows = frame(
        *[chat(row["text"], "x") for row in REPHRASED[:15]], chat("What is the colour of Jupiter's third moon?"), chat(items(DEV)[174])
    )

    def says(call: Call) -> str:
        return json.dumps(
            {"evidence": "the same facts", "same": "landlord" in call.messages[-1].content.split("<item>")[1].split("</item>")[0]}
        )

    ctx = FakeContext(seeds=real(BANK), answers=says)
    verdicts = judged(rows, ctx, against=DEV, teachers=["fake"], neighbours=3)
    assert verdicts[9]["reason"] == "evaluation item rephrased"
    assert verdicts[9]["detail"]["evidence"] == "the same facts"
    assert verdicts[9]["detail"]["line"] == "banking77_dev.jsonl:175"
    asked = {call.ref.split("/")[0] for call in ctx.asked}
    assert rows["id"][15] not in asked
    assert rows["id"][16] not in asked, "a copy needs no opinion"
    assert verdicts[16]["reason"] == "evaluation item copied"
    assert sum(not v["keep"] for v in verdicts) < 6


@pytest.mark.parametrize(("on_failure", "keep"), [("reject", False), ("keep", True)])
@pytest.mark.parametrize(
    "text", ["", "yes", '{"evidence": "e", "same": "true"}', '{"same": true, "same": false, "evidence": ""}', "{" * 50_000]
)
def test_what_is_no_answer_is_no_opinion(text: str, on_failure: str, keep: bool) -> None:
    ctx = FakeContext(seeds=real(BANK), answers=lambda _: text)
    verdict = one(REPHRASED[13]["text"], ctx=ctx, against=DEV, teachers=["fake"], on_failure=on_failure)
    assert ctx.asked
    assert (verdict["keep"], verdict["reason"]) == (keep, "not judged")


def test_an_item_cannot_close_its_tags(tmp_path: Path) -> None:
    against = a_set(tmp_path, {"text": "How tall is </item> the Eiffel tower <example> in Paris?"})
    ctx = FakeContext(answers=lambda _: '{"evidence": "", "same": false}')
    assert one("What is the height of the Eiffel tower </example> in Paris?", ctx=ctx, against=against, teachers=["fake"], suspect=0.3)[
        "keep"
    ]
    [call] = ctx.asked
    assert (
        call.messages[-1].content.count("</item>")
        == call.messages[-1].content.count("<example>")
        == call.messages[-1].content.count("</example>")
        == 1
    )


def test_a_plan_counts_no_more_than_could_be_asked_and_needs_no_vector() -> None:
    seeds = real(BANK)
    stage = Decontaminate(against=DEV, teachers=("fake",), neighbours=2)
    assert len(list(stage.questions(seeds, Still("01-test", seeds=seeds)))) == 2 * seeds.height
    assert list(Decontaminate(against=DEV).questions(seeds, Still("01-test", seeds=seeds))) == []


# What any row may be.


def test_poisoned_rows_get_a_verdict_in_bounded_time() -> None:
    item = items(DEV)[174]
    texts = [
        "(" * 1_000_000,
        "\x00" * 10,
        "[" * 100_000,
        "9" * 100_000,
        "\u202e\u200f abc",
        "🙂" * 1000,
        " ",
        (item + " ") * 5000,
        "a" * 1_000_000,
    ]
    rows = frame(*[chat(text, "x") for text in texts], Sample(text="plain", provenance=Provenance(origin="made", generator="t")))
    start = time.monotonic()
    verdicts = judged(rows, against=DEV, **WORDS)
    assert time.monotonic() - start < 20
    assert [v["keep"] for v in verdicts] == [True] * 7 + [False] + [True] * 2
    assert Decontaminate(against=DEV).judge(SAMPLES.to_frame(), FakeContext()).height == 0


def test_several_turns_are_looked_through() -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", items(DEV)[174]), ("assistant", "Soon.")]
    sample = Sample(
        messages=tuple(Message(role=role, content=text) for role, text in turns), provenance=Provenance(origin="made", generator="t")
    )  # type: ignore[arg-type]
    [verdict] = judged(frame(sample), against=DEV, **WORDS)
    start, end = verdict["detail"]["span"]
    assert sample.input[start:end].startswith("Hi - I have made") or sample.input[start:end].startswith("I have made")


@pytest.mark.parametrize("around", ["", "ﬁne ½ Ｗide ", "naïve café 🙂 ", "Ö" * 50 + " "])
def test_the_place_of_words_is_that_in_the_text_as_it_is(around: str) -> None:
    text = f"{around}the old oak tree! {around}"
    before = len(Passages(pl.Series(["x"])).search(pl.Series([text])).run)  # tables are there
    assert before == 1
    found = Passages(pl.Series(["the old oak tree"]), fewest=1).search(pl.Series([text]))
    [(start, end)] = spans([text], [int(found.run_first[0])], [int(found.run_last[0])])
    assert text[start:end] == "the old oak tree"


def test_passages_agree_with_a_plain_count() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(5, 40))) for _ in range(60)]
    found = Passages(pl.Series(texts[:20]), longest=6, fewest=3).search(pl.Series(texts[20:]))

    def longest(text: str, item: str) -> int:
        a, b = text.split(), item.split()
        return max(
            (n for n in range(1, len(b) + 1) for i in range(len(a) - n + 1) for j in range(len(b) - n + 1) if a[i : i + n] == b[j : j + n]),
            default=0,
        )

    for row, text in enumerate(texts[20:]):
        runs = [longest(text, item) for item in texts[:20]]
        needed = [min(6, len(item.split())) for item in texts[:20]]
        assert (found.run_item[row] >= 0 and found.run[row] >= found.needed[row]) == any(r >= n for r, n in zip(runs, needed, strict=True))


class Nothing(Generator):
    """Makes one row: the seed that was set aside."""

    key = "nothing"
    text: ClassVar[str] = ""

    def generate(self, samples: pl.DataFrame, ctx: Any) -> Iterator[Sample]:
        assert self.text not in ctx.seeds["input"].to_list() + ctx.kept["input"].to_list()
        yield chat(self.text, "x", generator=ctx.stage, round=ctx.round)
        yield chat("Is the moon made of any kind of cheese at all?", "x", generator=ctx.stage, round=ctx.round)


def test_in_a_run_the_seeds_that_are_set_aside_reach_the_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Seeds(path=BANK, holdout=4)
    held = [row for row in source.generate(SAMPLES.to_frame(), Still("01-seeds")) if isinstance(row, Sample) and row.holdout]
    assert len(held) == 4
    monkeypatch.setattr(Nothing, "text", held[0].input)
    lines = tuple(StageLine(f"{i:02d}-{s.key}", s) for i, s in enumerate([source, Nothing(), Decontaminate(meaning=None)], 1))
    goal = Target(accepted=1, balance=None)
    record = run(Recipe(tmp_path / "recipe.yaml", "name: tiny\n", "tiny", goal, {}, lines), tmp_path / "mill", view="quiet")
    verdicts = record.verdicts.filter(pl.col("by") == "03-decontaminate")
    assert sorted(verdicts["reason"].to_list(), key=str) == [None, "evaluation item copied"]
    assert "holdout" in verdicts.filter(~pl.col("keep"))["detail"][0]


def test_no_teacher_is_shown_what_is_set_aside(tmp_path: Path) -> None:
    """Of the run's own test rows the cosine decides, also where teachers are asked about other sets."""
    aside = real(BANK)
    ctx = FakeContext(seeds=frame(), holdout=aside, answers=lambda _: '{"evidence": "", "same": false}')
    rows = frame(*(chat(f"Please, {text[0].lower()}{text[1:]}", "x") for text in aside["input"]))
    stage = Decontaminate.model_validate({"teachers": ["fake"], "against": [str(DEV)], "neighbours": 3, "suspect": 0.3})
    verdicts = stage.judge(rows, ctx)
    planned = list(stage.questions(rows, ctx))
    assert len(ctx.asked) >= 10  # those that the cosine alone does not drop
    assert len(planned) >= len(rows)
    shown = [call.messages[-1].content.split("<item>")[1].split("</item>")[0] for call in (*ctx.asked, *planned)]
    assert not any(text in prompt for prompt in shown for text in aside["input"] if text not in items(DEV))
    assert verdicts.filter(~pl.col("keep")).height > 0
    only = Decontaminate.model_validate({"teachers": ["fake"]})
    assert list(only.questions(rows, FakeContext(seeds=frame(), holdout=aside))) == []
    assert only.judge(rows, FakeContext(seeds=frame(), holdout=aside)).height == len(rows)


def test_a_batch_without_a_text_to_compare_is_kept() -> None:
    stage = Decontaminate.model_validate({"ngram": None, "overlap": None, "against": [str(DEV)]})
    assert stage.judge(frame(chat("???", "yes")), FakeContext(seeds=real(BANK)))["keep"].to_list() == [True]
