"""A recipe says everything that is wrong with it at once, with lines, before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from factory.errors import GristmillError, RecipeError
from factory.recipe import load_recipe
from schemas.recipe import Target

GOOD = """\
name: tiny
target: {accepted: 10, balance: label}
teachers:
  echo: {kind: fake, model: fake}
stages:
  - seeds: {path: seeds.jsonl}
  - compose: {teachers: [echo]}
  - near: {threshold: 0.8}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "seeds.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "greeting"}]}\n'
    )
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path


def problems(folder: Path, text: str) -> list[tuple[int | None, str]]:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        load_recipe(folder)
    return [(p.line, p.message) for p in error.value.problems]


def test_a_good_recipe_names_its_folders_after_its_stages(folder: Path) -> None:
    recipe = load_recipe(folder)
    assert [line.folder for line in recipe.stages] == ["01-seeds", "02-compose", "03-near"]
    assert recipe.stages[0].stage.path == (folder / "seeds.jsonl").resolve()  # type: ignore[attr-defined]


def test_every_fault_is_reported_at_once_with_its_line_and_a_guess(folder: Path) -> None:
    text = """\
name: Tiny Set
target: {accepted: -3, balence: label}
teachers:
  echo: {kind: fak, model: fake}
  other: {kind: fake, model: fake, concurency: 2}
stages:
  - seeds: {path: seedz.jsonl}
  - compose: {teachers: [ohter]}
  - neer: {threshold: 0.8}
  - near: {treshold: 0.8}
extra: 1
"""
    found = problems(folder, text)
    expected = [
        (1, "Tiny Set"),
        (2, "accepted"),
        (2, "did you mean 'balance'"),
        (4, "did you mean 'fake'"),
        (5, "did you mean 'concurrency'"),
        (7, "did you mean 'seeds.jsonl'"),
        (8, "did you mean 'other'"),
        (9, "did you mean 'near'"),
        (10, "did you mean 'threshold'"),
        (11, "unknown key 'extra'"),
    ]
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, message), (_, part) in zip(found, expected, strict=True):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("name: [unclosed\n", "not YAML"),
        ("name: a\nname: b\n" + GOOD, "stands twice"),
        (GOOD.replace("  - seeds: {path: seeds.jsonl}\n", ""), "no stage brings seeds in"),
        (GOOD.replace("target: {accepted: 10, balance: label}\n", ""), "target is missing"),
        (GOOD.replace("teachers:\n  echo: {kind: fake, model: fake}\n", ""), "no teacher"),
        ("name: &x [*x]\n", "contains itself"),
        (GOOD.replace("{accepted: 10, balance: label}", "12"), "takes keys and values"),
        (GOOD + "  - near\n  - {a: 1, b: 2}\n", "a stage is one key"),
        (GOOD.replace("\n  echo: {kind: fake, model: fake}", " 5"), "teachers are names with settings"),
        (GOOD + "? [a, b]\n: 1\n", "not YAML: found unhashable key"),
        (GOOD.replace("  - compose: {teachers: [echo]}\n", ""), "no stage makes samples"),
    ],
)
def test_broken_recipes_say_what_is_wrong(folder: Path, text: str, part: str) -> None:
    assert part in " | ".join(message for _, message in problems(folder, text))


def test_a_budget_needs_known_prices(folder: Path) -> None:
    text = GOOD.replace("balance: label", "budget_usd: 1").replace(
        "{kind: fake, model: fake}", "{kind: openai, model: some, base_url: 'http://127.0.0.1:1/v1'}"
    )
    assert "price of teacher 'echo' is unknown" in problems(folder, text)[0][1]


def test_a_recipe_that_cannot_be_read_is_an_error_and_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(RecipeError, match="Permission denied"):
        load_recipe(folder)


def test_yes_no_on_and_off_are_words(folder: Path) -> None:
    axes = "{teachers: [echo], axes: {opener: [Yes, No, on]}}"
    (folder / "recipe.yaml").write_text(
        GOOD.replace("{teachers: [echo]}", axes).replace("near: {threshold: 0.8}", "rules: {off: [language]}")
    )
    recipe = load_recipe(folder)
    assert recipe.stages[1].stage.axes["opener"] == ("Yes", "No", "on")  # type: ignore[attr-defined]
    assert recipe.stages[2].stage.off == ("language",)  # type: ignore[attr-defined]


def test_no_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="gristmill init"):
        load_recipe(tmp_path)


