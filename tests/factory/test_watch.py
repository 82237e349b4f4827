"""The watch, on sets that are healthy and on sets that collapse: made from real rows, so that what is planted is known."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from factory.release import release
from factory.store import FAILURES, VERDICTS, failures_frame, samples_frame
from factory.watch import STOPS, Alarm, alarms, alarms_of_versions, depths, look, look_at_version, tail_mass
from filters.exact import Exact
from schemas.recipe import ReleasePlan
from schemas.sample import Failure, Message, Sample
from schemas.watch import Watch
from tests.context import FakeContext, chat, embedder
from tests.run_on_disk import bank_run, facts

BANK = Path(__file__).parents[2] / "bench" / "data" / "banking77_dev.jsonl"
TURNS = [json.loads(line)["messages"] for line in BANK.read_text().splitlines()]
LABELS = {user["content"]: answer["content"] for user, answer in TURNS}
TEXTS = list(LABELS)
NO_VERDICTS = pl.Schema({**VERDICTS, "round": pl.Int64()}).to_frame()
NO_FAILURES = pl.Schema({**FAILURES, "stage": pl.String(), "round": pl.Int64()}).to_frame()


def embed(texts: Sequence[str]) -> Any:
    return embedder().embed(texts)


def reworded(text: str, rng: random.Random) -> tuple[str, str]:
    """The same message with a word more or elsewhere, and its label."""
    words = text.split()
    for _ in range(1 + len(words) // 10):
        place = rng.randrange(len(words))
        words.insert(rng.randrange(len(words)), words.pop(place))
        words.insert(rng.randrange(len(words)), rng.choice(("please", "really", "just", "now", "again", "then")))
    return " ".join(words), LABELS[text]


def collapsing(rows: Sequence[str], originals: Sequence[int], rng: random.Random) -> list[list[tuple[str, str]]]:
    """Rounds of 8 rows a label, each reworded from ever fewer of the label's rows."""
    of_label: dict[str, list[str]] = {}
    for text in rows:
        of_label.setdefault(LABELS[text], []).append(text)
    return [[reworded(rng.choice(texts[:few]), rng) for texts in of_label.values() for _ in range(8)] for few in originals]


def rows_of(real: Iterable[str], rounds: Sequence[Iterable[str | tuple[str, str]]]) -> list[Sample]:
    rows = [chat(text, LABELS[text], origin="real") for text in real]
    made = {row if isinstance(row, tuple) else (row, LABELS[row]): number for number, texts in enumerate(rounds, 1) for row in texts}
    return rows + [chat(*row, round=number, teacher="small") for row, number in made.items()]


def looked(rows: Sequence[Sample], number: int, **changes: Any) -> dict[str, Any]:
    samples = samples_frame(rows)
    given: dict[str, Any] = {"accepted": samples.filter(pl.col("origin") == "made")["id"].to_list(), "embed": embed, **changes}
    return look(samples, given.pop("verdicts", NO_VERDICTS), given.pop("failures", NO_FAILURES), number=number, **given)


def by_round(rows: Sequence[Sample], rounds: int) -> list[dict[str, Any]]:
    return [looked([row for row in rows if row.provenance.round <= number], number) for number in range(1, rounds + 1)]


def dealt(seed: int) -> tuple[list[str], list[str]]:
    """100 real rows, and 200 that stand in for what a healthy teacher makes."""
    texts = random.Random(seed).sample(TEXTS, len(TEXTS))
    return texts[:100], texts[100:]


# -- descent


def family(**parents: Sequence[str]) -> pl.DataFrame:
    """Rows by id; who has no parents named is real."""
    rows = {"id": list(parents), "origin": ["made" if of is not None else "real" for of in parents.values()]}
    return pl.DataFrame(
        {**rows, "parents": [list(of or ()) for of in parents.values()], "meta": ["{}"] * len(parents)},
        schema_overrides={"id": pl.String, "origin": pl.String, "parents": pl.List(pl.String), "meta": pl.String},
    )


def depth_of(frame: pl.DataFrame) -> dict[str, int]:
    return dict(depths(frame).iter_rows())


