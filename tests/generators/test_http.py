"""What a connection does not take at once of a body is written on as it does."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from generators.teachers import http
from generators.teachers.openai import OpenAI


async def slow_reader(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads nothing for a moment, so that the client's buffers fill; then answers with how much came."""
    await asyncio.sleep(0.3)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    body = await reader.readexactly(length)
    answer = json.dumps({"got": len(json.loads(body)["text"])}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("size", [10, 900_000, 8_000_000])
def test_a_body_that_the_connection_does_not_take_at_once_comes_whole(size: int, run: Callable[..., Any]) -> None:
    left = []

    async def ask() -> object:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(slow_reader, sock=listening, limit=2**16)
        async with server:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with http.open_server(url, OpenAI(model="m", base_url=url)) as opened:
                asking = asyncio.ensure_future(opened.post("/", {"text": "a" * size}))
                await asyncio.sleep(0.1)
                left.extend(connection.transport.get_write_buffer_size() for connection in opened.wire.open)
                answer, _ = await asyncio.wait_for(asking, 30)
                return answer["got"]

    assert run(ask()) == size
    assert bool(left[0]) == (size > 1_000_000)
