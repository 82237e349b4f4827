"""Writes the table of docs/filters.md from bench/results/faults.json, so that no figure in it is typed by hand: `python docs/faults.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- faults: written by docs/faults.py -->\n", "<!-- end -->"


def table(results: dict[str, Any]) -> str:
    """A row a kind of fault, and what falls of the rows as they are."""
    lines = ["| fault | filter | rows | recall | false alarms | any filter |", "| --- | --- | --- | --- | --- | --- |"]
    for kind, found in results["faults"].items():
        recall, alarms, of_all = found["recall"], found["false_alarms"], found["recall_of_all"]
        low, high = recall["interval"]
        figures = f"{recall['value']:.0%} ({low:.0%} to {high:.0%}) | {alarms['value']:.0%} | {of_all['value']:.0%}"
        lines.append(f"| {kind} | `{found['by']}` | {found['planted']} | {figures} |")
    lines.append("\nOf the rows as they are, each filter with its defaults drops:\n")
    for task, filters in results["untouched"].items():
        told = ", ".join(f"`{by}` {share['hits']}" for by, share in filters.items() if share["hits"])
        of = next(iter(filters.values()))["of"]
        lines.append(f"- {task}, {of} rows: {told or 'none'}" + ("; the others none" if told and len(filters) > 1 else ""))
    return "\n".join(lines) + "\n"


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table of these results."""
    before, _, rest = text.partition(START)
    return before + START + "\n" + table(results) + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Write docs/filters.md."""
    path = ROOT / "docs" / "filters.md"
    results = json.loads((ROOT / "bench" / "results" / "faults.json").read_text(encoding="utf-8"))
    path.write_text(page(path.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
