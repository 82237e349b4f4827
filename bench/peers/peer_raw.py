"""No engine at all: bytes that were written beforehand go over bare connections, so that the server's own limit is known."""

from __future__ import annotations

import asyncio
import json
import re
from urllib.parse import urlsplit

from measure import Watch, arguments, parsed, question

options = parsed(arguments(__doc__))

import uvloop  # noqa: E402  (after the core is chosen)

LENGTH = re.compile(rb"Content-Length: (\d+)\r\n")


class Line(asyncio.Protocol):
    """One connection, which sends the next question as soon as the last is answered."""

    left = options.calls
    answered = 0

    def __init__(self, ended: asyncio.Event) -> None:
        self.ended, self.received = ended, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        if not Line.left:
            if Line.answered == options.calls:
                self.ended.set()
            return
        Line.left -= 1
        body = b'{"model":"m","max_tokens":100,"messages":[{"role":"user","content":%b}]}' % json.dumps(question(Line.left)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end >= 0 and len(self.received) == end + 4 + int(LENGTH.search(self.received)[1]):
            self.received = b""
            Line.answered += 1
            self.send()


async def ask_all() -> int:
    """How many answers came."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    place = urlsplit(options.url)
    for _ in range(min(options.concurrency, options.calls)):
        await loop.create_connection(lambda: Line(ended), place.hostname, place.port)
    await ended.wait()
    return Line.answered


watch = Watch()
watch.report(uvloop.run(ask_all()))