def test_depth_counts_generations_from_real_rows() -> None:
    found = depth_of(
        family(
            alone=(),
            chained=["child"],
            child=["real"],
            real=None,
            left=["real"],
            right=["left"],
            diamond=["left", "right", "right"],
            stranger=["not here"],
            of_stranger=["stranger", "real"],
        )
    )
    assert found == {
        "alone": 1,
        "chained": 2,
        "child": 1,
        "real": 0,
        "left": 1,
        "right": 2,
        "diamond": 3,
        "stranger": 1,  # a parent that is not there counts as real
        "of_stranger": 2,
    }


def test_depth_of_a_ring_ends() -> None:
    found = depth_of(family(real=None, a=["real"], b=["a", "c"], c=["b"], self=["self"]))
    assert found["real"] == 0 and found["a"] == 1
    assert found["b"] == 2 and found["self"] == 1 and found["c"] >= 1


def test_depth_of_a_long_chain_takes_no_recursion_and_little_time() -> None:
    ids = [f"n{i}" for i in range(20_000)]
    frame = pl.DataFrame({"id": ids, "origin": ["real"] + ["made"] * 19_999, "parents": [[], *([name] for name in ids[:-1])]})
    start = time.monotonic()
    found = depths(frame.with_columns(meta=pl.lit("{}")).reverse())
    assert found["depth"][0] == 19_999
    assert time.monotonic() - start < 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=30), st.randoms())
def test_depth_is_that_of_the_plain_definition_in_any_order(wanted: list[list[int]], rng: random.Random) -> None:
    links = {f"n{i}": [f"n{j}" for j in parents if j < i] for i, parents in enumerate(wanted)}
    real = {name for name in links if rng.random() < 0.3}
    plain: dict[str, int] = {}
    for name, parents in links.items():  # parents stand before their children
        plain[name] = 0 if name in real else 1 + max((plain[parent] for parent in parents), default=0)
    frame = family(**{name: None if name in real else parents for name, parents in links.items()})
    assert depth_of(frame) == plain
    assert depth_of(frame.sample(fraction=1, shuffle=True, seed=1)) == plain


def test_a_seed_that_an_earlier_version_made_is_not_real() -> None:
    real, other = chat("Where is it?", origin="real"), chat("Where now?", origin="real")
    old = other.model_copy(update={"meta": {"origin": "made", "round": 3}})
    deeper = chat("Where then?", origin="real").model_copy(update={"meta": {"origin": "made", "depth": 4}})
    new = chat("Where else?", teacher="small", round=1, parents=(real.id, deeper.id))
    assert depths(samples_frame([real, old, deeper, new]))["depth"].to_list() == [0, 1, 4, 5]
    figures = looked([real, old, deeper, new], 1)
    assert figures["real"] == 1 and figures["real_share"] == 1 / 4
    assert figures["made_parents"] == 0.5


# -- figures


def test_figures_of_descent_and_teachers_are_those_counted_by_hand() -> None:
    seeds = [chat(f"seed {i}", origin="real") for i in range(3)] + [chat("aside", origin="real").model_copy(update={"holdout": True})]
    first = [chat(f"first {i}", round=1, teacher="small", parents=(seeds[i].id,)) for i in range(3)]
    second = [chat(f"second {i}", round=2, teacher="big", parents=(seeds[0].id, first[i].id)) for i in range(2)]
    left = chat("not taken", round=2, teacher="big", parents=(second[0].id,))
    rows = [*seeds, *first, *second, left]
    found = looked(rows, 2, accepted=[row.id for row in (*first, *second)])
    assert found["accepted"] == 5 and found["real"] == 3 and found["real_share"] == 3 / 8
    assert found["depth_max"] == 2 and found["depth_mean"] == 7 / 5 and found["deeper_than_1"] == 2 / 5
    assert found["made_parents"] == 2 / 7
    assert (found["teacher"], found["teacher_share"]) == ("small", 3 / 5)
    assert found["herfindahl"] == pytest.approx(0.36 + 0.16)
    assert found["varied"] == {} and "tail" not in found and "first" not in found
    earlier = looked(rows, 1, accepted=[row.id for row in (*first, *second)])
    assert earlier["accepted"] == 3 and earlier["depth_max"] == 1


