"""Writes a recipe to start from: one that runs as it is, and explains itself."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from factory.errors import GristmillError
from factory.recipe import RECIPE_FILE
from factory.store import write_bytes

STARTER = (RECIPE_FILE, "seeds.jsonl")


def write_starter(folder: Path) -> list[Path]:
    """Write `recipe.yaml` and `seeds.jsonl` into `folder`; GristmillError where either is there already: nothing is overwritten."""
    there = [folder / name for name in STARTER if (folder / name).exists()]
    if there:
        raise GristmillError("this file is there already, and nothing was written", where=str(there[0]), next="Name another folder.")
    name = re.sub(r"[^a-z0-9._-]+", "-", folder.resolve().name.lower()).strip("-._") or "my-task"
    written = []
    for file in STARTER:
        text = files("factory").joinpath("data", "starter", file).read_text(encoding="utf-8").replace("__NAME__", name)
        write_bytes(folder / file, text.encode())
        written.append(folder / file)
    return written
