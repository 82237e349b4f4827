"""The docs tell the truth: commands run, pages that are written from the code are current, links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from factory.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


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
    assert len(load_recipe(tmp_path).stages) == 9


def test_the_reference_is_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
