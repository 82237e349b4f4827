"""Sees to it that what we start ends with us, even where we are ended by `kill -9`.

`python -m generators.teachers.guard COMMAND ARGUMENT...` starts the command in a process group of its own and watches its own
standard input. When that closes, which the system sees to when its parent dies, the group is told to end, and is ended.
Without a command it ends processes that run already, at once and by force: their ids are told to it, one a line (Linux alone).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

GRACE_S = 10.0  # between being told to end and being ended
LOOK_S = 0.2


@asynccontextmanager
async def guarded(command: Sequence[str], environment: Mapping[str, str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends when the command does, with its exit code; at the end of the context, nothing is left of it.

    What the command says goes to `log`. A command that is not there ends with the code 127, and its reason is in the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "generators.teachers.guard",
            *command,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,  # ctrl-C is for the run, which then stops this in order
        )
    try:
        yield process
    finally:
        # What the guard does takes its time, which a second interrupt must not cut short.
        await asyncio.shield(_end(process))


@asynccontextmanager
async def ended_with_us(processes: Callable[[], Iterable[int]]) -> AsyncIterator[None]:
    """End processes by the end of the context that were started inside of it by others. `processes` tells their ids, time and again."""
    guard = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "generators.teachers.guard", stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    telling = asyncio.create_task(_tell(guard, processes))
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.shield(_end(guard))


async def _tell(guard: asyncio.subprocess.Process, processes: Callable[[], Iterable[int]]) -> None:
    assert guard.stdin is not None
    told: set[int] = set()
    while True:
        if new := set(processes()) - told:
            guard.stdin.write("".join(f"{process}\n" for process in new).encode())
            told |= new
        await asyncio.sleep(LOOK_S)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    with suppress(ConnectionError):
        await process.stdin.wait_closed()
    await process.wait()


def main(command: Sequence[str]) -> int:
    """Run the command until it ends or standard input closes; gives its exit code as a shell does."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"can't start {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, lambda number, _: _signal(child.pid, signal.Signals(number)))
    threading.Thread(target=_end_group_with_parent, args=(child.pid,), daemon=True).start()
    code = child.wait()
    _signal(child.pid, signal.SIGKILL)  # what it has left behind: it can't be spoken to any more
    return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """Read ids of processes from standard input until it closes, and then end them all."""
    # By handles, since by then an id may be another process's.
    handles = []
    for line in sys.stdin:
        with suppress(ProcessLookupError):
            handles.append(os.pidfd_open(int(line)))
    for handle in handles:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)


def _end_group_with_parent(group: int) -> None:
    while os.read(0, 1 << 16):
        pass
    _signal(group, signal.SIGTERM)
    time.sleep(GRACE_S)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(group, number)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    end_with_parent()
