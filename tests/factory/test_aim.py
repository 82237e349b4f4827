"""Where effort goes: to what gives good rows for its price, with a floor for the rest, and not on and on to where nothing comes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pytest

from factory.aim import DRAWS, MEMORY, TRIED, Arm, Yields, aim_of, as_place, effort, given_up, orders, rates, servable, told
from factory.cells import REST, Grid
from factory.stage import Effort, Need

GRID = Grid(10, {"label": {"a": 5, "b": 5}})
A = '{"label": "a"}'
TWO = [Arm("02-compose", "small", 0.5), Arm("02-compose", "big", 0.5)]


def evidence(*rows: dict[str, Any]) -> pl.DataFrame:
    plain = {"line": "02-compose", "aim": A, "round": 1, "calls": 20, "made": 100, "tried": 100, "good": 0, "micro_usd": 0}
    return pl.DataFrame([{**plain, **row} for row in rows], schema=TRIED)


def shares(tried: pl.DataFrame, arms: list[Arm] = TWO, number: int = 2, explore: float = 0.1, aim: str = A) -> dict[str, float]:
    """The mean over 20 seeds."""
    yields = Yields(tried, number)
    found: Counter[str] = Counter()
    for seed in range(20):
        for arm, part in effort(arms, aim, yields, np.random.default_rng(seed), explore).items():
            found[arm.teacher] += part / 20
    return dict(found)


def test_before_anything_is_known_effort_follows_the_weights() -> None:
    assert shares(evidence()) == pytest.approx({"small": 0.5, "big": 0.5})
    third = [Arm("02-a", "t", 0.5), Arm("03-b", "u", 1.0)]  # more than all of the work: scaled
    assert shares(evidence(), third) == pytest.approx({"t": 1 / 3, "u": 2 / 3})
    assert shares(evidence(), [Arm("02-a", "t", 0.3)]) == pytest.approx({"t": 0.3})


def test_effort_goes_where_good_rows_are_and_explores_the_rest() -> None:
    found = shares(evidence({"teacher": "small", "good": 5}, {"teacher": "big", "good": 60}))
    assert found["big"] > 0.9 and found["small"] >= 0.05 - 1e-9  # half of the tenth that is explored
    assert sum(found.values()) == pytest.approx(1)
    assert shares(evidence({"teacher": "small", "good": 5}, {"teacher": "big", "good": 60}), explore=1.0)["small"] == pytest.approx(0.5)


def test_a_dear_teacher_must_be_as_much_better() -> None:
    cheap = {"teacher": "small", "good": 30, "micro_usd": 1_000}
    assert shares(evidence(cheap, {"teacher": "big", "good": 60, "micro_usd": 10_000}))["small"] > 0.9
    assert shares(evidence(cheap, {"teacher": "big", "good": 60, "micro_usd": 1_200}))["big"] > 0.9
    unknown = shares(evidence(cheap, {"teacher": "big", "good": 60, "micro_usd": None}))
    assert unknown["big"] > 0.9  # where a price is unknown, calls are counted


def test_what_was_long_ago_weighs_less() -> None:
    fell = evidence(
        *({"teacher": "small", "good": 50, "round": n} for n in (1, 2)),
        *({"teacher": "small", "good": 2, "round": n} for n in (3, 4)),
        *({"teacher": "big", "good": 25, "round": n} for n in (1, 2, 3, 4)),
    )
    assert shares(fell.filter(pl.col("round") < 3), number=3)["small"] > 0.8
    assert shares(fell, number=5)["big"] > 0.8


def test_a_new_cell_is_believed_to_be_like_the_others() -> None:
    elsewhere = evidence({"teacher": "small", "good": 2, "aim": '{"label": "b"}'}, {"teacher": "big", "good": 60, "aim": '{"label": "b"}'})
    assert shares(elsewhere)["big"] > 0.8


def test_the_recipes_own_proportions_stay() -> None:
    fixed = [Arm("02-a", "small", 0.5, fixed=True), *(Arm("03-b", name, 0.25) for name in ("mid", "big"))]
    tried = [
        {"teacher": "small", "line": "02-a"},
        {"teacher": "mid", "line": "03-b"},
        {"teacher": "big", "line": "03-b", "good": 80},
    ]
    found = shares(evidence(*tried), fixed)
    assert found["small"] == pytest.approx(0.5)
    assert found["big"] > 0.4


def test_the_same_seed_gives_the_same_orders_and_another_may_not() -> None:
    lines = {"02-compose": Effort({"small": 0.5, "big": 0.5})}
    yields = Yields(evidence({"teacher": "small", "good": 9}, {"teacher": "big", "good": 11}), 2)
    place = {cell: as_place(GRID, cell) for cell in (("a",), ("b",))}

    def once(seed: str) -> Any:
        return orders({("a",): 5, ("b",): 2}, GRID, lines, yields, seed, explore=0.1, place=place)

    assert once("x") == once("x")
    assert {tuple(need.teachers.items()) for need in once("x")["02-compose"]} != {
        tuple(need.teachers.items()) for need in once("y")["02-compose"]
    }
    first, second = once("x")["02-compose"]
    assert (first.label, first.missing, first.aim) == ("a", 5, A)
    assert first.rate == pytest.approx(0.1, abs=0.03)
    assert (second.label, second.missing) == ("b", 2)


def test_lines_share_the_rows_to_the_last_one() -> None:
    lines = {"02-a": Effort({"t": 0.5}), "03-b": Effort({"t": 0.5})}
    many = Grid(11, {"label": {str(n): 1 for n in range(11)}})
    lacking = {(str(n),): 1 for n in range(11)}
    found = orders(lacking, many, lines, Yields(evidence(), 1), "s", explore=0.1, place={cell: as_place(many, cell) for cell in lacking})
    sums = {line: sum(need.missing for need in needs) for line, needs in found.items()}
    assert sum(sums.values()) == 11
    assert set(sums.values()) == {5, 6}


def test_a_place_goes_to_lines_that_can_make_it() -> None:
    grid = Grid(10, {"case": {"edge": 2, REST: 8}})
    lines = {"02-a": Effort({"t": 1.0}), "03-b": Effort({"t": 1.0}, axes={"case": ("edge",)})}
    lacking = {("edge",): 2, (REST,): 8}
    found = orders(lacking, grid, lines, Yields(evidence(), 1), "s", explore=0.1, place={cell: as_place(grid, cell) for cell in lacking})
    assert [(need.axes, need.without, need.missing) for need in found["03-b"]] == [({"case": "edge"}, {}, 2)]
    assert [(need.axes, need.without, need.missing) for need in found["02-a"]] == [({}, {"case": ("edge",)}, 8)]


def test_a_kind_is_asked_of_a_line_that_makes_it() -> None:
    grid = Grid(10, {"kind": {"preference": 2, REST: 8}, "tone": {"angry": 10}})
    chats, pairs = Effort({"t": 1.0}, axes={"tone": ("angry",)}, kinds=("chat",)), Effort({"t": 1.0}, kinds=("preference",), follows=True)
    lacking = {("preference", "angry"): 2, (REST, "angry"): 8}
    place = {cell: as_place(grid, cell) for cell in lacking}
    found = orders(lacking, grid, {"02-a": chats, "03-b": pairs}, Yields(evidence(), 1), "s", explore=0.1, place=place)
    assert [(need.kind, need.missing) for need in found["03-b"]] == [("preference", 2)]
    assert [(need.without, need.missing) for need in found["02-a"]] == [({"kind": ("preference",)}, 8)]
    assert servable(Counter(lacking), grid, {"02-a": chats})[1] == Counter({("preference", "angry"): 2})
    assert Effort({"": 1.0}).serves(Need(1, kind="text"))  # of a generator that does not say, any kind may come


def test_cells_that_no_line_can_make_trade_their_values() -> None:
    grid = Grid(4, {"case": {"edge": 2, REST: 2}, "tone": {"angry": 2, REST: 2}})
    lines = {"02-a": Effort({"t": 1.0}, axes={"tone": ("angry", "calm")}), "03-b": Effort({"t": 1.0}, axes={"case": ("edge",)})}
    apart = Counter({("edge", REST): 2, (REST, "angry"): 2})
    assert servable(Counter({("edge", "angry"): 2, (REST, REST): 2}), grid, lines) == (apart, Counter())
    assert servable(Counter({("edge", "angry"): 2}), grid, lines) == (Counter(), Counter({("edge", "angry"): 2}))


def test_a_cell_is_given_up_after_three_rounds_of_nothing_and_not_before() -> None:
    dry = [{"teacher": "t", "round": n, "good": 0, "tried": 20} for n in (1, 2, 3)]
    assert given_up(evidence(*dry), [A]) == {A}
    assert given_up(evidence(*dry[:2]), [A]) == set()
    assert given_up(evidence(*dry[:2], {**dry[2], "good": 1}), [A]) == set()
    assert given_up(evidence(*({**row, "tried": 15} for row in dry)), [A]) == set()  # 45 samples of one in twenty may all be bad
    little = [{"teacher": "t", "round": n, "good": 1, "tried": 50, "aim": '{"label": "b"}'} for n in (1, 2)]
    assert given_up(evidence(*dry, *little), [A]) == set()  # where one in fifty comes anywhere, sixty say little
    both = ['{"label": "a", "tone": "angry"}', '{"label": "b", "tone": "calm"}']
    other = [{**row, "aim": '{"label": "b", "tone": "angry"}'} for row in dry]
    assert given_up(evidence(*other), both) == set()  # neither of them was tried, and b may go well with another tone
    third = [{**row, "aim": '{"label": "c", "tone": "angry"}'} for row in dry]
    assert given_up(evidence(*other, *third), both) == {both[0]}  # angry is what nobody writes


def test_cells_have_names_for_records_and_for_people() -> None:
    assert aim_of(GRID, ("a",)) == A
    assert told(A) == "label: a"
    assert (aim_of(Grid(3), ()), told("{}")) == ("{}", "anywhere")
    grid = Grid(4, {"label": {"a": 1, REST: 3}, "cluster": {"0": 4}, "kind": {"chat": 4}, "refusal": {"yes": 1, REST: 3}})
    assert as_place(grid, (REST, "0", "chat", REST)) == Need(missing=0, cluster="0", kind="chat", without={"label": ("a",)})


def test_a_draw_is_no_finer_than_it_says() -> None:
    part = effort(
        TWO, A, Yields(evidence({"teacher": "small", "good": 50}, {"teacher": "big", "good": 50}), 2), np.random.default_rng(0), 0.0
    )
    assert all(share * DRAWS == pytest.approx(round(share * DRAWS)) for share in part.values())


def test_a_cell_that_gave_nothing_is_asked_for_more_and_more_but_not_at_once() -> None:
    def rate(*rounds: int) -> float:
        return Yields(evidence(*({"teacher": "t", "round": n} for n in rounds)), 9).least_rate(A)

    assert [rate(), rate(1), rate(1, 2), rate(1, 2, 3), rate(1, 2, 3, 4)] == [0.05, 0.25, 0.125, 0.0625, 0.03125]
    came = [{"teacher": "t", "good": 1}, *({"teacher": "t", "round": n} for n in (2, 3, 4))]
    assert [Yields(evidence(*came[:n]), 9).least_rate(A) for n in (1, 2, 3, 4)] == [0.05, 0.025, 0.0125, 0.0125]


def test_a_plan_asks_at_the_rates_of_a_run() -> None:
    grid = Grid(30, {"label": {"a": 10, "b": 10, "c": 10}})
    aims = [aim_of(grid, (label,)) for label in "abc"]
    came = {1: ((6, 20), (0, 20), (2, 20)), 2: ((1, 8), (0, 40), (0, 30)), 3: ((0, 20), (0, 80), (0, 60))}  # good of tried, by round
    rows = [
        {"teacher": "t", "aim": aim, "round": number, "good": good, "tried": tried}
        for number, of_round in came.items()
        for aim, (good, tried) in zip(aims, of_round, strict=True)
    ]
    lacking = dict.fromkeys((("a",), ("b",), ("c",)), 5)
    place = {cell: as_place(grid, cell) for cell in lacking}
    found = orders(lacking, grid, {"02-compose": Effort({"t": 1.0})}, Yields(evidence(*rows), 4), "s", explore=0.1, place=place)
    weights = [MEMORY ** (3 - number) for number in came]
    good, tried = (
        np.array([sum(w * of_round[i][k] for w, of_round in zip(weights, came.values(), strict=True)) for i in range(3)]) for k in (0, 1)
    )
    planned = rates(good, tried, np.array([1, 3, 2]), np.array([True, False, True]))
    assert planned == pytest.approx([need.rate for need in sorted(found["02-compose"], key=lambda need: str(need.label))])
    assert planned[1] == 0.0625  # three rounds in vain
