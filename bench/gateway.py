"""The gateway against a server that is never the bottleneck, and, if wanted, the peers against the same one.

    python bench/gateway.py [--only CASE ...] [--peers [NAME ...]] [--json out.json] [--resume] [--scale 0.02]

Each measurement has a server of its own (bench/mock_teacher.py) and a client process of its own (bench/peers/peer_NAME.py; ours
is peer_gristmill.py). Where a case is about one core, the client has one to itself and the server another. The results are
written after each measurement; `--resume` measures only what the file does not hold. `--scale` shrinks the cases, to try them.

`ideal_s` is what an engine that costs nothing would need; `of_ideal` is the share of that speed that was reached, and rows
that did not come count against it. `server_busy` is the share of its core that the server used meanwhile.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mock_teacher import read_stats, running
from peers import environments

from factory.store import write_json

CONCURRENCY = 100
RAW, OURS = "raw", "gristmill"
RATE = 600  # calls a minute
BURST = 10
HIDDEN = 20  # calls at once
SLOW_EVERY, SLOW_S = 100, 5.0
PEERS_CAP_S, OURS_CAP_S = 180.0, 600.0


@dataclass(frozen=True)
class Case:
    """What is asked of which server by whom.

    `calls` names the engines that take part and how much each asks (OTHERS: every peer). `ours` are options of our script alone.
    """

    about: str
    server: str
    calls: dict[str, int]
    ideal_s: Callable[[int], float] | None = None
    pinned: bool = False
    ours: str = ""
    others: str = ""
    times: int = 1  # ours is run so often, and the run in the middle counts: of a second or two, a shared machine takes its part


OTHERS = "others"


def straggling(calls: int) -> float:
    """Seconds until the last answer, where every free slot takes the next call and each hundredth takes long."""
    slots = [0.0] * CONCURRENCY
    for n in range(1, calls + 1):
        heapq.heappush(slots, heapq.heappop(slots) + (0.2 if n % SLOW_EVERY else SLOW_S))
    return max(slots)


CASES = {
    "server": Case("bare connections: the server's own limit", "", {RAW: 200_000}, pinned=True),
    "ideal": Case(
        "200 ms, 100 at once",
        "--latency-ms 200",
        {OURS: 5000, OTHERS: 5000},
        ideal_s=lambda calls: calls * 0.2 / CONCURRENCY,
    ),
    "throughput": Case("5 ms, one core", "--latency-ms 5", {RAW: 50_000, OURS: 5000, OTHERS: 2000}, pinned=True, times=3),
    "memory": Case("5 ms, one core, ten times as many", "--latency-ms 5", {OURS: 50_000}, pinned=True, times=3),
    "rate": Case(
        "600 calls a minute, told in headers; refused calls count",
        f"--latency-ms 200 --rpm {RATE} --burst {BURST} --tpm 10000000 --refused-count",
        {OURS: 600, OTHERS: 600},
        ideal_s=lambda calls: max(0, calls - BURST) * 60 / RATE,
        others="--limited",
    ),
    "hidden": Case(
        "20 at once, told by nobody",
        f"--latency-ms 200 --hidden-concurrency {HIDDEN}",
        {OURS: 2000},
        ideal_s=lambda calls: calls * 0.2 / HIDDEN,
    ),
    "faults": Case(
        "20% of 500s, 5% resets, 3% truncated, 1% cut, 1% hangs",
        "--latency-ms 50 --errors 0.20 --resets 0.05 --truncated 0.03 --cut 0.01 --hangs 0.01",
        {OURS: 2000},
        ours="--timeout-s 2 --retries 12",  # a call fails with 0.3: of 2,000, one or two would fail six times in a row
    ),
    "mild": Case(
        "5% of 500s, 2% resets, 1% truncated",
        "--latency-ms 50 --errors 0.05 --resets 0.02 --truncated 0.01",
        {OURS: 2000, OTHERS: 2000},
    ),
    "straggler": Case(
        "200 ms, one in a hundred takes 5 s",
        f"--latency-ms 200 --slow-every {SLOW_EVERY} --slow-ms {SLOW_S * 1000:.0f}",
        {OURS: 5000},
        ideal_s=straggling,
    ),
    "two-stages": Case(
        "two stages ask at once",
        "--latency-ms 50",
        {OURS: 1000},
        ideal_s=lambda calls: 2 * calls * 0.05 / CONCURRENCY,
        ours="--stages 2",
    ),
}


def measure(case: Case, engine: str, scale: float) -> dict[str, Any]:
    """One engine in one case: what its script printed, what the server saw, and the figures that follow."""
    calls = max(CONCURRENCY, round(case.calls.get(engine, case.calls.get(OTHERS, 0)) * scale))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pin = case.pinned and len(cores) > 1
    more = case.ours if engine == OURS else case.others if engine in environments.PEERS else ""
    asked = f"--calls {calls} --concurrency {CONCURRENCY} {f'--core {cores[0]}' if pin else ''} {more}".split()
    with running(*case.server.split(), *(["--core", str(cores[1])] if pin else [])) as url:
        before = read_stats(url)["cpu_seconds"]
        told = environments.run(engine, "--url", url, *asked, cap_s=OURS_CAP_S if engine in (OURS, RAW) else PEERS_CAP_S)
        seen = read_stats(url)
    seen["cpu_seconds"] -= before
    wanted = calls * (2 if "--stages 2" in case.ours else 1)
    figures = {
        "calls": wanted,
        **told,
        "calls_a_second": told["rows"] / told["wall_s"],
        "server_busy": seen["cpu_seconds"] / told["wall_s"],
    }
    if told["rows"] and "cpu_s" in told:
        figures["cpu_ms_a_row"] = told["cpu_s"] * 1000 / told["rows"]
    if case.ideal_s:
        figures["ideal_s"] = case.ideal_s(calls)
        figures["of_ideal"] = figures["ideal_s"] / told["wall_s"] * told["rows"] / wanted
    version = environments.versions(engine) if engine in environments.PEERS else {}
    return {**figures, "server": seen, "versions": version, "at": datetime.now(UTC).isoformat(timespec="seconds")}


def middle(case: Case, engine: str, scale: float) -> dict[str, Any]:
    """The run in the middle of as many as the case asks for; the speeds of all stand in `each`."""
    runs = [measure(case, engine, scale) for _ in range(case.times if engine == OURS else 1)]
    runs.sort(key=lambda run: run["calls_a_second"])
    each = {"each": [round(run["calls_a_second"]) for run in runs]} if len(runs) > 1 else {}
    return runs[len(runs) // 2] | each


def line(name: str, engine: str, figures: dict[str, Any]) -> str:
    """One line of the table."""
    ideal = f"{figures['of_ideal']:7.1%}" if "of_ideal" in figures else "      -"
    cpu = f"{figures['cpu_ms_a_row']:8.3f}" if "cpu_ms_a_row" in figures else "       -"
    memory = f"{figures['peak_rss_mb']:8.0f}" if "peak_rss_mb" in figures else "       -"
    seen = figures["server"]
    text = (
        f"{name:<11}{engine:<14}{figures['rows']:>7,}/{figures['calls']:<7,}{figures['wall_s']:8.2f}{ideal}{figures['calls_a_second']:9,.0f}"
        f"{cpu}{memory}{seen['requests']:>9,}{seen['refused']:>8,}{seen['doubled']:>8,}{figures['server_busy']:7.0%}"
    )
    if "stage_s" in figures:
        first, second = figures["stage_s"]
        text += f"   {first:.2f} and {second:.2f} s; the first has {figures['share_of_first']:.1%} of the first half"
    text += f"   {figures['lost']} lost" if figures.get("lost") else ""
    text += "".join(f"   {n} x {why[:80]}" for why, n in list(figures.get("errors", {}).items())[:2])
    return text + (f"   {figures['error'].splitlines()[-1][:80]}" if figures.get("error") else "")


HEAD = (
    f"{'case':<11}{'engine':<14}{'rows':>7}/{'of':<7}{'wall s':>8}{'ideal':>7}{'calls/s':>9}{'CPU ms':>8}{'peak MB':>8}"
    f"{'requests':>9}{'refused':>8}{'doubled':>8}{'server':>7}"
)


def growth_mb(results: dict[str, Any]) -> float | None:
    """How much more memory ten times as many calls took; None: not both were measured."""
    both = [results.get(name, {}).get(OURS, {}).get("peak_rss_mb") for name in ("throughput", "memory")]
    return both[1] - both[0] if None not in both else None


def main() -> None:
    """Measure what is wanted, print a line each, and write the whole after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--peers", nargs="*", choices=environments.PEERS, metavar="NAME", help="all, or these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    peers = options.peers or (environments.PEERS if options.peers is not None else ())
    for peer in peers:
        environments.make(peer)
    whole = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    whole["machine"] = {"cores": os.cpu_count(), "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    whole |= {"concurrency": CONCURRENCY, "scale": options.scale}
    results = whole.setdefault("results", {})
    print(HEAD)
    for name in options.only:
        case = CASES[name]
        for engine in (RAW, OURS, *peers):
            if engine not in case.calls and not (OTHERS in case.calls and engine in peers):
                continue
            held = results.setdefault(name, {"about": case.about})
            if not (options.resume and engine in held):
                held[engine] = middle(case, engine, options.scale)
                whole["memory_growth_mb"] = growth_mb(results)
                if options.json:
                    write_json(options.json, whole)
            print(line(name, engine, held[engine]), flush=True)
    if (growth := growth_mb(results)) is not None:
        print(f"memory of {OURS}, from throughput's calls to ten times as many: {growth:+.1f} MB")


if __name__ == "__main__":
    main()
