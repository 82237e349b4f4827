"""Our gateway, through its public interface; the answers are counted and dropped, so that the memory is the gateway's own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from measure import Watch, arguments, parsed, question

parser = arguments(__doc__)
parser.add_argument("--stages", type=int, default=1, help="how many threads ask at once, each its own --calls")
parser.add_argument("--retries", type=int, help="the teacher's; its default where none is given")
parser.add_argument("--timeout-s", type=float)
options = parsed(parser)

import genai_prices.data  # noqa: E402, F401  (imported late by our gateway, which the peers do at once: the watch starts after it)

from factory.gateway import Gateway  # noqa: E402  (after the core is chosen)
from factory.ledger import Ledger  # noqa: E402
from generators.teachers.openai import OpenAI  # noqa: E402
from schemas.call import Call  # noqa: E402
from schemas.sample import Message  # noqa: E402


class Stage(threading.Thread):
    """One asker: how many of its answers came, why the others did not, and when it was ready."""

    def __init__(self, number: int, gateway: Gateway, order: list[int]) -> None:
        super().__init__()
        self.number, self.gateway, self.order = number, gateway, order
        self.rows = 0
        self.ready_s = 0.0
        self.errors: dict[str, int] = {}

    def calls(self) -> Iterator[Call]:
        """Its questions, each made when it is wanted."""
        for n in range(self.number * options.calls, (self.number + 1) * options.calls):
            yield Call(teacher="t", messages=(Message(role="user", content=question(n)),))

    def run(self) -> None:
        try:
            for answer in self.gateway.ask(self.calls(), stage=f"bench-{self.number}", round=1):
                if answer.reply is None:
                    self.fail(str(answer.error))
                    continue
                self.rows += 1
                if len(self.order) < options.calls:
                    self.order.append(self.number)
        except Exception as fault:  # the rows that came before it count
            self.fail(f"{type(fault).__name__}: {fault}")
        self.ready_s = time.monotonic()

    def fail(self, why: str) -> None:
        self.errors[why] = self.errors.get(why, 0) + 1


folder = Path(os.environ["PEER_FOLDER"])
settings = {name: value for name in ("retries", "timeout_s") if (value := getattr(options, name)) is not None}
teacher = OpenAI(model=options.model, base_url=f"{options.url}/v1", provider="bench", concurrency=options.concurrency, **settings)
watch, began = Watch(), time.monotonic()
order: list[int] = []
with (
    Ledger.open(folder / "ledger.db") as ledger,
    Gateway({"t": teacher}, ledger, home=folder, run="bench", budget_micro_usd=None) as gateway,
):
    stages = [Stage(n, gateway, order) for n in range(options.stages)]
    for stage in stages:
        stage.start()
    for stage in stages:
        stage.join()
    several = {"stage_s": [stage.ready_s - began for stage in stages], "share_of_first": order.count(0) / max(1, len(order))}
    watch.report(
        sum(stage.rows for stage in stages),
        errors={why: n for stage in stages for why, n in stage.errors.items()},
        lost=len(ledger.lost()),
        **(several if len(stages) > 1 else {}),
    )