def test_figures_are_json_and_do_not_hang_on_order() -> None:
    real, made = dealt(1)
    rows = rows_of(real, [made[:90], made[90:]])
    found = looked(rows, 2)
    assert json.loads(json.dumps(found)) == found
    assert {"tail", "first", "newest", "varied", "teachers"} <= found.keys()
    assert looked(random.Random(0).sample(rows, len(rows)), 2) == found


def test_a_run_without_accepted_rows_has_figures_and_no_alarm() -> None:
    real, _ = dealt(1)
    found = looked(rows_of(real, []), 1)
    assert found["accepted"] == 0 and found["real_share"] == 1
    assert alarms([found], Watch(real_at_least=0.5, teacher_at_most=0.5)) == ()
    assert looked([], 1)["accepted"] == 0


def test_tail_is_a_fifth_of_like_rows_and_gone_where_the_outer_ones_are() -> None:
    real, made = dealt(2)
    frame = samples_frame(rows_of(real, [made]))
    real_rows, like = frame.filter(pl.col("origin") == "real"), frame.filter(pl.col("origin") == "made")
    assert 0.1 < tail_mass(like, real_rows, embed) < 0.35
    inner = like[np.argsort(-(embed(like["input"].to_list()) @ embed(real).mean(axis=0)))[:100]]
    assert tail_mass(inner, real_rows, embed) < 0.05
    assert tail_mass(like.head(99), real_rows, embed) is None
    assert tail_mass(like, real_rows.head(29), embed) is None
    assert tail_mass(like, pl.concat([real_rows.head(29)] * 4), embed) is None  # copies of a real row are one


def test_tail_is_that_of_the_plain_definition() -> None:
    drawn = np.random.default_rng(0).normal(size=(180, 8))
    vectors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    rows = samples_frame(chat(str(i), origin="real" if i < 60 else "made") for i in range(180))
    found = tail_mass(rows[60:], rows[:60], lambda texts: vectors[[int(text) for text in texts]])

    def fifth(row: int) -> float:
        return sorted(1 - float(vectors[row] @ vectors[other]) for other in range(60) if other != row)[4]

    edge = np.quantile([fifth(row) for row in range(60)], 0.8)
    assert found == pytest.approx(np.mean([fifth(row) >= edge for row in range(60, 180)]))


def test_tail_weighs_labels_as_the_real_rows_do() -> None:
    real, made = dealt(2)
    frame = samples_frame(rows_of(real, [made]))
    real_rows, like = frame.filter(pl.col("origin") == "real"), frame.filter(pl.col("origin") == "made")
    of_label = dict(like.group_by("label").agg("id").iter_rows())
    often = sorted(of_label)[0]
    copies = [like.filter(pl.col("label") == often).with_columns(id=pl.col("id") + f"-{i}") for i in range(8)]
    skewed = pl.concat([like, *copies])  # 200 rows and copies of one label: as many as may be looked at
    assert tail_mass(skewed, real_rows, embed) == pytest.approx(tail_mass(like, real_rows, embed))


# -- alarms over rounds


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_raises_no_alarm_and_a_collapsing_one_is_stopped(seed: int) -> None:
    real, made = dealt(seed)
    assert alarms(by_round(rows_of(real, [made[:70], made[70:140], made[140:]]), 3), Watch()) == ()

    rounds = [made[:100], *collapsing(made[:100], (4, 2, 1), random.Random(seed))]
    raised = alarms(by_round(rows_of(real, rounds), 4), Watch())
    assert {alarm.name for alarm in raised} == {"diversity_drop_at_most"}
    assert raised[-1].round == 4 and raised[-1].stops and raised[-1].value > 0.5
    assert [alarm.value for alarm in raised] == sorted(alarm.value for alarm in raised)


def test_without_labels_a_collapse_is_seen_in_the_whole() -> None:
    real, made = dealt(4)
    rng = random.Random(4)
    few = [reworded(rng.choice(made[:4]), rng)[0] for _ in range(70)]
    rows = [chat(text, origin="real") for text in real]
    rows += [chat(text, round=number, teacher="small") for number, texts in enumerate((made[:70], set(few)), 1) for text in texts]
    (alarm,) = alarms(by_round(rows, 2), Watch())
    assert alarm.name == "diversity_drop_at_most" and alarm.round == 2 and "(NovelSum 0." in alarm.sentence


