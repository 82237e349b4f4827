"""Every registered stage, ours or a stranger's, is fed real rows and loses none; promises that hold for all of them stand here once."""

from __future__ import annotations

import json
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from factory import errors, plugins
from factory.stage import Filter, Generator
from factory.store import SAMPLES, VERDICTS
from factory.teacher import Teacher
from schemas.sample import Failure, Sample
from tests import small_models
from tests.context import FakeContext, chat, frame

SEEDS = Path(__file__).parent.parent / "examples" / "bank-intents" / "seeds.jsonl"
FILTERS = [key for key in plugins.names(plugins.STAGES) if issubclass(plugins.stage_class(key), Filter)]


NEEDED: dict[str, dict[str, Any]] = (
    {"judge": {"rubric": "label_fits"}, "panel": {"rubric": "helpfulness", "teachers": ("a", "b")}}
    | {key: {"compare": "both"} for key in ("exact", "near", "semantic")}
    | {"regex": {"pattern": "(?s).*"}, "function": {"module": "builtins:bool"}}
)  # what must be said
MODELLED = {"perplexity": "causal", "ifd": "causal", "reward": "classifier"}  # a model of this kind as well


def stage_of(key: str) -> Filter:
    model = {"model": small_models.made(MODELLED[key])} if key in MODELLED else {}
    stage = plugins.stage_class(key).model_validate(NEEDED.get(key, {}) | model)
    assert isinstance(stage, Filter)
    return stage


@pytest.fixture(scope="module")
def seeds() -> pl.DataFrame:
    rows = [json.loads(line)["messages"] for line in SEEDS.read_text().splitlines()]
    return frame(*[chat(user["content"], assistant["content"], origin="real") for user, assistant in rows])


def made() -> pl.DataFrame:
    rows = [
        chat("Why was my transfer to a friend rejected again?", "failed_transfer", logprob=-1.0),
        chat("Why was my transfer to a friend rejected  again", "failed_transfer", logprob=-1.1),
        chat("", "failed_transfer"),
        chat("<script>\x00 ünïcödé 🙂 " * 40, "no_such_label", logprob=-9.0),
        chat("I can't help with that, as an AI.", "transfer_timing"),
        chat("没有标签的中文消息"),
        Sample.model_validate({"text": "plain text\n\n", "provenance": {"origin": "made", "generator": "t"}}),
        Sample.model_validate(
            {
                "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
                "provenance": {"origin": "made", "generator": "t"},
            }
        ),
    ]
    return frame(*rows)


@pytest.mark.parametrize("key", FILTERS)
def test_a_filter_gives_exactly_one_verdict_on_every_sample(key: str, seeds: pl.DataFrame) -> None:
    stage = stage_of(key)
    asked = made() if stage.scope != "pool" else pl.concat([seeds, made()])
    ctx = FakeContext(seeds=seeds, answers=lambda _: '{"evidence": "fine", "score": 4}')
    verdicts = stage.judge(asked, ctx)
    assert verdicts.schema == VERDICTS
    assert sorted(verdicts["sample"]) == sorted(asked["id"])
    assert verdicts["keep"].null_count() == 0
    rejected = verdicts.filter(~pl.col("keep"))
    assert rejected["reason"].null_count() == 0, "a rejection has its reason"
    assert verdicts.filter("keep")["reason"].null_count() == verdicts.filter("keep").height
    for detail in verdicts["detail"]:
        assert isinstance(json.loads(detail), dict)


def poisoned() -> pl.DataFrame:
    """What a broken or hostile teacher may send; a row each."""
    texts = [
        "\x00\x01\x02",
        "(" * 20_000,
        "[" * 5_000 + "]" * 5_000,
        '{"a":' * 3_000,
        "9" * 5_000 + " * " + "9" * 5_000 + " = 1",
        "9**9**9**9",
        "\u202eevil\u202c \u200b\u200d\ufeff \U000e0041",
        "👩‍👩‍👧‍👦" * 500,
        "a" * 20_000,
        "```python\nwhile True: pass",
        "<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>",
        "&a [*a, *a]",
        "SELECT " * 2_000,
        "\n" * 10_000,
        "....@" * 2_000,
        "=" * 3_000,
    ]
    rows = [chat(text, "x") for text in texts] + [chat(f"What is {n}?", text) for n, text in enumerate(texts)]
    return frame(*rows)


