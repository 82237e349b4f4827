"""What a target asks for, cell by cell: quotas add up, choices are exact, and what is missing is dealt so that all of it can be had."""

from __future__ import annotations

import random

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.cells import REST, Grid, apportion, by_value, cells_of, grid_of, how_many, missing
from factory.errors import RunError
from schemas.recipe import Target
from tests.context import chat, frame

SEEDS = frame(*[chat(f"{label} {i}", label, origin="real") for label in "abc" for i in range(2)])
TONES = {"tone": ("curt", "polite", "angry")}


def grid(target: Target, **clusters: float) -> Grid:
    return grid_of(target, SEEDS, TONES, clusters)


def test_every_dimension_adds_up_to_the_target() -> None:
    assert grid(Target(accepted=10)).quotas == {}
    assert grid(Target(accepted=10, balance="label")).quotas == {"label": {"a": 4, "b": 3, "c": 3}}
    both = grid(Target(accepted=10, balance=("label", "tone"), quotas={"tone": {"angry": 0.5}}))
    assert both.quotas == {"label": {"a": 4, "b": 3, "c": 3}, "tone": {"angry": 5, "curt": 3, "polite": 2}}
    some = grid(Target(accepted=10, quotas={"label": {"a": 6}, "refusal": {"yes": 0.1}}))
    assert some.quotas == {"label": {"a": 6, REST: 4}, "refusal": {"yes": 1, REST: 9}}
    assert grid(Target(accepted=4, quotas={"kind": {"chat": 4}})).quotas == {"kind": {"chat": 4}}
    assert grid(Target(accepted=4, balance="kind")).quotas == {"kind": {"chat": 2, "preference": 2}}
    clusters = grid(Target(accepted=10, balance="cluster"), **{"0": 3.0, "1": 1.0})
    assert (clusters.quotas, clusters.soft) == ({"cluster": {"0": 8, "1": 2}}, {"cluster"})
    assert grid(Target(accepted=10, proportions={"x": 1.0}), **{"0": 1.0}).soft == frozenset()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target(accepted=10, balance="label", quotas={"label": {"z": 2}}), "names 'z'"),
        (Target(accepted=10, quotas={"label": {"a": 11}}), "asks for 11 rows, and the target is 10"),
        (Target(accepted=10, quotas={"tone": {"curt": 1, "polite": 1, "angry": 1}}), "asks for 3 rows, and the target is 10"),
        (Target(accepted=10, quotas={"kind": {"text": 1}}), "names 'text', and nothing has that value"),
        (Target(accepted=10, balance="mood"), "'mood', which no generator varies"),
    ],
)
def test_what_can_not_be_had_is_said(target: Target, says: str) -> None:
    with pytest.raises(RunError, match=says):
        grid(target)


def test_labels_that_no_seed_has_can_not_be_balanced() -> None:
    with pytest.raises(RunError, match="no seed has a label"):
        grid_of(Target(accepted=10, balance="label"), frame(chat("hi", origin="real")), {})


@given(st.integers(0, 500), st.dictionaries(st.text(max_size=3), st.floats(0, 10), min_size=1))
def test_apportioned_rows_are_whole_and_near_their_share(rows: int, shares: dict[str, float]) -> None:
    found = apportion(rows, shares)
    assert found.keys() == shares.keys()
    if total := sum(shares.values()):
        assert sum(found.values()) == rows
        assert all(abs(found[value] - rows * share / total) < 1 + 1e-6 for value, share in shares.items())


def test_a_row_is_of_one_value_in_every_dimension() -> None:
    rows = frame(
        chat("one", "a", axes={"to'\"ne": "angry"}),
        chat("two", "b", axes={"to'\"ne": "sad"}),
        chat("three", "z"),
        chat("I ask for harm", "I'm sorry, but I can't help with that."),
    )
    both = Grid(4, {"label": {"a": 2, "b": 2}, "to'\"ne": {"angry": 1, REST: 3}})
    assert cells_of(rows, both, {}) == [("a", "angry"), ("b", REST), None, None]
    assert cells_of(rows, Grid(4, {"refusal": {"yes": 1, "no": 3}}), {}) == [("no",), ("no",), ("no",), ("yes",)]
    homes = {rows["id"][0]: "0", rows["id"][1]: "7"}
    assert cells_of(rows, Grid(4, {"cluster": {"0": 4}}), homes) == [("0",), None, None, None]
    assert cells_of(rows, Grid(4), {}) == [()] * 4