def test_rows_without_the_outer_ones_raise_the_alarm_of_the_tail() -> None:
    real, made = dealt(5)
    order = np.argsort(-(embed(made) @ embed(real).mean(axis=0)))
    inner = [made[row] for row in order[:80]]
    rng = random.Random(0)
    rows = rows_of(real, [inner, [reworded(text, rng) for text in inner]])
    (alarm,) = alarms([looked(rows, 2)], Watch(tail_at_least=0.05))
    assert alarm.name == "tail_at_least" and alarm.stops
    assert alarms([looked(rows_of(real, [made]), 1)], Watch(tail_at_least=0.05)) == ()


def test_a_late_round_that_fills_one_label_is_compared_with_rows_of_that_label() -> None:
    thin = [text for text in TEXTS if LABELS[text] == "transfer_fee_charged"]
    others = [text for text in TEXTS if LABELS[text] != "transfer_fee_charged"]
    rows = rows_of([], [others[:100] + thin[:15], [*thin[15:], *((text + " Thanks", LABELS[text]) for text in thin)]])
    assert looked(rows, 2).keys().isdisjoint({"first", "newest"})  # 15 pairs say nothing
    twice = [(text + end, LABELS[text]) for text in thin for end in (" Thanks", " Please tell me")]
    doubled = rows_of([], [others[:100] + twice[:60:2] + thin, [*twice[1::2], *((text + " Hello", LABELS[text]) for text in thin)]])
    assert alarms([looked(doubled, 2)], Watch()) == ()
    anywhere = samples_frame(doubled).select("id", cell=pl.lit("anywhere"))
    (alarm,) = alarms([looked(doubled, 2, cells=anywhere)], Watch())  # what it would be against rows of all labels
    assert alarm.name == "diversity_drop_at_most"


def test_a_teacher_that_repeats_itself_from_call_50_on_is_named_and_no_other() -> None:
    """Two teachers, 25 calls a round each, a message a call; filters and failures are real ones."""
    fresh, stuck = TEXTS[:100], TEXTS[100:150]
    kept, verdicts, failures, figures = samples_frame([]), [NO_VERDICTS], [NO_FAILURES], []
    everything: list[Sample] = []
    for number in range(1, 5):
        calls = range(25 * number - 25, 25 * number)
        made = [chat(fresh[call], round=number, teacher="fresh") for call in calls]
        answers = [stuck[call] if call < 50 else stuck[call % 50] + ("" if call % 2 else " !") for call in calls]
        known = {row.id for row in everything}
        again = [text for text in answers if chat(text).id in known]
        made += [chat(text, round=number, teacher="stuck") for text in answers if text not in again]
        new = samples_frame(made)
        judged = Exact().judge(new, FakeContext(kept=kept)).with_columns(by=pl.lit("03-exact"), round=pl.lit(number, pl.Int64))
        lost = failures_frame(Failure(reason="repeat", text=text, teacher="stuck") for text in again)
        verdicts.append(judged)
        failures.append(lost.with_columns(stage=pl.lit("02-compose"), round=pl.lit(number, pl.Int64)))
        everything += made
        kept = pl.concat([kept, new.join(judged.filter("keep"), left_on="id", right_on="sample", how="semi")])
        told = {"verdicts": pl.concat(verdicts), "failures": pl.concat(failures), "accepted": kept["id"].to_list()}
        figures.append(looked(everything, number, **told))
    assert figures[0]["teachers"] == {name: {"made": 25, "duplicates": 0, "good": 25} for name in ("fresh", "stuck")}
    assert figures[2]["teachers"]["stuck"] == {"made": 25, "duplicates": 25, "good": 0}
    assert figures[2]["teachers"]["fresh"]["duplicates"] == 0
    raised = alarms(figures, Watch())
    assert [(alarm.name, alarm.round, alarm.teacher, alarm.stops) for alarm in raised] == [
        ("repeats_at_most", 3, "stuck", False),
        ("repeats_at_most", 4, "stuck", False),
    ]
    assert "stuck" in raised[0].sentence and "25 of 25" in raised[0].sentence and "100%" in raised[0].sentence


def test_who_made_little_is_not_said_to_repeat() -> None:
    few = {"round": 1, "teachers": {"small": {"made": 19, "duplicates": 19, "good": 0}}}
    assert alarms([few], Watch()) == ()