@pytest.mark.parametrize("key", FILTERS)
def test_a_poisoned_row_never_ends_a_run(key: str, seeds: pl.DataFrame) -> None:
    stage = stage_of(key)
    asked = poisoned() if stage.scope != "pool" else pl.concat([seeds, poisoned()])
    verdicts = stage.judge(asked, FakeContext(seeds=seeds, answers=lambda call: call.messages[-1].content[:500]))
    assert sorted(verdicts["sample"]) == sorted(asked["id"])
    assert verdicts["keep"].null_count() == 0


@pytest.mark.parametrize("key", FILTERS)
def test_a_filter_judges_nothing_at_all_without_a_word(key: str, seeds: pl.DataFrame) -> None:
    stage = stage_of(key)
    assert stage.judge(SAMPLES.to_frame(), FakeContext(seeds=seeds, answers=lambda _: "")).height == 0


@pytest.mark.parametrize("key", FILTERS)
def test_a_filters_verdicts_do_not_depend_on_the_order_of_arrival(key: str, seeds: pl.DataFrame) -> None:
    stage = stage_of(key)
    asked = made() if stage.scope != "pool" else pl.concat([seeds, made()])

    def judged(rows: pl.DataFrame) -> pl.DataFrame:
        ctx = FakeContext(seeds=seeds, answers=lambda _: '{"evidence": "fine", "score": 4}')
        return stage.judge(rows, ctx).select("sample", "keep", "reason").sort("sample")

    assert judged(asked).equals(judged(asked.reverse()))


def test_a_generator_names_every_call_in_a_sample_or_a_failure(seeds: pl.DataFrame) -> None:
    from factory.stage import Need

    compose = plugins.stage_class("compose")()
    assert isinstance(compose, Generator)
    answers = iter(['["one new message here", "and another new one"]', "no list at all", "", '["cut', "1. a\n2. b"] * 100)
    ctx = FakeContext(seeds=seeds, needs=[Need(missing=20, label="failed_transfer")], answers=lambda _: next(answers))
    out = list(compose.generate(seeds, ctx))
    named = {item.call if isinstance(item, Failure) else item.provenance.call for item in out}
    assert {call.key("fake", "fake") for call in ctx.asked} == named


def test_a_plan_asks_what_a_run_would_ask(seeds: pl.DataFrame) -> None:
    from factory.stage import Need

    compose = plugins.stage_class("compose")()
    assert isinstance(compose, Generator)
    needs = [Need(missing=9, label="failed_transfer"), Need(missing=3, label="transfer_timing")]
    planned = list(compose.questions(seeds, FakeContext(seeds=seeds, needs=needs)))
    ctx = FakeContext(seeds=seeds, needs=needs, answers=lambda _: "[]")
    list(compose.generate(seeds, ctx))
    assert ctx.asked == planned
    assert len(planned) > 0


@pytest.mark.parametrize("kind", plugins.names(plugins.TEACHERS))
def test_a_teacher_says_in_its_first_line_what_it_is(kind: str) -> None:
    teacher = plugins.teacher_class(kind)
    assert issubclass(teacher, Teacher)
    assert teacher.kind == kind
    assert (teacher.__doc__ or "").strip()


def test_the_tree_of_errors_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.split()[0] if line.strip() else ""
        if name and hasattr(errors, name):
            depth = (len(line) - len(line.lstrip())) // 4
            parents = [*parents[:depth], name]
            drawn[name] = parents[depth - 1] if depth else "Exception"
    found = {n: c.__bases__[0].__name__ for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, Exception)}
    assert drawn == found


def test_no_other_distribution_owns_one_of_our_import_names() -> None:
    owners = packages_distributions()
    for name in ("schemas", "factory", "generators", "filters", "trainer"):
        assert set(owners.get(name, ["gristmill"])) == {"gristmill"}, f"{name} is also installed by {owners[name]}"
    assert any(d.metadata["Name"] == "gristmill" for d in distributions())
