"""The local teacher: a GGUF model under llama.cpp, started and stopped for the user; the offline default."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from factory.errors import MissingExtra, TeacherDown, TeacherFault
from factory.teacher import FREE, Connection, Heard, Price, Teacher
from generators.teachers.http import open_server
from generators.teachers.models import DEFAULT_MODEL, PACKAGED, find_model, missing_model, weights_hash
from generators.teachers.openai import OpenAIConnection
from generators.teachers.started import StartedConnection, last_words
from schemas.call import KEY_VERSION, Call, Params


class Local(Teacher):
    """`model`: a known name, a path to a .gguf, or a hub name "org/repo:file.gguf". `concurrency` is the number of slots,
    `context` the tokens that each has for question and answer. It costs nothing but time.

    A call is sampled with a seed made of all that it asks, so a run can be repeated: the same calls in the same order have the
    same answers. They are not promised in another order, nor with several at once: what the cache holds of earlier prompts, and
    what is computed beside a call, changes the last bits of its probabilities, and now and then a word. With `concurrency: 1` and
    `params: {extra: {cache_prompt: false}}` an answer hangs on its question alone, at the price of speed.
    """

    kind: ClassVar[str] = "local"

    model: str = DEFAULT_MODEL
    concurrency: int = Field(4, ge=1)
    timeout_s: float = Field(600, gt=0)
    context: int = Field(2048, ge=128)
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _licence(cls, settings: dict[str, Any]) -> dict[str, Any]:
        known = PACKAGED.get(settings.get("model", DEFAULT_MODEL))
        return {"licence": known.licence, **settings} if known else settings

    def identity(self) -> tuple[str, str]:
        """The file's name, for people, and a hash of its weights, which decide the answer; where the file lies does not matter."""
        path = find_model(self.model)
        if path is None:
            raise TeacherDown(missing_model(self.model))
        return "local", f"{path.stem}@{weights_hash(path)}"

    def known_price(self, tokens_in: int | None = None) -> Price:
        return self.price or FREE

    def check(self) -> str | None:
        if importlib.util.find_spec("xllamacpp") is None:
            return str(_missing_package()).replace("\n", ". ")
        return None if find_model(self.model) else missing_model(self.model)

    @asynccontextmanager
    async def connect(self, home: Path) -> AsyncIterator[Connection]:
        if importlib.util.find_spec("xllamacpp") is None:
            raise _missing_package()
        path = find_model(self.model)
        if path is None:
            raise TeacherFault("stop", missing_model(self.model))
        log = home / "logs" / f"local-{path.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [path, self.concurrency, self.context, self.threads or physical_cores()]
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "generators.teachers.local_server",
                *map(str, command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # ctrl-C is for the run, which then stops this in order
            )
        try:
            assert process.stdout is not None
            address = (await process.stdout.readline()).decode().strip()
            if not address:
                await process.wait()
                raise TeacherFault("stop", f"llama.cpp can't serve {path}: {last_words(log)} (all of it: {log})")
            async with open_server(address + "/v1", self) as server:
                yield StartedConnection(Seeded(OpenAIConnection(server, path.stem)), process, log, "local server")
        finally:
            await _stop(process)


@dataclass(frozen=True)
class Seeded:
    """Sends a seed along, so that a run is repeatable as far as llama.cpp is."""

    inner: OpenAIConnection

    async def ask(self, call: Call, params: Params) -> Heard:
        params = params.model_copy(update={"extra": {"seed": _seed(call, params), **params.extra}})
        return await self.inner.ask(call, params)


def _seed(call: Call, params: Params) -> int:
    """31 bits of all that is asked: the same question is sampled alike, and another draw of it is not."""
    asked = call.model_copy(update={"params": params}).key("", "")
    return int(asked.removeprefix(KEY_VERSION)[:8], 16) >> 1


def physical_cores() -> int:
    """The cores that this process may use, hyper-threads not counted twice: llama.cpp spins, and more threads slow it down."""
    if hasattr(os, "sched_getaffinity"):
        with suppress(OSError):
            siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
            return len({Path(siblings.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})
    return os.cpu_count() or 1


def _missing_package() -> MissingExtra:
    return MissingExtra("xllamacpp", "local", "a teacher of the kind 'local'")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Close its standard input, which ends it; kill it if that does not."""
    if process.stdin is not None:
        process.stdin.close()
        with suppress(ConnectionError):
            await process.stdin.wait_closed()
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
