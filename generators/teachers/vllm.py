"""The vllm teacher: a server that the recipe starts and stops, one that runs already, or vLLM inside of this process."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import importlib.util
import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from factory.errors import TeacherFault
from factory.teacher import FREE, Connection, Port, Price, Teacher
from generators.teachers.guard import guarded
from generators.teachers.http import addresses, each, missing_keys, open_server, ports_of, read_key
from generators.teachers.models import weights_hash
from generators.teachers.openai import OpenAIConnection
from generators.teachers.started import StartedConnection, last_words

MODULE = "vllm.entrypoints.openai.api_server"  # where vLLM's command `vllm serve` is missing, as in its builds for CPUs, this works
OURS = {"host": "we choose it", "port": "we choose it", "uds": "we choose it", "api-key": "we choose it", "model": "use weights"}
POLL_S = 0.25

# Arguments of vLLM that change its speed, or what it takes, and no answer. All others are part of who answers.
NOT_IDENTITY = {
    "how it is loaded": ("download-dir", "load-format", "safetensors-load-strategy", "trust-remote-code", "hf-token"),
    "what it is called": ("served-model-name",),
    "who does the work": (
        *("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size", "enable-expert-parallel"),
        *("distributed-executor-backend", "max-parallel-loading-workers"),
    ),
    "how much there is room for": (
        *("max-model-len", "max-num-seqs", "max-num-batched-tokens", "max-logprobs", "gpu-memory-utilization"),
        *("kv-cache-memory-bytes", "swap-space", "cpu-offload-gb", "block-size", "num-gpu-blocks-override"),
    ),
    "in which order": ("enable-prefix-caching", "enable-chunked-prefill", "async-scheduling", "scheduling-policy"),
    "compiled or not": ("enforce-eager", "compilation-config"),
    "what is told besides": (
        "use-tqdm-on-load",
        *("uvicorn-log-level", "disable-uvicorn-access-log", "disable-log-stats", "disable-log-requests", "enable-log-requests"),
        *("enable-prompt-tokens-details", "shutdown-timeout"),
    ),
}


class VLLM(Teacher):
    """A model under vLLM: a hub name, a folder, or what a server that runs calls it.

    By default the run starts a server and stops it at its end: `python` names the interpreter that has vLLM (this one by
    default), or `command` what is run instead; `arguments` are vLLM's own, and `environment` is added to ours. With `base_url`
    (or a list) a server that runs already is asked; with `in_process`, vLLM inside of this process. `weights` is where the model
    is loaded from, if `model` is only its name.

    The three ways to ask one model are one teacher, and the ledger answers each with what another was told. Who answers is the
    model's name, a hash of its files where they are on this machine, and those of the `arguments` that may change an answer, so
    tell them of a server that runs already as well.
    """

    kind: ClassVar[str] = "vllm"

    weights: str | None = None
    base_url: str | tuple[str, ...] | None = None
    api_key_env: str | tuple[str, ...] | None = None
    in_process: bool = False
    python: Path | None = None
    command: tuple[str, ...] = ()
    arguments: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    concurrency: int = Field(64, ge=1)
    timeout_s: float = Field(600, gt=0)
    start_timeout_s: float = Field(900, gt=0)

    @field_validator("base_url")
    @classmethod
    def _addresses(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return None if value is None else addresses(value)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        idle = {"python": self.python, "command": self.command}
        if self.base_url and (set_too := _set({"in_process": self.in_process, "environment": self.environment, **idle})):
            raise ValueError(f"base_url names a server that runs already: {set_too} can't change it")
        if self.in_process and (set_too := _set(idle)):
            raise ValueError(f"in_process starts no server: leave out {set_too}")
        if self.command and self.python:
            raise ValueError("command names its own interpreter: leave out python")
        if self.api_key_env and not self.base_url:
            raise ValueError("api_key_env is for a server that runs already: set base_url")
        for name in self.arguments:
            if why := OURS.get(_plain(name)):
                raise ValueError(f"arguments: {name} is not for a recipe: {why}")
        return self

    def identity(self) -> tuple[str, str]:
        """The model's name; a hash of all that its folder holds, where it is here; the arguments that may change an answer.

        Hashing takes a second a gigabyte, once a process. By names and sizes alone a model that was trained on would be the same.
        """
        who = f"{Path(self.model).name}@{_hash(here)}" if (here := self._here) else self.model
        leave = {name for names in NOT_IDENTITY.values() for name in names}
        said = {_plain(name): _content(value) for name, value in self.arguments.items()}
        kept = sorted(name for name in said if name.removeprefix("no-") not in leave)
        return "vllm", " ".join([who, *(f"{name}={json.dumps(said[name], sort_keys=True, default=str)}" for name in kept)])

    def known_price(self, tokens_in: int | None = None) -> Price:
        return self.price or FREE

    def check(self) -> str | None:
        if self.base_url:
            return missing_keys(each(self.api_key_env))
        if not self._here and _is_path(self.weights or self.model):
            return f"there is no model at {self.weights or self.model}"
        if self.command:
            return None if shutil.which(self.command[0]) else f"there is no command {self.command[0]}"
        return None if _has_vllm(self.python) else self._without_vllm()

    def ports(self) -> tuple[Port, ...]:
        if self.base_url:
            return ports_of(each(self.base_url), each(self.api_key_env), self.model, self._open)
        # The server that is started is this teacher's alone, and so is its pace. (Its identity may be a hash of gigabytes.)
        return (Port(self.model, f"vllm started by teacher {id(self)}", self.connect),)

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        if self.base_url:
            return self.ports()[0].connect(home)
        return self._within(home) if self.in_process else self._start(home)

    @asynccontextmanager
    async def _open(self, url: str, key_env: str | None, home: Path) -> AsyncIterator[Connection]:
        headers = {"Authorization": f"Bearer {read_key(key_env)}"} if key_env else {}
        async with open_server(url, self, headers) as server:
            yield OpenAIConnection(server, self.model)

    @asynccontextmanager
    async def _start(self, home: Path) -> AsyncIterator[Connection]:
        if missing := await asyncio.to_thread(self.check):
            raise TeacherFault("stop", missing)
        port, key = _free_port(), secrets.token_urlsafe(16)
        log = self._log(home, port)
        command = self.command or (str(self.python.expanduser() if self.python else sys.executable), "-m", MODULE)
        # The key keeps out others on this machine. It is no argument, since those are for everybody to see.
        environment = {**{name: str(value) for name, value in self.environment.items()}, "VLLM_API_KEY": key}
        async with guarded([*command, *self._options(host="127.0.0.1", port=port)], environment, log) as process:
            url = f"http://127.0.0.1:{port}"
            await self._wait(port, process, log)
            async with open_server(f"{url}/v1", self, {"Authorization": f"Bearer {key}"}) as server:
                yield StartedConnection(OpenAIConnection(server, self.model), process, log, "vLLM server")

    @asynccontextmanager
    async def _within(self, home: Path) -> AsyncIterator[Connection]:
        from generators.teachers.vllm_engine import EngineConnection, open_engine

        if missing := self.check():
            raise TeacherFault("stop", missing)
        environment = {name: str(value) for name, value in self.environment.items()}
        async with open_engine(self._options(), environment, self._log(home, "in-process")) as engine:
            yield EngineConnection(engine, self.model, self.timeout_s)

    def _options(self, **more: Any) -> list[str]:
        load = str(self._here or self.weights or self.model)
        named = {} if load == self.model else {"served-model-name": self.model}
        # No line a request; and no bars on the screen, which is the run's.
        quiet: dict[str, Any] = {"use-tqdm-on-load": False} if self.in_process else {} if self.command else {"uvicorn-log-level": "warning"}
        return options({"model": load, **named, **quiet, **self.arguments, **more})

    def _log(self, home: Path, which: object) -> Path:
        return home / "logs" / f"vllm-{re.sub(r'[^A-Za-z0-9.-]+', '-', self.model).strip('-.')[-60:]}-{which}.log"

    async def _wait(self, port: int, process: asyncio.subprocess.Process, log: Path) -> None:
        """Until the server says that it is ready. A fault of the kind "stop" where it ends before, or takes too long."""
        try:
            async with asyncio.timeout(self.start_timeout_s):
                while process.returncode is None:
                    if await asyncio.to_thread(_is_ready, port):
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            long = f"the vLLM server was not ready within {self.start_timeout_s:g} s (start_timeout_s)"
            raise TeacherFault("stop", f"{long}: {last_words(log)} (all of it: {log})") from error
        raise TeacherFault("stop", f"the vLLM server did not start: {last_words(log)} (all of it: {log})")

    @property
    def _here(self) -> Path | None:
        """The model's folder or file, where it is on this machine."""
        path = Path(self.weights or self.model).expanduser()
        return path if path.exists() else None

    def _without_vllm(self) -> str:
        if self.python and not shutil.which(self.python.expanduser()):
            return f"there is no interpreter {self.python}"
        has = f"{self.python} has no vLLM" if self.python else "vLLM is not installed here"
        other = "" if self.in_process else ", name the interpreter of another environment by `python`, or a server that runs by `base_url`"
        return f"{has}. Install it (pip install {'vllm' if self.python else repr('gristmill[vllm]')}){other}"


