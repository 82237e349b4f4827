"""Kills what asks, with SIGKILL, at random moments, and counts what was paid twice, what was lost, and whether every row came.

    python bench/crash.py [--kills 200] [--questions 300] [--json out.json]

A round is a set of new questions. A process asks them through the gateway, of a server in a process of its own, and writes a
row for each answer that it is handed; it is killed 10 to 400 ms after it began to ask, and started again, until all rows are
there. The second half does the same with two processes that ask the same questions of one ledger at once.

- `paid_twice`: requests that came to the server whole, less the questions that there were. A request counts as paid whether or
  not its answer was ever read, as a provider would have it.
- `in_flight_at_kills`: calls that had left a process and whose answer it had not written to its spool when it was killed; it
  counts them in memory that it shares with this one. More than so many may never be paid twice.
- `recovered_from_spools`: answers that were in no database when their process was killed, and were not asked for again.
- `handed_on_and_asked_again`: rows that a process was handed, and for which a later one paid anew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from mock_teacher import read_stats, running

from factory.audit import verify
from factory.gateway import Gateway
from factory.ledger import LEDGER_FILE, Known, Ledger
from factory.spool import frames
from factory.store import write_json
from generators.teachers.openai import OpenAI
from schemas.call import Call, Reply

LATENCY_MS = 40
CONCURRENCY = 16
KILL_AFTER_S = 0.010, 0.400
PATIENCE_S = 60.0  # with a round in which nobody is killed any more


class CountedLedger(Ledger):
    """A ledger that tells how many calls are in flight, in memory that outlives its process."""

    tell: Callable[[int], None]
    left: set[int]

    def sending(self, entry: int) -> None:
        self.left.add(entry)  # first: it is in flight at the latest when that is noted
        self.tell(len(self.left))
        super().sending(entry)

    def settle(self, entry: int, reply: Reply, cost: int | None, seconds: float | None = None) -> asyncio.Future[Known]:
        future = super().settle(entry, reply, cost, seconds)
        self.left.discard(entry)
        self.tell(len(self.left))
        return future


@dataclass
class Asker:
    """One process at a time that asks this round's questions, and what it shares with us: whether it asks, and its calls in flight."""

    name: str
    rows: Path
    shared: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))
    pid: int = 0
    attempt: int = 0
    kill_at: float | None = None
    done: bool = False

    def start(self, ask: Callable[[Asker], None]) -> None:
        """Fork a process that asks. (What it imports is there already: a start takes a few milliseconds.)"""
        self.attempt += 1
        self.kill_at = None
        self.tell(asking=0, in_flight=0)
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                ask(self)
                status = 0
            except BaseException as error:
                print(f"{self.name}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)

    def tell(self, *, asking: int, in_flight: int) -> None:
        """Write what is shared."""
        self.shared[:] = struct.pack("<ii", asking, in_flight)

    @property
    def told(self) -> tuple[int, int]:
        """Whether it has begun to ask, and its calls in flight."""
        asking, in_flight = struct.unpack("<ii", self.shared[:])
        return asking, in_flight

    def read_rows(self) -> list[dict[str, Any]]:
        """All rows that its processes were handed, oldest first."""
        return [json.loads(line) for line in self.rows.read_text().split("\n") if line] if self.rows.exists() else []


def ask_all(asker: Asker, home: Path, url: str, run: str, questions: Sequence[str]) -> None:
    """Ask, and write a row for every answer as it is handed on; in the process that is killed."""
    price = {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2}
    teacher = OpenAI(model="m", base_url=f"{url}/v1", provider="bench", concurrency=CONCURRENCY, price=price)  # type: ignore[arg-type]
    calls = [Call(teacher="t", prompt=question) for question in questions]
    with CountedLedger.open(home / LEDGER_FILE) as ledger, asker.rows.open("ab", buffering=0) as rows:
        ledger.left = set()
        ledger.tell = lambda in_flight: asker.tell(asking=1, in_flight=in_flight)
        with Gateway({"t": teacher}, ledger, home=home, run=run, budget_micro_usd=None) as gateway:
            asker.tell(asking=1, in_flight=0)
            for answer in gateway.ask(calls, stage=asker.name, round=1):
                text = answer.reply.text if answer.reply else f"failed: {answer.error}"
                row = {"question": answer.call.prompt, "text": text, "fresh": answer.fresh, "attempt": asker.attempt}
                rows.write(orjson.dumps(row) + b"\n")


def unsettled_in_spools(home: Path) -> set[int]:
    """Entries whose answer is in a spool and not in the database."""
    rows = [orjson.loads(frame) for path in home.glob(f"{LEDGER_FILE}-spool/*.spool") for frame in frames(path)]
    arrived = {row[0] for row in rows if isinstance(row, list) and len(row) > 2}
    with Ledger.open(home / LEDGER_FILE, read_only=True) as ledger:
        return arrived & {entry for (entry,) in ledger._read(lambda: ledger._db.execute("SELECT id FROM entries WHERE state = 'open'"))}


def play_round(home: Path, url: str, number: int, processes: int, questions: int, kills: int, chance: random.Random) -> Counter[str]:
    """One round, with at most so many kills; what was counted."""
    asked = [f"question {number}/{n}" for n in range(questions)]
    askers = [Asker(f"asker-{n}", home / f"rows-{number}-{n}.jsonl") for n in range(processes)]
    counts: Counter[str] = Counter(questions=questions)
    recovered: set[int] = set()

    def start(asker: Asker) -> None:
        asker.start(lambda asker: ask_all(asker, home, url, f"round-{number}", asked))

    for asker in askers:
        start(asker)
    until = time.monotonic() + PATIENCE_S
    while not all(asker.done for asker in askers):
        time.sleep(0.001)
        for asker in askers:
            if asker.done:
                continue
            pid, status = os.waitpid(asker.pid, os.WNOHANG)
            if pid:
                if status:
                    raise RuntimeError(f"{asker.name} of round {number} ended with {os.waitstatus_to_exitcode(status)}")
                asker.done = True
            elif asker.kill_at is None and asker.told[0] and counts["kills"] < kills:
                asker.kill_at = time.monotonic() + chance.uniform(*KILL_AFTER_S)
            elif asker.kill_at is not None and time.monotonic() >= asker.kill_at and counts["kills"] < kills:
                os.kill(asker.pid, signal.SIGKILL)
                _, status = os.waitpid(asker.pid, 0)
                if not os.WIFSIGNALED(status):  # it was faster
                    asker.done = True
                    continue
                counts["kills"] += 1
                counts["in_flight_at_kills"] += asker.told[1]
                if processes == 1:  # else the other may be settling them already
                    recovered |= unsettled_in_spools(home)
                start(asker)
                until = time.monotonic() + PATIENCE_S
        if time.monotonic() > until:
            for asker in askers:
                if not asker.done:
                    os.kill(asker.pid, signal.SIGKILL)
            raise RuntimeError(f"round {number} came to no end")
    counts["recovered_from_spools"] = len(recovered)
    for asker in askers:
        counts += look_at_rows(asker, asked)
        asker.rows.unlink()
        asker.shared.close()
    return counts


def look_at_rows(asker: Asker, asked: Sequence[str]) -> Counter[str]:
    """What is wrong with the rows of an asker whose last process was left to come to its end."""
    rows = asker.read_rows()
    last = Counter(row["question"] for row in rows if row["attempt"] == asker.attempt)
    handed: set[str] = set()
    again = 0
    for row in rows:
        again += row["fresh"] and row["question"] in handed
        handed.add(row["question"])
    return Counter(
        missing=sum(last[question] == 0 for question in asked),
        doubled_rows=sum(n - 1 for n in last.values()),
        wrong=sum(row["text"] != f"answer to {row['question']}" for row in rows),
        handed_on_and_asked_again=again,
    )


def measure(processes: int, kills: int, questions: int, chance: random.Random) -> dict[str, Any]:
    """Rounds on one ledger until there were so many kills, and what the server and the ledger say at the end."""
    began = time.monotonic()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, running("--latency-ms", str(LATENCY_MS)) as url:
        home, rounds = Path(folder), 0
        while counts["kills"] < kills:
            counts += play_round(home, url, rounds, processes, questions, kills - counts["kills"], chance)
            rounds += 1
        stats = read_stats(url)
        with Ledger.open(home / LEDGER_FILE) as ledger:
            lost, total = ledger.lost(), ledger.sums("teacher")[0]
        audit = verify(home)
    return {
        "processes": processes,
        "rounds": rounds,
        **{name: counts[name] for name in ("kills", "questions", "in_flight_at_kills", "missing", "doubled_rows", "wrong")},
        "handed_on_and_asked_again": counts["handed_on_and_asked_again"],
        "requests": stats["requests"],
        "answered": stats["answered"],
        "paid_twice": stats["requests"] - counts["questions"],
        "answered_twice": stats["answered"] - stats["distinct"],
        "recovered_from_spools": counts["recovered_from_spools"] if processes == 1 else None,
        "settled": total.settled,
        "failed_unsent": total.failed,
        "lost_listed": len(lost),
        "lost_without_a_price": sum(entry.reserved_micro_usd is None for entry in lost),
        "lost_micro_usd": sum(entry.reserved_micro_usd or 0 for entry in lost),
        "ledger_faults": list(audit.faults),
        "seconds": round(time.monotonic() - began, 1),
    }


def broken_promises(figures: dict[str, Any]) -> list[str]:
    """What must be true and is not."""
    zero = ("missing", "doubled_rows", "wrong", "handed_on_and_asked_again", "lost_without_a_price")
    broken = [f"{name} is {figures[name]}" for name in zero if figures[name]]
    broken += figures["ledger_faults"]
    if figures["paid_twice"] > figures["in_flight_at_kills"]:
        broken.append("more was paid twice than was in flight")
    if figures["paid_twice"] > figures["lost_listed"]:
        broken.append("more was paid twice than is listed as lost")
    if figures["lost_listed"] > figures["in_flight_at_kills"]:
        broken.append("more is listed as lost than was in flight")
    if figures["settled"] != figures["questions"]:
        broken.append("not each question was settled once")
    return broken


def main() -> None:
    """Measure both, print and write the figures; exit status 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each half")
    parser.add_argument("--questions", type=int, default=300, help="of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    whole: dict[str, Any] = {"latency_ms": LATENCY_MS, "concurrency": CONCURRENCY, "kill_after_ms": [round(s * 1000) for s in KILL_AFTER_S]}
    broken = []
    for name, processes in (("one_process", 1), ("two_processes", 2)):
        whole[name] = figures = measure(processes, options.kills, options.questions, chance)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
        broken += [f"{name}: {what}" for what in broken_promises(figures)]
    whole["broken_promises"] = broken
    if options.json:
        write_json(options.json, whole)
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
