"""A user's own function: what it gives back becomes a verdict, and what it raises does not end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from factory.errors import GristmillError
from factory.store import VERDICTS
from filters.function import Function
from schemas.sample import Sample
from tests.context import FakeContext, chat, frame


def stage(tmp_path: Path, body: str, **fields: Any) -> Function:
    file = tmp_path / "mine.py"
    file.write_text(body)
    return Function(file=file, **fields)


def row(function: Function, sample: Sample | None = None) -> tuple[bool, str | None, float | None, dict[str, Any]]:
    verdicts = function.judge(frame(sample or chat("q", "an answer")), FakeContext())
    assert verdicts.schema == VERDICTS and verdicts.height == 1
    one = verdicts.row(0, named=True)
    return one["keep"], one["reason"], one["score"], json.loads(one["detail"])


@pytest.mark.parametrize(
    ("gives", "fields", "verdict"),
    [
        ("True", {}, (True, None, None)),
        ("False", {}, (False, "refused", None)),
        ("'too vague'", {}, (False, "too vague", None)),
        ("''", {}, (False, "refused", None)),
        ("0.5", {}, (True, None, 0.5)),
        ("3", {"at_least": 3}, (True, None, 3.0)),
        ("2.5", {"at_least": 3}, (False, "score below 3", 2.5)),
        ("2.5", {"at_most": 2}, (False, "score above 2", 2.5)),
        ("2", {"at_least": 1, "at_most": 2}, (True, None, 2.0)),
        ("{'keep': False, 'reason': 'no', 'score': 1}", {}, (False, "no", 1.0)),
        ("{'keep': True, 'score': 0}", {"at_least": 5}, (True, None, 0.0)),
        ("{'score': 4}", {"at_least": 5}, (False, "score below 5", 4.0)),
        ("{'reason': 'no'}", {}, (False, "no", None)),
        ("__import__('numpy').bool_(False)", {}, (False, "refused", None)),
        ("__import__('numpy').float32(0.5)", {"at_least": 1}, (False, "score below 1", 0.5)),
        ("None", {}, (False, "not judged", None)),
        ("None", {"on_failure": "keep"}, (True, "not judged", None)),
        ("float('nan')", {}, (False, "not judged", None)),
        ("[]", {}, (False, "not judged", None)),
        ("{}", {}, (False, "not judged", None)),
        ("{'keep': 'yes'}", {}, (False, "not judged", None)),
        ("{'verdict': True}", {}, (False, "not judged", None)),
        ("{'score': '4'}", {}, (False, "not judged", None)),
        ("{'keep': False, 'reason': 5}", {}, (False, "not judged", None)),
    ],
)
def test_what_it_gives_back_becomes_a_verdict(tmp_path: Path, gives: str, fields: dict[str, Any], verdict: tuple[Any, ...]) -> None:
    assert row(stage(tmp_path, f"def check(sample):\n    return {gives}\n", **fields))[:3] == verdict


def test_it_is_handed_all_of_a_sample(tmp_path: Path) -> None:
    body = "def check(sample):\n    return {'keep': True, 'detail': sample}\n"
    sample = chat("q", "a").model_copy(update={"meta": {"n": [1]}})
    seen = row(stage(tmp_path, body), sample)[3]
    assert sorted(seen) == sorted(["id", "kind", "input", "output", "label", "messages", "chosen", "rejected", "text", "meta"])
    assert (seen["meta"], seen["input"], seen["messages"][1]) == ({"n": [1]}, "q", {"role": "assistant", "content": "a"})


@pytest.mark.parametrize(
    ("detail", "kept"),
    [("{'a': 1}", {"a": 1}), ("{'a': {1, 1}}", {"a": "{1}"}), ("5", {"detail": 5}), ("{'a': float('inf')}", {"detail": "{'a': inf}"})],
)
def test_its_detail_becomes_json(tmp_path: Path, detail: str, kept: dict[str, Any]) -> None:
    assert row(stage(tmp_path, f"def check(sample):\n    return {{'keep': True, 'detail': {detail}}}\n"))[3] == kept


def test_a_lone_surrogate_does_no_harm(tmp_path: Path) -> None:
    body = "def check(sample):\n    return {'keep': False, 'reason': 'a\\ud800b', 'detail': {'x': '\\ud800'}}\n"
    assert row(stage(tmp_path, body))[1] == "a?b"


def test_what_it_raises_is_that_rows_own(tmp_path: Path) -> None:
    body = "def check(sample):\n    return 1 / len(sample['output']) > 0\n"
    verdicts = stage(tmp_path, body).judge(frame(chat("q"), chat("q", "a")), FakeContext())
    assert verdicts["reason"].to_list() == ["not judged", None]
    error = json.loads(verdicts["detail"][0])["error"]
    assert error == "ZeroDivisionError: division by zero (mine.py, line 2: return 1 / len(sample['output']) > 0)"
    for raised in ("raise SystemExit(3)", "return check(sample)", "raise type('E', (Exception,), {'__str__': lambda s: 1 / 0})()"):
        assert row(stage(tmp_path, f"def check(sample):\n    {raised}\n"))[1] == "not judged"


def test_one_that_fails_on_most_rows_ends_the_run(tmp_path: Path) -> None:
    body = "def check(sample):\n    return sample['outptu'] if int(sample['input']) < {} else True\n"

    def judge(failing: int, rows: int) -> pl.DataFrame:
        folder = tmp_path / f"{failing}-{rows}"
        folder.mkdir()
        samples = frame(*(chat(str(i), "a") for i in range(rows)))
        return stage(folder, body.format(failing)).judge(samples, FakeContext())

    assert judge(10, 20)["keep"].sum() == 10
    assert judge(19, 19)["keep"].sum() == 0
    with pytest.raises(GristmillError, match=r"raised on 11 of 20 samples; the last: KeyError: 'outptu' \(mine.py, line 2"):
        judge(11, 20)


FRAME = "import polars as pl\ndef check(samples):\n    long = pl.col('output').str.len_chars()\n"


def test_a_function_of_frames(tmp_path: Path) -> None:
    samples = frame(chat("q1", "a"), chat("q2", "abc"), chat("q3", "abcde"))

    def judge(body: str, **fields: Any) -> pl.DataFrame:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        verdicts = stage(folder, body, batch=True, **fields).judge(samples, FakeContext())
        assert verdicts["sample"].to_list() == samples["id"].to_list()
        return verdicts

    rows = judge(FRAME + "    return samples.select(keep=long > 1, reason=pl.lit('short'), score=long)\n")
    assert rows["reason"].to_list() == ["short", None, None]
    assert rows["score"].to_list() == [1.0, 3.0, 5.0]
    rows = judge(FRAME + "    return samples.select(sample='id', score=long).reverse()\n", at_least=4)
    assert rows["keep"].to_list() == [False, False, True]
    rows = judge(FRAME + "    return samples.select(keep=pl.when(long > 1).then(True))\n")
    assert rows["reason"].to_list() == ["not judged", None, None]
    rows = judge(FRAME + "    assert 'abc' not in samples['output'].to_list()\n    return samples.select(keep=long > 1)\n")
    assert rows["reason"].to_list() == ["refused", "not judged", None]
    for wrong in (
        "samples.select(keep=True)[:1].head(1)",
        "samples.select('id')",
        "[True] * 3",
        "samples.select(keep=True, sample=pl.lit('x'))",
    ):
        with pytest.raises(GristmillError, match="gave"):
            judge(FRAME + f"    return {wrong}\n")


@pytest.mark.parametrize(
    ("body", "fields", "words"),
    [
        ("def check(a, b): pass", {}, "must take one argument"),
        ("def check(): pass", {}, "must take one argument"),
        ("async def check(sample): pass", {}, "async"),
        ("check = 5", {}, "no function"),
        ("def chek(sample): pass", {}, "did you mean 'chek'"),
        ("def check(sample) pass", {}, "can't be imported: SyntaxError"),
        ("import not_installed_anywhere", {}, "can't be imported: ModuleNotFoundError"),
        ("raise SystemExit", {}, "can't be imported: SystemExit"),
        ("def check(sample): pass", {"module": "a:b"}, "say which function"),
    ],
)
def test_a_function_that_can_not_be_called_is_told_at_load(tmp_path: Path, body: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        stage(tmp_path, body, **fields)


def test_a_function_of_a_module() -> None:
    assert row(Function(module="builtins:bool"))[0]
    for module, words in {"no_colon": "no colon", "no.such:x": "can't be imported", "json:load_s": "did you mean 'loads'"}.items():
        with pytest.raises(ValidationError, match=words):
            Function(module=module)
    with pytest.raises(ValidationError, match="say which function"):
        Function()


def test_two_files_of_one_name_do_not_meet_and_one_is_loaded_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    body = (
        "import dataclasses\n@dataclasses.dataclass\nclass Count:\n    n: int = 0\ncount = Count()\ndef check(sample):\n    count.n += 1\n"
    )
    one, two = stage(tmp_path / "a", body + "    return count.n\n"), stage(tmp_path / "b", body + "    return -count.n\n")
    assert [row(one)[2], row(two)[2], row(one)[2]] == [1.0, -1.0, 2.0]
    missing = Function(file=tmp_path / "none.py")
    with pytest.raises(GristmillError, match="can't be imported: FileNotFoundError"):
        row(missing)


def test_a_changed_file_is_another_run(tmp_path: Path) -> None:
    from factory.recipe import load_recipe

    (tmp_path / "seeds.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ntarget: {accepted: 1}\nteachers: {t: {kind: fake}}\n"
        "stages: [seeds: {path: seeds.jsonl}, compose: {}, function: {file: mine.py}]\n"
    )
    (tmp_path / "mine.py").write_text("def check(sample): return True\n")
    first = load_recipe(tmp_path).digest
    (tmp_path / "mine.py").write_text("def check(sample): return False\n")
    assert load_recipe(tmp_path).digest != first
