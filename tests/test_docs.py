"""The docs tell the truth: commands run, pages that are written from the code are current, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from factory.recipe import RecipeLoader, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def script(name: str) -> Any:
    """The module of a script that writes a page."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    block, on_files = blocks(ROOT / "README.md", "bash")
    for name in ("rows", "other"):
        (tmp_path / f"{name}.jsonl").write_bytes((ROOT / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = []
    for line in (block + on_files).splitlines():
        command = shlex.split(line, comments=True)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        ran.append(command[1])
        if command[1] == "init":  # the fake teacher stands in for the small one, which needs a minute
            recipe = tmp_path / "my-task" / "recipe.yaml"
            text = recipe.read_text()
            faster = text.replace("{kind: local, model: smollm2-135m-instruct}", "{kind: fake}").replace(
                "{labels: *labels, closeness: 0.5}", "{by: [centroid], margin: -2}"
            )
            assert faster.count("kind: fake") == 1
            recipe.write_text(faster)
    assert ran == ["init", "plan", "run", "show", "release", "dedup", "diversity"]
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 40
    assert (tmp_path / "mill" / "datasets" / "my-task" / "v1" / "report.html").exists()


def test_the_recipe_of_the_readme_is_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not a key")
    (block,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(block.replace("{kind: local, model: smollm2-135m-instruct}", "{kind: fake}"))
    (tmp_path / "seeds.jsonl").write_bytes((ROOT / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    assert len(load_recipe(tmp_path).stages) == 11


def test_the_reference_is_what_the_code_says() -> None:
    module = script("reference")
    assert module.PAGE.read_text() == module.page(), "run: python docs/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_base_dependency_is_explained() -> None:
    import tomllib

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in asked:
        name = re.split(r"[<>=~\[;]", requirement)[0]
        assert f"| {name} |" in explained, f"docs/dependencies.md says nothing of {name}"


def test_the_filters_of_the_page_on_filters_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage that the page shows, with stand-ins for the files and teachers that it names."""
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeds.jsonl").write_bytes((ROOT / "examples" / "bank-intents" / "seeds.jsonl").read_bytes())
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "models" / "student" / "tokenizer.json").write_bytes((ROOT / "factory" / "data" / "minilm" / "tokenizer.json").read_bytes())
    (tmp_path / "mill" / "datasets" / "bank" / "v1").mkdir(parents=True)
    (mine,) = blocks(ROOT / "docs" / "filters.md", "python")
    files = {"answer.schema.json": "{}", "tools.json": "[]", "tables.sql": "CREATE TABLE t (a);", "gsm8k_test.jsonl": "{}", "mine.py": mine}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    head = {"name": "page", "target": {"accepted": 1}, "teachers": {name: {"kind": "fake"} for name in ("big", "qwen", "llama", "gpt")}}
    loaded = set()
    for block in blocks(ROOT / "docs" / "filters.md", "yaml"):
        for stage in yaml.load(block, RecipeLoader):
            recipe = {**head, "stages": [{"seeds": {"path": "seeds.jsonl"}}, {"compose": {"teachers": ["big"]}}, stage]}
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            loaded.add(load_recipe(tmp_path).stages[2].stage.key)
    from factory import plugins
    from factory.stage import Filter

    known = {key for key in plugins.names(plugins.STAGES) if issubclass(plugins.stage_class(key), Filter)}
    assert loaded == known - {"exact", "near", "semantic", "fits", "confident", "coverage", "logprob"}  # these are in docs/guide.md


def test_the_faults_that_filters_catch_are_those_that_were_measured() -> None:
    module = script("faults")
    text = (ROOT / "docs" / "filters.md").read_text()
    results = json.loads((ROOT / "bench" / "results" / "faults.json").read_text())
    assert module.page(text, results) == text, "run: python docs/faults.py"
    assert len(results["faults"]) >= 20


def test_what_the_loop_is_worth_is_what_was_measured() -> None:
    module = script("loop")
    text = (ROOT / "docs" / "loop.md").read_text()
    results = json.loads((ROOT / "bench" / "results" / "loop.json").read_text())
    assert module.page(text, results) == text, "run: python docs/loop.py"
    assert module.picture(results) == (ROOT / "docs" / "loop.svg").read_text()
    embedded, noisy = results["embedded"], results["noisy"]
    assert {len(embedded["runs"]), len(noisy["runs"])} == {5}
    for name in ("balance", "cluster_entropy"):
        assert embedded["differences"][name]["low"] > 0, f"the loop does not win on {name}"
    assert embedded["differences"]["probe"]["high"] > 0
    assert noisy["differences"]["loop_against_clean"]["mean"] > -0.02
