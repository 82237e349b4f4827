"""The tool as a user has it: real processes, the fake teacher, and everything that can be wrong with what they hand in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from factory.records import RunFolder

GRISTMILL = Path(sys.executable).with_name("gristmill")
SEEDS = Path(__file__).parent.parent / "examples" / "bank-intents" / "seeds.jsonl"

RECIPE = """\
name: task
target: {accepted: 40, balance: label}
teachers:
  small: {kind: fake, latency_ms: 5, concurrency: 4}
stages:
  - seeds: {path: seeds.jsonl}
  - compose: {template: label-chat, parse: numbered, per_call: 3}
  - exact: {}
  - near: {threshold: 0.9}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def gristmill(task: Path, *args: str, code: int = 0, **env: str) -> str:
    """Run a command beside the task's folder; its output, after its exit code was checked."""
    done = subprocess.run(
        [GRISTMILL, *args], cwd=task.parent, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def run_folder(task: Path) -> RunFolder:
    (folder,) = (task.parent / "mill" / "runs").iterdir()
    return RunFolder(folder)


def test_from_a_recipe_to_a_version(task: Path) -> None:
    planned = gristmill(task, "plan", "task")
    assert "40 seeds of 10 labels" in planned
    assert "$0.00" in planned
    assert not (task.parent / "mill").exists(), "a plan writes nothing"

    out = gristmill(task, "run", "task", "--progress", "plain")
    assert "40 of 40 rows accepted" in out
    assert "round 01 02-compose" in out

    again = gristmill(task, "run", "task", "--progress", "quiet")
    assert "40 of 40 rows accepted" in again

    shown = gristmill(task, "show", "task", "-n", "3")
    sample = run_folder(task).accepted["id"][0]
    assert "accepted" in shown
    history = gristmill(task, "show", "task", sample[:12])
    for part in (sample, "parents", "asked", "answered", "03-exact", "target", "fate"):
        assert part in history
    assert "samples have an id" in gristmill(task, "show", "task", "s1", code=1)

    released = gristmill(task, "release", "task")
    assert "released" in released
    version = task.parent / "mill" / "datasets" / "task" / "v1"
    assert {p.name for p in version.iterdir()} >= {"train.jsonl", "manifest.json", "README.md", "report.html", "lineage.parquet"}
    before = (version / "manifest.json").read_bytes()
    assert "v1 already holds exactly these rows" in gristmill(task, "release", "task")
    gristmill(task, "release", "task", "--force")
    assert (version.parent / "v2" / "manifest.json").exists()
    assert (version / "manifest.json").read_bytes() == before

    assert "teacher small" in gristmill(task, "ledger")
    assert "report.html" in gristmill(task, "report", "task")


def test_killed_at_any_moment_a_run_ends_with_the_same_rows(task: Path) -> None:
    slow = RECIPE.replace("latency_ms: 5", "latency_ms: 30")
    (task / "recipe.yaml").write_text(slow)
    moments = random.Random(7)
    kills = 0
    for _ in range(8):
        process = subprocess.Popen([GRISTMILL, "run", "task", "--progress", "quiet"], cwd=task.parent, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1.6))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills > 0
    gristmill(task, "run", "task", "--progress", "quiet")
    killed = run_folder(task)
    assert killed.status["status"] == "done"

    whole = task.parent / "whole" / "task"
    whole.parent.mkdir()
    task.rename(whole)
    gristmill(whole, "run", "task", "--progress", "quiet")
    assert run_folder(whole).samples.drop("call").equals(killed.samples.drop("call"))
    assert run_folder(whole).accepted["id"].equals(killed.accepted["id"])
    assert killed.samples["id"].is_unique().all()
    assert killed.fates.filter(pl.col("fate") == "accepted").height == 40


