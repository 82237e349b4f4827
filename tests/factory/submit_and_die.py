"""Asks thirty questions in one batch, and dies by `kill -9` at a moment of its submission; run by test_batch.py."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from factory import batch
from factory.gateway import Gateway
from factory.ledger import Ledger
from generators.teachers import batches
from tests.factory.test_batch import asked, questions, teacher


def _break(kind: type[Any], name: str) -> None:
    """Die once that method of it is done."""
    work = getattr(kind, name)

    async def last(*given: Any) -> None:
        await work(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(kind, name, last)


if __name__ == "__main__":
    home, kind, url, moment = sys.argv[1:]
    batch.QUIET_S = 0.01
    if moment == "marked":
        _break(Ledger, "mark_batch")
    elif moment == "submitted":
        for connection in (batches.OpenAIBatches, batches.AnthropicBatches):
            _break(connection, "submit")
    else:
        _break(Ledger, "batch_submitted")
    with (
        Ledger.open(Path(home) / "ledger.db") as ledger,
        Gateway({"t": teacher(kind, url)}, ledger, home=Path(home), run="r", budget_micro_usd=None) as gateway,
    ):
        asked(gateway, questions(30))
