"""Writes docs/performance.md from bench/results/*.json, so that no figure in it is typed by hand: `python docs/performance.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = {
    "gristmill": "**gristmill**",
    "distilabel": "distilabel 1.5.3",
    "data_designer": "data-designer 0.9.6",
    "curator": "bespokelabs-curator 0.1.31",
    "openai_gather": "`asyncio.gather` over the `openai` client",
}

HEAD = """# How fast, how safe, how exact

Every figure here was written by `python docs/performance.py` from the results of `make bench` and `make bench-peers`
([bench/results](../bench/results)), on a machine with {cores} cores and Python {python}. One run each (of our calls of 5 ms the
middle of three); other work on the machine shows in them. The server is ours (`bench/mock_teacher.py`), in a process of its own, and is
itself measured: bare connections drive it at {server:,.0f} answers a second.

## The gateway beside other engines

One prompt a row, one server, each engine in an environment of its own (`bench/peers/environments.py`), as its documentation shows it
and with its concurrency at 100. Ours has its ledger on and durable.
"""


WHY = """
## Why the official clients are not in the hot path

The `openai` client costs {theirs:.2f} ms of CPU a call; our whole gateway, ledger included, {own:.2f} ms. On one core that is the
difference between hundreds and thousands of calls a second. They serve where speed does not matter (batches, Azure's older
deployments), and in tests they prove our mock servers right."""


RULES = """
## Rules

`bench/rules.py`: the filter `rules` with all that holds by default, sizes, patterns and 40 seeds. Memory: beyond the rows."""


DUPLICATES = """
## Duplicates

`bench/dedup.py`: each engine in a process of its own. Recall is the share of the true pairs that were found, precision the share of
the found pairs that are true. A true pair is one that was planted and counted (texts), or multiplied out (vectors)."""


KILLED = """
## Killed

