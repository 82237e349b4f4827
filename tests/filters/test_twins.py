import numpy as np
import polars as pl
import pytest

from filters.twins import Pairs, nearest, plain, standing, stays, verdicts
from tests.context import chat, frame


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
    rows = standing(new, kept, "input")
    early = sorted([chat("a").id, chat("b").id])
    assert rows["id"].to_list() == [chat("kept").id, chat("real").id, *early, chat("late").id]
    assert rows["new"].to_list() == [False, True, True, True, True]
    assert standing(new.reverse(), kept, "input").equals(rows)


def test_a_kept_row_that_is_judged_again_is_not_its_own_twin() -> None:
    rows = frame(chat("a"), chat("b"))
    assert standing(rows, rows, "input")["new"].to_list() == [True, True]


def test_what_is_compared() -> None:
    rows = frame(chat("question", "answer"))
    assert [standing(rows, rows, what)["compared"].item() for what in ("input", "output", "both")] == [
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
    rows = standing(frame(chat("b"), chat("c")), frame(chat("a")), "input")
    twin = np.array([-1, 0, -1])
    given = verdicts(rows, np.array([True, False, True]), twin, np.array([np.nan, 0.9, np.nan]), "duplicate")
    assert given["sample"].to_list() == rows["id"].to_list()[1:]
    assert given["keep"].to_list() == [False, True]
    assert given["reason"].to_list() == ["duplicate", None]
    assert given["score"].to_list() == [0.9, None]
    assert given["detail"].str.json_path_match("$.twin").to_list() == [chat("a").id, None]
