"""Bodies are written in the step that asks; what the connection does not take at once is written on as it does."""

import asyncio
import json
import socket
import sys

import pytest

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


@pytest.mark.parametrize("size", [10, 900_000, 8_000_000])  # small; as bytes, in one go; as a file, which waits
def test_a_body_that_the_connection_does_not_take_at_once_comes_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    begun = http._Begun

    class Counted(begun):  # type: ignore[valid-type, misc]
        def __await__(self):  # type: ignore[no-untyped-def]
            waited.append(size)
            return super().__await__()

    monkeypatch.setattr(http, "_Begun", Counted)

    async def ask() -> object:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        server = await asyncio.start_server(slow_reader, sock=listening, limit=2**16)
        async with server:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            async with http.open_server(url, OpenAI(model="m", base_url=url)) as opened:
                answer, _ = await opened.post("/", {"text": "a" * size})
                return answer["got"]

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == size
    if sys.version_info < (3, 12):  # from there on aiohttp takes the first step itself
        assert bool(waited) == (size > 1_000_000)