`bench/crash.py` kills whole processes with SIGKILL, 10 to 400 ms after they began to ask. What a server had been sent and had not
answered by then is asked again, and a server may charge for it twice: that is "paid twice", and can be no more than was in flight.
"""


def results(name: str) -> dict[str, Any]:
    """What `bench/results/NAME.json` holds; empty where it was not measured."""
    path = ROOT / "bench" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def engines(measured: dict[str, Any]) -> str:
    """The table of all engines, a row each."""
    lines = [
        "| engine | 5,000 calls of 200 ms, ideal 10.0 s | calls a second of 5 ms | CPU a call, ms "
        "| 600 calls at 600 a minute: rows, refusals | 2,000 calls with 5% 500s, 2% resets, 1% truncated: rows |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in NAMES.items():
        ideal, quick, rate, mild = (measured.get(case, {}).get(name) for case in ("ideal", "throughput", "rate", "mild"))
        speed = f"{quick['calls_a_second']:,.0f} | {quick['cpu_ms_a_row']:.2f}" if quick else " | "
        lines.append(f"| {title} | {_seconds(ideal)} | {speed} | {_rate(rate)} | {_rows(mild)} |")
    return "\n".join(lines)


def ours(measured: dict[str, Any]) -> str:
    """What only our gateway is put through."""
    rows = []
    for case, what in (
        ("memory", "50,000 calls of 5 ms, one core"),
        ("hidden", "2,000 calls of a server that refuses more than 20 at once and says nothing of it"),
        ("faults", "2,000 calls; 20% 500s, 5% resets, 3% truncated, 1% cut, 1% hang"),
        ("straggler", "5,000 calls of which one in a hundred takes 5 s"),
        ("two-stages", "two stages that ask 1,000 calls each at once"),
    ):
        if one := measured.get(case, {}).get("gristmill"):
            share = f"{one['of_ideal']:.0%} of the ideal speed" if one.get("of_ideal") else f"{one['calls_a_second']:,.0f} calls a second"
            lost = f", {one['lost']} may have been paid and were asked again" if one.get("lost") else ""
            refused = one.get("server", {}).get("refused", 0)
            rows.append(f"| {what} | {one['rows']:,} of {one['calls']:,} rows | {one['wall_s']:.1f} s, {share}, {refused} refusals{lost} |")
    return "\n".join(["| case | rows | how |", "| --- | --- | --- |", *rows])


def crash(measured: dict[str, Any]) -> str:
    """What `kill -9` cost."""
    lines = [
        "| processes on the ledger | kills | questions | rows missing, doubled | paid twice | in flight at the kills | listed as lost |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    halves = [measured[half] for half in ("one_process", "two_processes") if half in measured]
    lines += [
        f"| {one['processes']} | {one['kills']} | {one['questions']:,} | {one['missing']}, {one['doubled_rows']} | {one['paid_twice']} "
        f"| {one['in_flight_at_kills']} | {one['lost_listed']}, ${one['lost_micro_usd'] / 1e6:.2f} |"
        for one in halves
    ]
    return "\n".join(lines)


def plans(measured: dict[str, Any]) -> str:
    """How well the probe foresaw the bill."""
    lines = [
        "| recipe | runs | bill inside the interval | within 15% of the middle | mean error | without a probe |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {one['runs']} | {one['inside']} | {one['within_15_percent']} "
        f"| {one['mean_error']:.1%} | {one['mean_error_without_a_probe']:.0%} |"
        for name, one in measured.items()
    ]
    return "\n".join(lines)


def duplicates(measured: dict[str, Any]) -> list[str]:
    """The tables of those that find duplicates."""
    parts = [DUPLICATES]
    for case, what in (
        (
            "passages",
            "{rows:,} passages of {mean_words:.0f} words in the mean, shingles of five words, Jaccard 0.8, {true_pairs:,} true pairs",
        ),
        ("many", "{rows:,} such passages, {true_pairs:,} true pairs"),
        ("vectors", "{rows:,} vectors of 384 dimensions, cosine 0.95, {true_pairs:,} true pairs"),
    ):
        if found := measured.get(case):
            lines = [f"\n{what.format(**found)}:\n", "| engine | rows a second of CPU | CPU | peak memory | recall | precision |"]
            lines.append("| --- | --- | --- | --- | --- | --- |")
            for name, one in found.items():
                if not isinstance(one, dict):
                    continue
                bold = f"**{name}**" if name.startswith("gristmill") else name
                if "error" in one:
                    lines.append(f"| {bold} | {one['error'][:80]} | | | | |")
                    continue
                lines.append(
                    f"| {bold} | {one['rows_a_second_of_cpu']:,.0f} | {one['cpu_s']:.1f} s | {one['peak_rss_mb']:,.0f} MB "
                    f"| {one['recall']:.4f} | {one['precision']:.4f} |"
                )
            parts += lines
    lines = ["\n| ours alone | rows | CPU | wall | peak memory of the process |", "| --- | --- | --- | --- | --- |"]
    for case, what in (("short", "short texts, 20 to 40 words"), ("adding", "1,000 new rows against those that are kept")):
        for name, one in measured.get(case, {}).items():
            if isinstance(one, dict):
                lines.append(
                    f"| {what}, {name} | {one['rows']:,} | {one['cpu_s']:.1f} s | {one['wall_s']:.1f} s | {one['peak_rss_mb']:,.0f} MB |"
                )
    return [*parts, *lines]


def rules(measured: dict[str, Any]) -> list[str]:
    """What it takes to judge rows by their form."""
    lines = [RULES, "\n| rows | how | seconds | CPU | memory |", "| --- | --- | --- | --- | --- |"]
    for case, what in (
        ("batches", "of 200 words, in batches of 20,000 as a run hands them on"),
        ("whole", "the same, all at once"),
        ("json", "answers in JSON, checked to be so"),
        ("tokens", "of 200 words, their tokens counted as well"),
    ):
        if one := measured.get(case):
            lines.append(
                f"| {one['rows']:,} | {what} | {one['seconds']:.0f} | {one['cpu_seconds']:.0f} | {one['memory_beyond_rows_mb']:,} MB |"
            )
    return lines


def page() -> str:
    """The whole page."""
    measured = results("gateway")
    cases = measured["results"]
    parts = [
        HEAD.format(**measured["machine"], server=cases["server"]["raw"]["calls_a_second"]),
        engines(cases),
        "\n(A peer that had not ended after 180 s was stopped there.)",
        "\n## What else it bears\n",
        ours(cases),
    ]
    if killed := results("crash"):
        parts += [KILLED, crash(killed)]
    if (foreseen := results("plan")) and (summary := foreseen.get("summary")):
        parts += ["\n## Foreseen\n\n`bench/plan.py`: `plan --probe 20`, then the run itself.\n", plans(summary)]
    if measured := results("dedup"):
        parts += duplicates(measured)
    if measured := results("rules"):
        parts += rules(measured)
    theirs, own = (cases["throughput"][name]["cpu_ms_a_row"] for name in ("openai_gather", "gristmill"))
    parts.append(WHY.format(theirs=theirs, own=own))
    return "\n".join(parts) + "\n"


def _seconds(one: dict[str, Any] | None) -> str:
    return (
        "" if one is None else f"{one['wall_s']:.1f} s" if one["rows"] == one["calls"] else f"{one['rows']:,} rows in {one['wall_s']:.0f} s"
    )


def _rows(one: dict[str, Any] | None) -> str:
    return "" if one is None else f"{one['rows']:,}"


def _rate(one: dict[str, Any] | None) -> str:
    return "" if one is None else f"{one['rows']:,}, {one.get('server', {}).get('refused', 0):,}"


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(page(), encoding="utf-8")
