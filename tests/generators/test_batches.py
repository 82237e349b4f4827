import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from factory.errors import TeacherFault
from factory.teacher import BatchConnection, BatchItem, Teacher, Trace
from generators.teachers.anthropic import Anthropic
from generators.teachers.openai import OpenAI
from schemas.call import Call, Params, Reply
from schemas.sample import Message
from tests.batch_server import BatchServer
from tests.mock_server import MockServer

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
KINDS = ["openai", "anthropic"]


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


def teacher(kind: str, url: str, **settings: Any) -> Teacher:
    if kind == "anthropic":
        return Anthropic.model_validate({"model": "m", "base_url": url, **settings})
    return OpenAI.model_validate({"model": "m", "base_url": f"{url}/v1", **settings})


def items(connection: BatchConnection, mark: str, count: int) -> list[BatchItem]:
    calls = [Call(teacher="t", messages=(Message(role="user", content=f"question {n}"),)) for n in range(count)]
    return [BatchItem(f"{mark}-{n}", call, connection.body(call)) for n, call in enumerate(calls)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schema", [None, SCHEMA])
def test_a_batch_asks_with_the_body_that_asks_live(kind: str, schema: dict[str, Any] | None, server: BatchServer, tmp_path: Path) -> None:
    params = Params(max_tokens=7, temperature=0.5, top_p=0.9, stop=("x",), extra={"metadata": {"user_id": "é"}})
    messages = (Message(role="system", content="be brief"), Message(role="user", content="question 1"))
    call = Call(teacher="t", messages=messages, params=params, json_schema=schema)

    async def live(url: str) -> None:
        async with teacher(kind, url).connect(tmp_path) as connection:
            await connection.ask(call, params)

    async def batch(url: str) -> None:
        batching = teacher(kind, url).batching()
        assert batching is not None
        async with batching.connect(tmp_path) as connection:
            await connection.submit("mark", [BatchItem("mark-1", call, connection.body(call))])

    with MockServer(answer=lambda question: '{"a": "b"}') as mock:
        asyncio.run(live(mock.url))
        asyncio.run(batch(server.url))
        assert [body for _, body, _ in server.batches[0].asked] == [mock.received[0][2]]
        assert server.batches[0].endpoint == mock.received[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_found_by_its_mark_alone(kind: str, server: BatchServer, tmp_path: Path) -> None:
    now = datetime.now(UTC)

    async def work() -> None:
        batching = teacher(kind, server.url).batching()
        assert batching is not None
        async with batching.connect(tmp_path) as connection:
            ids = [await connection.submit(mark, items(connection, mark, 5)) for mark in ("a", "b", "c", "d")]
            assert await connection.find("a", 5, now, ()) == Trace(ids[0])
            assert await connection.find("e", 5, now, ()) == Trace()
            assert await connection.find("a", 5, now + timedelta(hours=1), ()) == Trace()  # they are all older than that
            server.held = True
            assert await connection.find("a", 5, now, ids[1:]) == (Trace(ids[0]) if kind == "openai" else Trace(unsure=True))
            assert await connection.find("e", 5, now, ids) == Trace()
            assert await connection.find("e", 6, now, ()) == Trace()

    asyncio.run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_every_end_of_a_question_is_told(kind: str, server: BatchServer, tmp_path: Path) -> None:
    server.ends = lambda question, nth: ("ok", "bad", "busy", "expired")[int(question.split()[1])]

    async def work() -> dict[str, Reply | TeacherFault]:
        batching = teacher(kind, server.url).batching()
        assert batching is not None
        async with batching.connect(tmp_path) as connection:
            asked = items(connection, "m", 4)
            provider_id = await connection.submit("m", asked)
            server.held = True
            status = await connection.status(provider_id)
            assert status is not None and (status.ended, status.done, status.total) == (False, 0, 4)
            server.held = False
            status = await connection.status(provider_id)
            assert status is not None and (status.ended, status.done, status.total) == (True, 4, 4)
            assert await connection.status("another") is None
            calls = {item.custom_id: item.call for item in asked}
            return {custom_id: end async for custom_id, end in connection.results(provider_id, calls)}

    ends = asyncio.run(work())
    told = {custom_id: end.text if isinstance(end, Reply) else (end.kind, end.paid) for custom_id, end in ends.items()}
    busy = "again" if kind == "openai" else "later"
    assert told == {"m-0": "answer to\u2028question 0", "m-1": ("never", False), "m-2": (busy, False), "m-3": ("again", False)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_of_the_environment_goes_to_another_server(
    kind: str, server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.setenv(variable, "secret")

    async def work() -> None:
        batching = teacher(kind, server.url).batching()
        assert batching is not None
        async with batching.connect(tmp_path) as connection:
            await connection.submit("m", items(connection, "m", 1))

    asyncio.run(work())
    assert server.batches and not any("secret" in value for headers in server.headers for value in headers.values())


def test_an_anthropic_batch_takes_no_raw_prompt(server: BatchServer, tmp_path: Path) -> None:
    async def work() -> None:
        async with Anthropic(model="m", base_url=server.url).batching().connect(tmp_path) as connection:
            connection.body(Call(teacher="t", prompt="raw"))

    with pytest.raises(TeacherFault, match="not a raw prompt") as caught:
        asyncio.run(work())
    assert caught.value.kind == "never"
