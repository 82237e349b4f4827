"""What the scripts of the peers share, from the standard library alone: their options, the questions, and the line they print."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The options that every script takes; a script may add its own."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--url", required=True, help="the server's address, without /v1")
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--model", default="m")
    parser.add_argument("--limited", action="store_true", help="the server tells its limits: leave them to an engine that reads them")
    parser.add_argument("--core", type=int, help="the only core that it may use, where the system knows how")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; the core is taken here, before an import starts a thread."""
    options = parser.parse_args()
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    return options


def question(n: int) -> str:
    """The n-th question."""
    return f"Question {n}: write one sentence about the number {n}."


class Watch:
    """Started when the asking begins; `report` prints the line. What was imported before is in the memory, not in the seconds."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), cpu_s()

    def report(self, rows: int, **more: object) -> None:
        """Print rows, seconds of wall and CPU since the start, and the peak of memory, as one line of JSON on the true stdout."""
        figures = {
            "rows": rows,
            "wall_s": time.monotonic() - self._wall,
            "cpu_s": cpu_s() - self._cpu,
            "peak_rss_mb": peak_rss_mb(),
            **more,
        }
        sys.stdout.flush()
        print(json.dumps(figures), file=sys.__stdout__, flush=True)


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak_rss_mb() -> float:
    """The most memory that this process held, and the most that one of its ended children did.

    Linux hands ru_maxrss on from a parent to what it starts, so there the figure comes from /proc.
    """
    unit = 1024 if sys.platform == "linux" else 1
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    status = Path("/proc/self/status")
    if not status.exists():
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + children) / 1e6
    [own] = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return (own * 1024 + children) / 1e6
