"""vLLM inside of this process: what its server would answer, without the server.

vLLM's own application takes the requests, so chat templates, schemas, log-probabilities and refusals are the server's to the
letter. It runs in a thread and an event loop of its own: loading a model blocks for minutes, and other teachers are asked meanwhile.
The engine puts whatever is asked at one time into one batch, and takes more in while it works (continuous batching).
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson
import uvloop

from factory.errors import TeacherFault
from factory.teacher import Heard
from generators.teachers.guard import ended_with_us
from generators.teachers.http import fault_of, in_the_shape_of
from generators.teachers.openai import question, reply_of
from schemas.call import Call, Params

T = TypeVar("T")
App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[dict[str, Any]]], Callable[[dict[str, Any]], Awaitable[None]]], Awaitable[None]
]


@dataclass(frozen=True)
class Engine:
    """vLLM's application and its engine, both to be touched in the thread of `loop` alone."""

    app: App
    client: Any
    loop: asyncio.AbstractEventLoop

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to a request; cancelling it ends the request in the engine as well."""
        return await _within(self.loop, _post(self.app, path, body))


@dataclass(frozen=True)
class EngineConnection:
    """Asks an engine in the words of the OpenAI protocol."""

    engine: Engine
    model: str
    timeout_s: float

    async def ask(self, call: Call, params: Params) -> Heard:
        try:
            body = orjson.dumps(question(call, params, self.model, "max_tokens", "schema"))
        except TypeError as error:
            raise TeacherFault("never", f"the question can't be written as JSON: {error}") from error
        try:
            async with asyncio.timeout(self.timeout_s):
                status, raw = await self.engine.post("/v1/chat/completions" if call.prompt is None else "/v1/completions", body)
        except TimeoutError as error:
            raise TeacherFault("again", f"no answer from vLLM within {self.timeout_s:g} s", paid=True) from error
        except Exception as error:  # whatever vLLM raises: its errors have no common parent
            raise self._fault(f"{type(error).__name__}: {error}") from error
        if status >= 500:
            raise self._fault(str(fault_of(status, raw, {})))
        if status != 200:
            raise fault_of(status, raw, {})
        with in_the_shape_of("OpenAI", raw):
            return Heard(reply_of(orjson.loads(raw), call, params))

    def _fault(self, message: str) -> TeacherFault:
        if self.engine.client.errored:
            return TeacherFault("stop", f"vLLM's engine has died: {message}", paid=True)
        return TeacherFault("again", message, paid=True)


@asynccontextmanager
async def open_engine(options: Sequence[str], environment: Mapping[str, str], log: Path) -> AsyncIterator[Engine]:
    """Load a model by the options of vLLM's server. What vLLM says goes to `log`. A fault of the kind "stop" where it can't be loaded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as around:
        loop = await around.enter_async_context(_thread())
        around.enter_context(_environment({**_settings(log), **environment}))
        await around.enter_async_context(ended_with_us(_engine_processes))  # they would wait for ever for one that was killed
        opened = AsyncExitStack()
        around.push_async_callback(_end, loop, opened)
        try:
            app, client = await _within(loop, _open(options, opened))
        except Exception as error:
            words = " ".join(str(error).partition("[type=")[0].split())
            raise TeacherFault("stop", f"vLLM can't load the model: {words[:300]} (more of it: {log})") from error
        yield Engine(app, client, loop)


@asynccontextmanager
async def _thread() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """An event loop at work in a thread of its own."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="vllm", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(thread.join)
        loop.close()


async def _end(loop: asyncio.AbstractEventLoop, opened: AsyncExitStack) -> None:
    with suppress(Exception):  # an engine that has died complains when it is told to end
        await asyncio.shield(_within(loop, opened.aclose()))


async def _open(options: Sequence[str], opened: AsyncExitStack) -> tuple[App, Any]:
    # Not what vLLM promises to keep, but what its server is made of: seen to work with 0.32.
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    parser.error = _refuse
    arguments = parser.parse_args(list(options))
    validate_parsed_serve_args(arguments)
    client = await opened.enter_async_context(build_async_engine_client(arguments))
    tasks = await client.get_supported_tasks()
    app = build_app(arguments, tasks, client.model_config)
    await init_app_state(client, app.state, arguments, tasks)
    return app, client


def _engine_processes() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if "EngineCore" in child.name and child.pid]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)  # a parser's own way is to end the process


async def _within(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


async def _post(app: App, path: str, body: bytes) -> tuple[int, bytes]:
    """One request by ASGI, the interface between a Python server and its application (https://asgi.readthedocs.io)."""
    gone = asyncio.Event()
    status, parts = 0, []
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        if (event := next(asked, None)) is not None:
            return event
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        nonlocal status
        status = event.get("status", status)
        parts.append(event.get("body", b""))

    task = asyncio.ensure_future(app(_scope(path, len(body)), receive, send))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        gone.set()  # not by cancelling: the application works in a task of its own, which only hears of this
        await asyncio.wait([task])
        raise
    return status, b"".join(parts)


def _scope(path: str, size: int) -> dict[str, Any]:
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(size)}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
    }


def _settings(log: Path) -> dict[str, str]:
    """What makes vLLM, and the processes that it starts, log to a file (a run's own view has the screen), and run in here."""
    config = log.with_suffix(".json")
    said = {"class": "logging.FileHandler", "filename": str(log.absolute()), "formatter": "line"}
    logger = {"handlers": ["file"], "level": "INFO", "propagate": False}
    form = {"line": {"format": "(%(process)d) %(levelname)s %(asctime)s %(message)s"}}
    config.write_text(json.dumps({"version": 1, "formatters": form, "handlers": {"file": said}, "loggers": {"vllm": logger}}))
    return {
        "VLLM_LOGGING_CONFIG_PATH": str(config.absolute()),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a process that has threads can't be forked safely
        "VLLM_API_KEY": "",  # of a server elsewhere, if it is set
    }


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