# -- thresholds

CROSSED: Mapping[str, Any] = {
    "round": 4,
    "accepted": 100,
    "real": 5,
    "real_share": 5 / 105,
    "depth_max": 3,
    "deeper_than_1": 0.4,
    "teacher": "small",
    "teacher_share": 0.875,
    "tail": 0.01,
    "first": {"rounds": [1, 2], "rows": 60, "novelsum": 0.66, "distinct_1_in_100": 0.8, "distinct_2_in_100": 0.9},
    "newest": {"rounds": [4, 4], "rows": 60, "novelsum": 0.41, "distinct_1_in_100": 0.8, "distinct_2_in_100": 0.85},
    "teachers": {"big": {"made": 50, "duplicates": 5, "good": 30}, "small": {"made": 40, "duplicates": 31, "good": 2}},
}
ALL = Watch(real_at_least=0.1, teacher_at_most=0.8)
SAID = {
    "real_at_least": ("after round 4", "4.8%", "10%", "5 beside 100", "watch.real_at_least"),
    "depth_at_most": ("after round 4", "3 generations", "2 at most", "40%", "watch.depth_at_most"),
    "teacher_at_most": ("small", "88%", "80%", "watch.teacher_at_most"),
    "diversity_drop_at_most": ("round 4", "38% less", "NovelSum 0.41, 0.66 in rounds 1 to 2", "60 rows", "diversity_drop_at_most (0.3)"),
    "tail_at_least": ("after round 4", "1%", "20%", "2%", "watch.tail_at_least"),
    "repeats_at_most": ("small", "31 of 40", "round 4", "78%", "50%", "watch.repeats_at_most"),
}


def test_every_threshold_has_its_alarm_its_action_and_its_sentence() -> None:
    raised = {alarm.name: alarm for alarm in alarms([CROSSED], ALL)}
    assert raised.keys() == STOPS.keys() == Watch.model_fields.keys() == SAID.keys()
    for name, alarm in raised.items():
        assert alarm.round == 4 and alarm.stops == STOPS[name] and alarm.threshold == getattr(ALL, name)
        assert not [words for words in SAID[name] if words not in alarm.sentence], alarm.sentence
    assert raised["repeats_at_most"].teacher == raised["teacher_at_most"].teacher == "small"
    assert {name for name, stops in STOPS.items() if not stops} == {"teacher_at_most", "repeats_at_most"}


@pytest.mark.parametrize("name", Watch.model_fields)
def test_a_threshold_of_null_switches_its_alarm_off_and_no_other(name: str) -> None:
    raised = alarms([CROSSED], ALL.model_copy(update={name: None}))
    assert {alarm.name for alarm in raised} == STOPS.keys() - {name}


def test_a_value_on_its_threshold_raises_nothing() -> None:
    edge = Watch(real_at_least=5 / 105, depth_at_most=3, teacher_at_most=0.875, tail_at_least=0.01, repeats_at_most=31 / 40)
    assert [alarm.name for alarm in alarms([CROSSED], edge)] == ["diversity_drop_at_most"]
    assert alarms([CROSSED], edge.model_copy(update={"diversity_drop_at_most": 1 - 0.41 / 0.66})) == ()


def test_a_share_next_to_its_threshold_is_told_with_a_decimal() -> None:
    (alarm,) = alarms([{"round": 2, "teacher": "small", "teacher_share": 0.803}], Watch(teacher_at_most=0.8))
    assert "80.3%" in alarm.sentence


@pytest.mark.parametrize("wrong", [{"tail_at_least": 2}, {"depth_at_most": 0}, {"real_at_least": float("nan")}, {"tail": 0.1}])
def test_a_threshold_that_can_not_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ValidationError):
        Watch(**wrong)


# -- versions


