import numpy as np
import polars as pl
import pytest

from factory.errors import GristmillError
from factory.pairs import Pairs, complete, nearest, stays
from factory.store import QUALITY
from filters.exact import Exact
from filters.near import Near
from filters.twins import groups, plain, standing, verdicts
from schemas.sample import Message, Provenance, Sample
from tests.context import FakeContext, chat, frame


def _pairs(*rows: tuple[int, int, float]) -> Pairs:
    earlier, later, likeness = zip(*rows, strict=True)
    return Pairs(np.array(earlier), np.array(later), np.array(likeness))


def test_a_row_stays_when_only_a_rejected_row_resembles_it() -> None:
    chain = _pairs((0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9))
    assert stays(chain, np.array([False, True, True, True])).tolist() == [True, False, True, False]


def test_kept_rows_stay_whatever_they_resemble() -> None:
    assert stays(_pairs((0, 1, 1.0), (1, 2, 1.0)), np.array([False, False, True])).tolist() == [True, True, False]


def test_the_nearest_is_the_likest_that_stays_and_the_earliest_of_equals() -> None:
    pairs = _pairs((0, 3, 0.8), (1, 3, 0.8), (2, 3, 0.99))
    twin, likeness = nearest(pairs, np.array([True, True, False, False]))
    assert twin.tolist() == [-1, -1, -1, 0]
    assert likeness[3] == 0.8
    assert np.isnan(likeness[:3]).all()


def test_standing_is_kept_then_real_then_round_then_id_whatever_the_order_of_the_frames() -> None:
    kept = frame(chat("kept", round=3))
    new = frame(chat("late", round=2), chat("real", origin="real", round=9), chat("b", round=1), chat("a", round=1))
    rows = standing(new, FakeContext(kept=kept), Exact())
    early = sorted([chat("a").id, chat("b").id])
    assert rows["id"].to_list() == [chat("kept").id, chat("real").id, *early, chat("late").id]
    assert rows["new"].to_list() == [False, True, True, True, True]
    assert standing(new.reverse(), FakeContext(kept=kept), Exact()).equals(rows)


def test_a_kept_row_that_is_judged_again_is_not_its_own_twin() -> None:
    rows = frame(chat("a"), chat("b"))
    assert standing(rows, FakeContext(kept=rows), Exact())["new"].to_list() == [True, True]


def test_what_is_compared() -> None:
    rows = frame(chat("question", "answer"))
    assert [standing(rows, FakeContext(kept=rows), Exact(compare=what))["compared"].item() for what in ("input", "output", "both")] == [
        "question",
        "answer",
        "question\nanswer",
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is my card?", "where is  my card"),
        ("ｆｕｌｌ width", "full width"),
        ("I don’t know!", "i don't know"),
        ("¿Dónde está?", "dónde está"),
        ('He said "no", twice.', "he said no twice"),
    ],
)
def test_differences_that_say_nothing_go(one: str, other: str) -> None:
    assert pl.select(plain(pl.lit(one)) == plain(pl.lit(other))).item()


@pytest.mark.parametrize(
    ("one", "other"), [("Use C#", "Use C"), ("3.5 litres", "35 litres"), ("-5 + 3", "5 + 3"), ("(a+b)*c", "a+b*c"), ("$5", "£5")]
)
def test_differences_that_say_something_stay(one: str, other: str) -> None:
    assert pl.select(plain(pl.lit(one)) != plain(pl.lit(other))).item()


def test_verdicts_are_on_new_rows_only_and_name_the_twin() -> None:
    rows = standing(frame(chat("b"), chat("c")), FakeContext(kept=frame(chat("a"))), Exact())
    twin = np.array([-1, 0, -1])
    given = verdicts(rows, np.array([True, False, True]), twin, np.array([np.nan, 0.9, np.nan]), "duplicate")
    assert given["sample"].to_list() == rows["id"].to_list()[1:]
    assert given["keep"].to_list() == [False, True]
    assert given["reason"].to_list() == ["duplicate", None]
    assert given["score"].to_list() == [0.9, None]
    assert given["detail"].str.json_path_match("$.twin").to_list() == [chat("a").id, None]