def test_ctrl_c_says_how_to_go_on(task: Path) -> None:
    (task / "recipe.yaml").write_text(RECIPE.replace("latency_ms: 5", "latency_ms: 100"))
    process = subprocess.Popen([GRISTMILL, "run", "task", "--progress", "quiet"], cwd=task.parent, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(task.parent.glob("mill/runs/*/round-00/01-seeds/stage.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert run_folder(task).status["status"] == "stopped"
    assert "40 of 40" in gristmill(task, "run", "task")


def test_two_runs_of_one_recipe_at_once(task: Path) -> None:
    (task / "recipe.yaml").write_text(RECIPE.replace("latency_ms: 5", "latency_ms: 300"))
    first = subprocess.Popen([GRISTMILL, "run", "task", "--progress", "quiet"], cwd=task.parent, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(task.parent.glob("mill/runs/*/run.json")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = gristmill(task, "run", "task", code=1)
    assert f"process {first.pid} is running this recipe" in said
    first.kill()
    first.wait()


def test_a_recipe_changed_in_the_middle_keeps_what_was_paid_for(task: Path) -> None:
    gristmill(task, "run", "task", "--progress", "quiet")
    (task / "recipe.yaml").write_text(RECIPE.replace("threshold: 0.9", "threshold: 0.95"))
    assert "not been run, or was changed" in gristmill(task, "show", "task", code=1)
    assert "from the ledger" in gristmill(task, "run", "task", "--progress", "quiet")
    assert len(list((task.parent / "mill" / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "parts", "code"),
    [
        (("seeds.jsonl}", "seedz.jsonl}"), ["recipe.yaml:6", "there is no file", "did you mean 'seeds.jsonl'"], 2),
        (("kind: fake, latency_ms: 5", "kind: openai, model: gpt-4o-mini"), ["OPENAI_API_KEY"], 2),
        (("kind: fake, latency_ms: 5", "kind: anthropic, model: claude-haiku-4-5"), ["ANTHROPIC_API_KEY"], 2),
        (("kind: fake, latency_ms: 5", "kind: local, model: /nowhere/model.gguf"), ["/nowhere/model.gguf"], 2),
        (("kind: fake, latency_ms: 5", "kind: local, model: smolm2"), ["'smolm2' is no model", "smollm2-135m-instruct"], 2),
        (("latency_ms: 5,", "price: {input_usd_per_mtok: free},"), ["price"], 2),
        (("name: task", "nam: task"), ["unknown key 'nam'", "did you mean 'name'"], 2),
    ],
)
def test_a_faulty_recipe_is_refused_before_anything_is_asked(task: Path, change: tuple[str, str], parts: list[str], code: int) -> None:
    assert change[0] in RECIPE
    (task / "recipe.yaml").write_text(RECIPE.replace(*change))
    keys = {"OPENAI_API_KEY": "", "ANTHROPIC_API_KEY": ""}
    said = gristmill(task, "run", "task", code=code, **keys)
    for part in parts:
        assert part in said.replace("\n", " ")
    assert not (task.parent / "mill").exists()


def test_a_server_that_is_down(task: Path) -> None:
    dead = "{kind: openai, model: m, base_url: 'http://127.0.0.1:9/v1', retries: 0, concurrency: 4}"
    (task / "recipe.yaml").write_text(RECIPE.replace("{kind: fake, latency_ms: 5, concurrency: 4}", dead))
    said = gristmill(task, "run", "task", "--progress", "quiet", code=1)
    assert "127.0.0.1:9" in said
    assert "run the same command" in said
    assert run_folder(task).status["status"] == "stopped"


def test_half_broken_seeds_are_read_and_what_was_not_is_listed_with_its_line(task: Path) -> None:
    lines = SEEDS.read_text().splitlines()
    (task / "seeds.jsonl").write_text("\n".join([*lines[:20], '{"messages": [', '{"nothing": "known"}', "", lines[0], *lines[20:]]))
    gristmill(task, "run", "task", "--progress", "quiet")
    said = gristmill(task, "show", "task", "--failures", "-n", "50")
    for line in ("seeds.jsonl:21", "seeds.jsonl:22", "seeds.jsonl:24"):
        assert line in said
    assert dict(run_folder(task).funnel()[0].lost)["repeat"] == 1


@pytest.mark.parametrize("content", ["", "\n\n", "not json\nat all\n"])
def test_seeds_of_which_nothing_can_be_read_stop_the_run(task: Path, content: str) -> None:
    (task / "seeds.jsonl").write_text(content)
    said = gristmill(task, "run", "task", "--progress", "quiet", code=1)
    assert "seeds.jsonl" in said


def test_a_folder_of_an_older_version(task: Path) -> None:
    gristmill(task, "run", "task", "--progress", "quiet")
    folder = run_folder(task).path
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**status, "layout": 0}))
    assert "layout 0" in gristmill(task, "run", "task", code=1)


def test_a_file_that_was_deleted_from_a_run_is_missed(task: Path) -> None:
    gristmill(task, "run", "task", "--progress", "quiet")
    (run_folder(task).path / "round-01" / "02-compose" / "samples.parquet").unlink()
    for command in ("show", "run"):
        said = gristmill(task, command, "task", code=1)
        assert "samples.parquet" in said
        assert "the ledger answers" in said


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(task: Path) -> None:
    """A limit on the size of a file stands in for a full disk: the write fails in the same place."""
    limited = f"ulimit -f 8; exec {GRISTMILL} run task --progress quiet"
    done = subprocess.run(["bash", "-c", limited], cwd=task.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "can't" in done.stderr
    assert "Traceback" not in done.stderr
    assert "40 of 40" in gristmill(task, "run", "task")


def test_init_writes_a_recipe_that_runs_as_it_is_but_for_its_teacher(tmp_path: Path) -> None:
    task = tmp_path / "my-task"
    gristmill(task, "init", "my-task")
    assert "there already" in gristmill(task, "init", "my-task", code=1)
    recipe = (task / "recipe.yaml").read_text()
    fake = recipe.replace("{kind: local, model: smollm2-135m-instruct}", "{kind: fake}")
    assert fake != recipe
    (task / "recipe.yaml").write_text(fake)
    assert "9 seeds of 3 labels" in gristmill(task, "plan", "my-task")


def test_nothing_to_work_on_says_what_to_do(tmp_path: Path) -> None:
    task = tmp_path / "empty"
    assert "gristmill init" in gristmill(task, "run", "empty", code=1)
    assert "nothing was asked yet" in gristmill(task, "ledger", code=1)


def test_help_imports_nothing_heavy() -> None:
    heavy = {"polars", "numpy", "aiohttp", "pydantic", "rich", "sklearn", "umap", "hdbscan", "onnxruntime", "jinja2"}
    code = f"import sys, factory.cli; print(sorted(set(sys.modules) & {heavy!r}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_ctrl_c_does_not_wait_for_the_thread_of_a_stage() -> None:
    """Nor does it run into one that is in native code, which would abort the process."""
    script = "import threading, time; from factory.cli import _told; threading.Thread(target=time.sleep, args=(60,)).start()\n"
    script += "@_told\ndef stopped() -> None: raise KeyboardInterrupt\nstopped()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (130, "gristmill: stopped. Everything answered is kept; the same command goes on.\n")


def test_a_second_ctrl_c_waits_for_nothing(task: Path) -> None:
    text = RECIPE.replace("{kind: fake, latency_ms: 5, concurrency: 4}", "{kind: fake, latency_ms: 600000}")
    (task / "recipe.yaml").write_text(text)
    run = [GRISTMILL, "run", "task", "--progress", "plain"]
    process = subprocess.Popen(run, cwd=task.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "01-seeds" in process.stderr.readline()
    until = time.monotonic() + 30
    while not [*task.parent.glob("mill/ledger.db-spool/*.spool")] and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # for its first call to leave
    process.send_signal(signal.SIGINT)
    assert "ctrl-C again to stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)  # and not ten minutes
    assert process.returncode == 130
    assert "the same command goes on" in said


def test_a_ledger_that_is_no_address_is_told_and_no_traceback(task: Path) -> None:
    said = gristmill(task, "ledger", code=1, GRISTMILL_LEDGER="postgresql://[bad")
    assert "GRISTMILL_LEDGER is not the URL of a PostgreSQL database" in said