def test_one_dimension_takes_its_quotas() -> None:
    one = Grid(5, {"label": {"a": 3, "b": 2}})
    assert how_many(one, {("a",): 9, ("b",): 1}) == {("a",): 3, ("b",): 1}
    assert how_many(one, {}) == {}
    assert how_many(Grid(5), {(): 3}) == {(): 3}


def test_two_dimensions_are_filled_together_and_stay_independent() -> None:
    two = Grid(20, {"label": {"a": 10, "b": 10}, "tone": {"x": 10, "y": 10}})
    full = how_many(two, {(label, tone): 25 for label in "ab" for tone in "xy"})
    assert full == {(label, tone): 5 for label in "ab" for tone in "xy"}  # not every a in the tone x
    greedy_would_fail = {("a", "x"): 10, ("a", "y"): 10, ("b", "x"): 10}
    assert how_many(two, greedy_would_fail) == {("a", "y"): 10, ("b", "x"): 10}


def test_a_soft_dimension_gives_way_and_a_hard_one_does_not() -> None:
    there = {("0",): 9, ("1",): 1}
    assert how_many(Grid(6, {"cluster": {"0": 3, "1": 3}}, frozenset({"cluster"})), there) == {("0",): 5, ("1",): 1}
    assert how_many(Grid(6, {"cluster": {"0": 3, "1": 3}}), there) == {("0",): 3, ("1",): 1}
    mixed = Grid(4, {"label": {"a": 2, "b": 2}, "cluster": {"0": 2, "1": 2}}, frozenset({"cluster"}))
    assert how_many(mixed, {("a", "0"): 9, ("b", "0"): 9}) == {("a", "0"): 2, ("b", "0"): 2}


CELLS = st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", REST]))
TWO = Grid(12, {"label": {"a": 5, "b": 4, "c": 3}, "tone": {"x": 6, "y": 2, REST: 4}})


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(CELLS, st.integers(0, 8)))
def test_a_choice_keeps_all_quotas_and_takes_only_what_is_there(there: dict[tuple[str, str], int]) -> None:
    taken = how_many(TWO, there)
    assert all(n <= there[cell] for cell, n in taken.items())
    for name, values in by_value(TWO, taken).items():
        assert all(n <= TWO.quotas[name][value] for value, n in values.items())
    assert taken == how_many(TWO, dict(reversed(list(there.items()))))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(CELLS, st.integers(0, 8)), st.integers(1, 5))
def test_what_is_missing_is_just_what_every_value_lacks(there: dict[tuple[str, str], int], run: int) -> None:
    lacking = missing(TWO, there, random.Random(0), run=run)
    have, lacks = by_value(TWO, there), by_value(TWO, lacking)
    short = {name: {value: max(0, n - have[name][value]) for value, n in quota.items()} for name, quota in TWO.quotas.items()}
    assert lacking.total() == max(sum(values.values()) for values in short.values())
    assert all(lacks[name][value] >= n for name, values in short.items() for value, n in values.items())
    assert lacking == missing(TWO, there, random.Random(0), run=run)


def test_oversampling_asks_for_more_than_is_taken() -> None:
    one = Grid(4, {"label": {"a": 2, "b": 2}})
    assert missing(one, {("a",): 5}, random.Random(0), 2.5) == {("b",): 5}
    assert missing(Grid(4), {(): 3}, random.Random(0), 2) == {(): 5}
    assert missing(Grid(4), {(): 9}, random.Random(0), 2) == {}


def test_nobody_is_asked_for_what_only_shows_in_an_answer() -> None:
    two = Grid(4, {"label": {"a": 2, "b": 2}, "refusal": {"yes": 1, "no": 3}})
    assert missing(two, {}, random.Random(0)) == {("a", REST): 2, ("b", REST): 2}
    assert missing(two, {("a", "no"): 2, ("b", "no"): 1}, random.Random(0)).total() == 1


def test_runs_of_a_calls_length_keep_cells_few() -> None:
    many = Grid(400, {"label": {str(n): 20 for n in range(20)}, "tone": {"x": 100, "y": 100, "z": 200}})
    scattered, together = (len(missing(many, {}, random.Random(0), run=run)) for run in (1, 20))
    assert together < 45 < scattered


def test_values_of_cells_leave_out_the_rest() -> None:
    assert TWO.values(("a", REST)) == {"label": "a"}
    assert pl.DataFrame(TWO.wanted(1.5)["label"]).row(0) == (8, 6, 5)