def test_what_ranking_filters_find_better_stands_first() -> None:
    good, poor, real = chat("good"), chat("poor"), chat("real", origin="real")
    quality = pl.DataFrame({"id": [good.id, poor.id], "quality": [0.9, 0.1]}, schema=QUALITY)
    rows = standing(frame(poor, good, real), FakeContext(quality=quality), Exact())
    assert rows["id"].to_list() == [real.id, good.id, poor.id]


def test_of_two_copies_the_better_one_stays() -> None:
    one, other = chat("Where is my card?"), chat("Where is my card?!")
    for best, worst in ((one, other), (other, one)):
        quality = pl.DataFrame({"id": [best.id, worst.id], "quality": [0.9, 0.1]}, schema=QUALITY)
        for stage in (Exact(), Near()):
            given = stage.judge(frame(one, other), FakeContext(quality=quality))
            assert dict(given.select("sample", "keep").iter_rows()) == {best.id: True, worst.id: False}


def test_rows_of_a_file_are_not_made_again(tmp_path) -> None:
    (tmp_path / "old.jsonl").write_text('{"text": "Where is my card?"}\n{"text": "Something else"}\n')
    same, own = chat("where is my card"), chat("A question of its own")
    for stage in (Exact(against=[tmp_path / "old.jsonl"]), Near(against=str(tmp_path / "old.jsonl"))):
        given = stage.judge(frame(same, own), FakeContext())
        assert dict(given.select("sample", "keep").iter_rows()) == {same.id: False, own.id: True}
        detail = given.filter(~pl.col("keep"))["detail"].str.json_path_match("$.against").item()
        assert detail == str(tmp_path / "old.jsonl")


def preference(prompt: str, chosen: str, rejected: str) -> Sample:
    turns = [(Message(role=role, content=text),) for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))]
    return Sample(messages=turns[0], chosen=turns[1], rejected=turns[2], provenance=Provenance(origin="made", generator="test"))


def test_for_preferences_the_text_that_counts_must_be_said() -> None:
    one, other = preference("Which?", "This one.", "That."), preference("Which?", "This one.", "Another.")
    with pytest.raises(GristmillError, match="preferences: say by which text"):
        Exact().judge(frame(one, other), FakeContext())
    kept = {
        what: Exact(compare=what).judge(frame(one, other), FakeContext())["keep"].sum()
        for what in ("input", "output", "both", "rejected", "all")
    }
    assert kept == {"input": 1, "output": 1, "both": 1, "rejected": 2, "all": 2}


def test_for_conversations_too() -> None:
    turns = tuple(Message(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    talk = Sample(messages=turns, provenance=Provenance(origin="made", generator="test"))
    with pytest.raises(GristmillError, match="several turns"):
        Near().judge(frame(talk), FakeContext())
    assert Near(compare="both").judge(frame(talk), FakeContext())["keep"].all()


def test_a_group_is_complete_where_each_is_like_each() -> None:
    chain = _pairs((0, 1, 0.9), (0, 2, 0.85), (2, 3, 0.9), (1, 2, 0.8), (0, 3, 0.8))  # 3 is like 0 and 2, not like 1
    stay, twin, likeness = complete(chain, np.ones(4, bool))
    assert stay.tolist() == [True, False, False, True]
    assert twin.tolist() == [-1, 0, 0, -1]
    assert likeness[1:3].tolist() == [0.9, 0.85]


def test_large_groups_are_named() -> None:
    rows = standing(frame(*(chat(f"text {n}") for n in range(60))), FakeContext(), Exact())
    twin = np.full(60, -1)
    twin[20:] = 0  # forty rows of one group
    twin[12:20] = np.arange(1, 9)  # and eight of two
    told = groups(rows, twin < 0, twin)
    assert told["count"] == 9
    assert told["larger_than_expected"] == [{"sample": rows["id"][0], "rows": 41}]
    assert groups(rows, np.ones(60, bool), np.full(60, -1)) == {"count": 0}