def test_a_version_is_compared_with_the_one_before_over_equal_draws() -> None:
    real, made = dealt(3)
    before, small = looked(rows_of(real, [made]), 1), looked(rows_of(real, [made[:100]]), 1)
    assert list(before["varied"]) == ["40", "80", "160"] and list(small["varied"]) == ["40", "80"]
    assert {"4", "8"} <= before["varied_within"].keys()
    assert alarms_of_versions(before, small, Watch()) == ()
    rng = random.Random(3)
    collapsed = looked(rows_of(real, collapsing(made, [1], rng)), 1)
    (alarm,) = alarms_of_versions(before, collapsed, Watch())
    assert alarm.name == "diversity_drop_at_most" and alarm.round is None and alarm.stops
    assert "NovelSum within a place" in alarm.sentence and "8 rows of each label" in alarm.sentence
    of_few = [chat(reworded(rng.choice(made[:4]), rng)[0], round=1) for _ in range(100)]
    (alarm,) = alarms_of_versions({"varied": before["varied"]}, looked(of_few, 1), Watch())
    assert "in the version before; 80 rows each" in alarm.sentence
    halved = {"varied": {"80": before["varied"]["80"], "160": {"novelsum": before["varied"]["160"]["novelsum"] / 2}}}
    (alarm,) = alarms_of_versions(before, halved, Watch())
    assert "50% less varied" in alarm.sentence and "160 rows each" in alarm.sentence
    assert alarms_of_versions(None, before, Watch()) == ()
    assert [alarm.name for alarm in alarms_of_versions(None, CROSSED, ALL)] == [
        "real_at_least",
        "depth_at_most",
        "teacher_at_most",
        "tail_at_least",
    ]


def test_preferences_of_conversations_that_are_there_do_not_count_as_less_variety() -> None:
    real, made = dealt(3)
    rows = rows_of(real, [made])
    alone = looked(rows, 1)
    wrong = (Message(role="assistant", content="no_such_label"),)
    pairs = [
        row.model_copy(update={"messages": row.messages[:-1], "chosen": row.messages[-1:], "rejected": wrong})
        for row in rows
        if row.provenance.origin == "made"
    ]
    assert looked([*rows, *pairs], 1)["varied"] == alone["varied"]
    of_pairs = looked([*(row for row in rows if row.provenance.origin == "real"), *pairs], 1)
    assert of_pairs["varied"].keys() == alone["varied"].keys()  # where they stand alone, they are what is measured


def test_a_released_version_has_the_figures_of_its_run(tmp_path: Path) -> None:
    run = bank_run(tmp_path / "run")
    folder = release(run, name="bank", plan=ReleasePlan(), datasets=tmp_path / "datasets", embed=embed, facts=facts())
    found = look_at_version(folder, embed)
    of_run = looked_at_run(run)
    lineage = pl.read_parquet(folder / "lineage.parquet")
    assert found["accepted"] == lineage.filter(pl.col("origin") == "made").height == run.accepted.height
    assert found["real_share"] == pytest.approx(lineage.filter(pl.col("origin") == "real").height / lineage.height)
    for name in ("depth_max", "depth_mean", "teacher", "teacher_share", "herfindahl", "varied"):
        assert found[name] == of_run[name]
    assert alarms_of_versions(of_run, found, Watch()) == ()
    (folder / "lineage.parquet").chmod(0o644)
    lineage.drop("depth").write_parquet(folder / "lineage.parquet")  # as an earlier Gristmill wrote it
    assert look_at_version(folder, embed) == found


def looked_at_run(run: Any) -> dict[str, Any]:
    return look(run.samples, run.verdicts, run.failures, accepted=run.accepted["id"], number=2, embed=embed)


def test_a_run_on_disk_tells_what_each_teacher_made(tmp_path: Path) -> None:
    found = looked_at_run(bank_run(tmp_path / "run"))
    teachers = found["teachers"]
    run = bank_run(tmp_path / "again")
    made = run.samples.filter((pl.col("round") == 2) & (pl.col("origin") == "made"))
    assert {name: told["made"] for name, told in teachers.items()} == dict(made["teacher"].value_counts().iter_rows())
    first = look(run.samples, run.verdicts, run.failures, accepted=run.accepted["id"], number=1, embed=embed)["teachers"]
    assert first["big"]["duplicates"] == 1  # a failure: it had been made before
    assert first["small"]["duplicates"] == 2 and first["small"]["made"] > first["small"]["good"] + 2  # near ones; others were turned down


def test_an_alarm_can_be_written_down() -> None:
    (alarm, *_) = alarms([CROSSED], ALL)
    assert Alarm(**json.loads(json.dumps(vars(alarm)))) == alarm