def test_the_digest_follows_what_changes_the_rows_and_nothing_else(folder: Path) -> None:
    def digest(text: str = GOOD) -> str:
        (folder / "recipe.yaml").write_text(text)
        return load_recipe(folder).digest

    first = digest()
    assert digest(GOOD.replace("model: fake", "model: fake, concurrency: 3")) == first
    assert digest(GOOD.replace("balance: label", "balance: label, rounds: 2, budget_usd: 3")) == first
    assert digest("# a comment\n" + GOOD) == first
    assert digest(GOOD.replace("0.8", "0.9")) != first
    assert digest(GOOD.replace("accepted: 10", "accepted: 11")) != first
    assert digest() == first
    read = load_recipe(folder)
    assert (read.digest, read.changed("01-seeds")) == (first, [])
    (folder / "seeds.jsonl").write_text('{"prompt": "hello", "completion": "greeting"}\n')
    assert digest() != first
    assert (read.changed("01-seeds"), read.changed("02-compose")) == ([folder / "seeds.jsonl"], [])
    moved = folder.parent / "moved"
    folder.rename(moved)
    digest_before_move = load_recipe(moved).digest
    moved.rename(folder)
    assert digest_before_move == digest()


def test_what_only_asking_needs_is_not_asked_for_by_who_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    text = GOOD.replace("{kind: fake, model: fake}", "{kind: openai, model: some}")
    assert "OPENAI_API_KEY" in problems(folder, text)[0][1]
    assert load_recipe(folder, asking=False).name == "tiny"


def test_teachers_may_have_weights_and_are_checked_all_the_same(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(GOOD.replace("[echo]", "{echo: 3}"))
    load_recipe(folder)
    [(line, said)] = problems(folder, GOOD.replace("[echo]", "{eco: 3}"))
    assert (line, said) == (7, "no teacher is called 'eco'; did you mean 'echo'?")
    assert any("greater than 0" in said for _, said in problems(folder, GOOD.replace("[echo]", "{echo: 0}")))


def test_a_fallback_is_another_teacher_of_the_recipe(folder: Path) -> None:
    two = GOOD.replace("model: fake}", "model: fake, fallback: spare}\n  spare: {kind: fake, model: fake}")
    (folder / "recipe.yaml").write_text(two)
    load_recipe(folder)
    [(line, said)] = problems(folder, two.replace("fallback: spare", "fallback: spar"))
    assert (line, said) == (4, "no other teacher is called 'spar'; did you mean 'spare'?")
    assert problems(folder, two.replace("fallback: spare", "fallback: echo"))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("kind: openai, model: m, fallback: spare, limits: {requests_per_minute: 9}, mode: batch, batch_size: 7, poll_s: 1", "", True),
        ("kind: openai, model: m, structured: prompt", "", True),
        (
            "kind: openai, model: m, provider: us, base_url: 'http://a/v1'",
            "kind: openai, model: m, provider: us, base_url: 'http://b/v1'",
            True,
        ),
        ("kind: openai, model: m, base_url: 'http://a/v1'", "kind: openai, model: m, base_url: 'http://b/v1'", False),
        ("kind: openai, model: m, provider: us", "", False),
        ("kind: fake, mode: echo", "kind: fake, mode: numbered", False),
        ("kind: fake, latency_ms: 3", "kind: fake", True),
    ],
)
def test_what_only_changes_speed_or_bill_of_a_teacher_goes_on_in_the_same_run(folder: Path, one: str, other: str, same: bool) -> None:
    digests = set()
    for settings in (one, other or "kind: openai, model: m"):
        two = GOOD.replace("kind: fake, model: fake}", settings + "}\n  spare: {kind: fake}")
        (folder / "recipe.yaml").write_text(two)
        digests.add(load_recipe(folder, asking=False).digest)
    assert (len(digests) == 1) is same


def test_a_fallback_without_a_price_is_reported_like_a_teacher_without_one(folder: Path) -> None:
    spare = "model: fake, fallback: spare}\n  spare: {kind: openai, model: some, base_url: 'http://127.0.0.1:1/v1'}"
    text = GOOD.replace("balance: label", "budget_usd: 1").replace("model: fake}", spare)
    [(line, said)] = problems(folder, text)
    assert line == 5
    assert "price of teacher 'spare' is unknown" in said


def test_a_budget_loses_no_micro_dollar_to_floating_point() -> None:
    for cents in range(1, 2001):
        text = GOOD.replace("balance: label}", f"balance: label, budget_usd: {cents / 100}}}")
        assert Target.model_validate(yaml.safe_load(text)["target"]).budget_micro_usd == cents * 10_000


def test_a_file_inside_of_a_setting_is_a_file_of_the_recipe_too(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "recipe.yaml").write_text(GOOD.replace("near: {threshold: 0.8}", "rules: {output: {format: json, schema_file: a.json}}"))
    (folder / "a.json").write_text('{"type": "object"}')
    recipe = load_recipe(folder)
    assert recipe.stages[2].stage.output.schema_file == (folder / "a.json").resolve()  # type: ignore[attr-defined]
    moved = tmp_path_factory.mktemp("moved")
    for name in ("recipe.yaml", "seeds.jsonl", "a.json"):
        (moved / name).write_bytes((folder / name).read_bytes())
    assert load_recipe(moved).digest == recipe.digest
    assert recipe.changed("03-rules") == []
    (folder / "a.json").write_text('{"type": "array"}')
    assert recipe.changed("03-rules") == [(folder / "a.json").resolve()]
    assert load_recipe(folder).digest != recipe.digest