def options(arguments: Mapping[str, Any]) -> list[str]:
    """A recipe's arguments as a command takes them: true is a flag, false its opposite, null nothing, a mapping JSON."""
    made: list[str] = []
    for name, value in arguments.items():
        if value is None:
            continue
        if isinstance(value, bool):
            made.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            made += [f"--{name}", *map(_word, value)]
        else:
            made += [f"--{name}", _word(value)]
    return made


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _plain(name: str) -> str:
    """An argument's name as vLLM's help has it; it takes it with underscores as well."""
    return name.replace("_", "-")


def _content(value: Any) -> Any:
    """An argument's value; of a path that is here (or NAME=PATH, as LoRA modules are given), a hash of what it holds."""
    if isinstance(value, list):
        return [_content(item) for item in value]
    if isinstance(value, str):
        head, equals, tail = value.rpartition("=")
        path = Path(tail).expanduser()
        if tail and path.exists():
            return f"{head}{equals}{path.name}@{_hash(path)}"
    return value


def _set(fields: Mapping[str, object]) -> str:
    return ", ".join(name for name, value in fields.items() if value)


def _is_path(model: str) -> bool:
    """Whether a name can only be meant as a path: hub names have one slash, and start with a letter or digit."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


@cache
def _has_vllm(python: Path | None) -> bool:
    if python is None:
        return importlib.util.find_spec("vllm") is not None
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    with suppress(OSError):
        return subprocess.run([python.expanduser(), "-c", look], capture_output=True, check=False, timeout=60).returncode == 0
    return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _is_ready(port: int) -> bool:
    asking = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        asking.request("GET", "/health")
        return asking.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        asking.close()


def _hash(model: Path) -> str:
    """16 hex digits of BLAKE2b over the names and bytes of a model's files; their place, hidden files and its card aside."""
    digest = hashlib.blake2b(digest_size=8)
    for path in [model] if model.is_file() else _files(model):
        digest.update(f"{path.name} {weights_hash(path)}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    # Not only weights: the configuration, the tokenizer and the chat template change the answer as much.
    return (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md" and not path.name.startswith("."))
