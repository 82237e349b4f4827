"""A model's server that we started ourselves: when it has died, no call will be answered, and its log says why."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from factory.errors import TeacherFault
from factory.teacher import Connection, Heard
from schemas.call import Call, Params

# What Python, pydantic and argparse call an error, with or without the head of vLLM's own lines. Of the errors of several
# processes the last is the one to read, except for those that only refer to it.
ERROR = re.compile(
    r"(?:\([^)]*pid=\d+\) )?(?:ERROR [\d-]+ [\d:]+ \[[^\]]*\] )?((?:[\w.]+(?:Error|Exception): |Value error, |\S+: error: ).*)"
)
SAYS_NOTHING = "root cause"


@dataclass(frozen=True)
class StartedConnection:
    """A connection to a server that is ours; `name` is what it is called in a fault."""

    inner: Connection
    process: asyncio.subprocess.Process
    log: Path
    name: str

    async def ask(self, call: Call, params: Params) -> Heard:
        try:
            return await self.inner.ask(call, params)
        except TeacherFault as fault:
            if self.process.returncode is not None:
                said = f"the {self.name} has died: {last_words(self.log)} (all of it: {self.log})"
                raise TeacherFault("stop", said, paid=fault.paid) from fault
            raise


def last_words(log: Path) -> str:
    """Why a server ended, by its log: the last error that Python names there, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [found[1] for line in lines if (found := ERROR.match(line)) and SAYS_NOTHING not in line]
    words = errors[-1] if errors else lines[-1] if lines else "it said nothing"
    return words.partition(" [type=")[0][:300]
