"""Real sockets on this machine, on both event loops; what no socket can be made to do, a transport of our own does."""

import asyncio
import gzip
import socket
import ssl
import subprocess
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.errors import TeacherFault
from generators.teachers import wire as wires
from generators.teachers.http import open_server
from generators.teachers.openai import OpenAI
from generators.teachers.wire import Response, Unsafe, Wire, WireError

Run = Callable[[Awaitable[Any]], Any]
END = None  # in an answer: the connection is closed
HANG = b"hang"  # nothing more comes


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    async def within(work: Awaitable[Any]) -> Any:
        return await asyncio.wait_for(work, 20)

    return lambda work: request.param(within(work))


class Scripted:
    """A server that reads requests and says, piece by piece, the next of its `answers` to each; after these, "again"."""

    def __init__(self, *answers: Sequence[bytes | None]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = self.ended = 0
        self.by: list[int] = []  # which connection each request came by
        self.alpn: str | None = None

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        if secured := writer.get_extra_info("ssl_object"):
            self.alpn = secured.selected_alpn_protocol()
        try:
            while True:
                first, headers, body = await read(reader)
                self.requests.append((first, headers, body))
                self.by.append(number)
                for piece in self.answers.pop(0) if self.answers else [whole(b"again")]:
                    if piece is END:
                        return
                    if piece is HANG:
                        await reader.read()
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.ended += 1
            writer.close()

    @asynccontextmanager
    async def serve(self, safely: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        async with serving(self, safely) as port:
            yield f"{'https' if safely else 'http'}://127.0.0.1:{port}"


@asynccontextmanager
async def serving(script: Any, safely: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[None]] = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(asyncio.CancelledError):
            await script(reader, writer)
        with suppress(OSError):
            writer.transport.abort()

    server = await asyncio.start_server(kept, "127.0.0.1", 0, ssl=safely, limit=1 << 24)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first, headers, await reader.readexactly(int(headers.get("content-length", 0)))


@asynccontextmanager
async def to(url: str, headers: dict[str, str] | None = None, **settings: Any) -> AsyncIterator[Wire]:
    wire = Wire(url, headers or {}, **{"timeout_s": 5.0, "connect_s": 5.0, **settings})
    try:
        yield wire
    finally:
        await wire.close()


def whole(body: bytes, *headers: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    lines = (f"HTTP/{version} {status}", *headers, f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def head(*headers: str, status: str = "200 OK", version: str = "1.1") -> bytes:
    return "\r\n".join((f"HTTP/{version} {status}", *headers, "", "")).encode("latin-1")


def in_chunks(*chunks: bytes, trailers: str = "") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + f"0\r\n{trailers}\r\n".encode()


def bytewise(pieces: Iterable[bytes | None]) -> list[bytes | None]:
    return [part for piece in pieces for part in ([piece] if piece in (END, HANG) else [bytes([b]) for b in piece or b""])]


RAW = zlib.compressobj(wbits=-15)
RAW_DEFLATE = RAW.compress(b"hello there") + RAW.flush()
CHUNKED = "Transfer-Encoding: chunked"

# What is sent; the status and the body that are read; whether the connection serves on
ANSWERS: dict[str, tuple[list[bytes | None], int, bytes, bool]] = {
    "by its length": ([whole(b"hello")], 200, b"hello", True),
    "empty": ([whole(b"")], 200, b"", True),
    "in chunks": ([head(CHUNKED), in_chunks(b"hel", b"lo")], 200, b"hello", True),
    "in chunks, with trailers": ([head(CHUNKED), in_chunks(b"hello", trailers="X-Late: 1\r\nX-Kept: 2\r\n")], 200, b"hello", True),
    "after others": (
        [head(status="100 Continue"), head("X-Early: 1", status="103 Early Hints"), whole(b"hello")],
        200,
        b"hello",
        True,
    ),
    "no content": ([head(status="204 No Content")], 204, b"", True),
    "a refusal": ([whole(b"slow down", status="429 Too Many Requests")], 429, b"slow down", True),
    "elsewhere": ([whole(b"", "Location: /there", status="307 Temporary Redirect")], 307, b"", True),
    "the last by its header": ([whole(b"hello", "Connection: close")], 200, b"hello", False),
    "of HTTP/1.0": ([whole(b"hello", version="1.0")], 200, b"hello", False),
    "of HTTP/1.0, kept": ([whole(b"hello", "Connection: keep-alive", version="1.0")], 200, b"hello", True),
    "of HTTP/1.0, until the end": ([head(version="1.0"), b"hel", b"lo", END], 200, b"hello", False),
    "until the end": ([head(), b"hello", END], 200, b"hello", False),
    "gzip": ([whole(gzip.compress(b"hello there"), "Content-Encoding: GZIP")], 200, b"hello there", True),
    "gzip in members": ([whole(gzip.compress(b"hello ") + gzip.compress(b"there"), "Content-Encoding: gzip")], 200, b"hello there", True),
    "gzip until the end": ([head("Content-Encoding: gzip"), gzip.compress(b"hello there"), END], 200, b"hello there", False),
    "deflate": ([whole(zlib.compress(b"hello there"), "Content-Encoding: deflate")], 200, b"hello there", True),
    "deflate without zlib's head": ([whole(RAW_DEFLATE, "Content-Encoding: deflate")], 200, b"hello there", True),
    "packed otherwise": ([whole(b"hello", "Content-Encoding: br")], 200, b"hello", True),
    "gzip with spaces": ([whole(gzip.compress(b"hello there"), "Content-Encoding:  gzip  ")], 200, b"hello there", True),
    "by line feeds": ([whole(b"hello").replace(b"\r", b"")], 200, b"hello", True),
    "in chunks, with spaces": ([head(CHUNKED), b"5 \r\nhello\r\n0\r\n\r\n"], 200, b"hello", True),
    "with a line's end after it": ([whole(b"hello") + b"\r\n"], 200, b"hello", True),
    "with another after it": ([whole(b"hello") + whole(b"bad")], 200, b"hello", False),
    "with half of another after it": ([whole(b"hello") + b"HTTP/1.1 2"], 200, b"hello", False),
    "with rubbish after it": ([whole(b"hello") + b"\0\0\0"], 200, b"hello", False),
}


@pytest.mark.parametrize("how", ["whole", "by bytes"])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_in_any_form_is_read_and_the_next_is_asked_for(name: str, how: str, run: Run) -> None:
    pieces, status, body, kept = ANSWERS[name]
    if "after it" in name and how == "by bytes":
        return  # it comes when nobody asks, which is another test's

    async def work() -> None:
        server = Scripted(pieces if how == "whole" else bytewise(pieces))
        async with server.serve() as url, to(f"{url}/v1") as wire:
            first = await wire.post("/chat", b"{}")
            assert (first.status, first.body) == (status, body)
            assert not {"x-late", "x-kept", "x-early"} & first.headers.keys()
            assert (await wire.post("/chat", b'{"n": 2}')).body == b"again"
        assert server.connections == (1 if kept else 2)
        assert [(line, sent) for line, _, sent in server.requests] == [
            ("POST /v1/chat HTTP/1.1", b"{}"),
            ("POST /v1/chat HTTP/1.1", b'{"n": 2}'),
        ]

    run(work())


def test_the_first_of_a_header_counts_and_its_name_is_in_lower_case(run: Run) -> None:
    async def work() -> None:
        server = Scripted([whole(b"", "Retry-After: 1", "RETRY-AFTER: 2", "X-Name: caf\xe9", "X-Empty:")])
        async with server.serve() as url, to(url) as wire:
            headers = (await wire.post("/", b"")).headers
            assert headers == {"retry-after": "1", "x-name": "caf\xe9", "x-empty": "", "content-length": "0"}

    run(work())


# What breaks

CUT = gzip.compress(b"hello there" * 50)[:-9]
LONG = "is longer than 2,000 bytes"
BROKEN: dict[str, tuple[list[bytes | None], str]] = {
    "before a byte": ([END], "the connection was closed"),
    "in the head": ([b"HTTP/1.1 200 OK\r\nContent-", END], "the connection was closed"),
    "after another": ([head(status="100 Continue"), END], "the connection was closed"),
    "in the body": ([whole(b"hello")[:-2], END], "the answer broke off"),
    "in a chunk": ([head(CHUNKED), in_chunks(b"hello")[:5], END], "the answer broke off"),
    "before the last chunk": ([head(CHUNKED), in_chunks(b"hello")[:-5], END], "the answer broke off"),
    "no chunk": ([head(CHUNKED), b"hello\r\n"], "the answer broke off"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], "the answer is not HTTP"),
    "a TLS alert": ([b"\x15\x03\x01\x00\x02\x02\x46"], "the answer is not HTTP"),
    "two lengths": ([head("Content-Length: 5", "Content-Length: 6"), b"hello!"], "the answer is not HTTP"),
    "another protocol": ([head("Connection: upgrade", "Upgrade: h2c", status="101 Switching Protocols")], "the answer is not HTTP"),
    "a giant head": ([head()[:-2], *[b"X-Filler: %b\r\n" % (b"a" * 8000)] * 9], "the answer has a head of more than 65,536 bytes"),
    "a giant line": ([head()[:-2], b"X-Filler: ", *[b"a" * 8000] * 9], "the answer has a head of more than 65,536 bytes"),
    "heads without end": ([head(status="100 Continue")] * 4000, "the answer has a head of more than 65,536 bytes"),
    "gzip that is none": ([whole(b"hello", "Content-Encoding: gzip")], "the answer broke off"),
    "gzip that stops": ([whole(CUT, "Content-Encoding: gzip")], "the answer broke off"),
    "too long": ([head("Content-Length: 3000"), b"a" * 1500, b"a" * 1500], LONG),
    "too long in chunks": ([head(CHUNKED), *[in_chunks(b"a" * 900)[:-5]] * 4], LONG),
    "too long unpacked": ([whole(gzip.compress(b"a" * 100_000), "Content-Encoding: gzip")], LONG),
    "too long in members": ([whole(gzip.compress(b"a" * 900) * 4, "Content-Encoding: gzip")], LONG),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_is_named_and_the_next_is_asked_anew(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, says = BROKEN[name]
    if says == LONG:
        monkeypatch.setattr(wires, "BODY_BYTES", 2000)

    async def work() -> None:
        server = Scripted(pieces)
        async with server.serve() as url, to(url.replace("//", "//me:pw@")) as wire:
            with pytest.raises(WireError) as caught:
                await wire.post("/", b"{}")
            assert says in str(caught.value)
            assert str(caught.value).endswith(f" at {url.removeprefix('http://')}")
            assert (caught.value.sent, type(caught.value)) == (True, WireError)
            assert (await wire.post("/", b"{}")).body == b"again"
        assert server.connections == 2

    run(work())


@pytest.mark.parametrize("end", [END, HANG, b"\0\0"], ids=["closed", "late", "rubbish"])
def test_a_refusal_stands_without_its_body(end: bytes | None, run: Run) -> None:
    async def work() -> None:
        started = head(CHUNKED, "Retry-After: 3", status="429 Too Many Requests") + b"100\r\nslow"
        server = Scripted([started, b"" if end == b"\0\0" else end, b"1\r\n" * 200])
        async with server.serve() as url, to(url, timeout_s=0.3) as wire:
            status, headers, body = await wire.post("/", b"{}")
            assert (status, headers["retry-after"], body) == (429, "3", b"")

    run(work())


def test_a_reset_is_a_connection_that_was_closed(run: Run) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    async def work() -> None:
        async with serving(reset) as port, to(f"http://127.0.0.1:{port}") as wire:
            with pytest.raises(WireError, match=r"^the connection was closed at 127\.0\.0\.1") as caught:
                await wire.post("/", b"{}")
            assert caught.value.sent

    run(work())


# Connections


def test_connections_are_kept_and_the_last_used_is_taken_first(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url, to(url) as wire:
            for _ in range(5):
                await wire.post("/", b"{}")
            assert server.by == [1] * 5
            await asyncio.gather(*(wire.post("/", b"{}") for _ in range(20)))
            assert server.connections == 20
            for _ in range(5):
                await wire.post("/", b"{}")
            assert (server.connections, len(set(server.by[-5:]))) == (20, 1)

    run(work())


def test_a_connection_that_lies_idle_is_closed_and_no_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "KEEP_ALIVE_S", 0.5)

    async def work() -> None:
        server = Scripted()
        async with server.serve() as url, to(url) as wire:
            await asyncio.gather(*(wire.post("/", b"{}") for _ in range(3)))
            for _ in range(8):
                await asyncio.sleep(0.1)
                await wire.post("/", b"{}")
            assert (server.connections, server.ended) == (3, 2)
            await asyncio.sleep(1)
            assert server.ended == 3
            await wire.post("/", b"{}")
            assert server.connections == 4

    run(work())


@pytest.mark.parametrize("unasked", [b"", b"\0", b"\r\n", whole(b"", status="408 Request Timeout")], ids=["end", "rubbish", "line", "408"])
def test_a_connection_that_ended_or_spoke_unasked_is_never_used(unasked: bytes, run: Run) -> None:
    async def first_then_unasked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read(reader)
        writer.write(whole(b"hello"))
        await asyncio.sleep(0.05)
        if unasked:
            writer.write(unasked)
            await reader.read()

    async def work() -> None:
        async with serving(first_then_unasked) as port, to(f"http://127.0.0.1:{port}") as wire:
            for _ in range(3):
                assert (await wire.post("/", b"{}")).body == b"hello"
                assert len(wire.idle) == 1
                while wire.idle:
                    await asyncio.sleep(0.01)

    run(work())


def test_a_connection_whose_end_is_not_told_yet_is_not_used_either(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url, to(url) as wire:
            await wire.post("/", b"{}")
            wire.idle[0].transport.close()  # as on an error of the socket, the protocol is told in the next step
            assert len(wire.idle) == 1
            assert (await wire.post("/", b"{}")).body == b"again"
            assert server.by == [1, 2]

    run(work())


def test_whoever_is_cancelled_takes_the_connection_along(run: Run) -> None:
    async def work() -> None:
        server = Scripted([whole(b"first")], [HANG])
        async with server.serve() as url, to(url) as wire:
            await wire.post("/", b"{}")
            asking = asyncio.ensure_future(wire.post("/", b"{}"))
            await asyncio.sleep(0.1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert (await wire.post("/", b"{}")).body == b"again"
            assert (server.by, server.ended) == ([1, 1, 2], 1)

    run(work())


def test_who_is_cancelled_while_the_answer_arrives_harms_no_other(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url, to(url) as wire:
            for _ in range(50):
                first = asyncio.ensure_future(wire.post("/", b"{}"))
                while not first.done() and not wire.idle:
                    await asyncio.sleep(0)
                second = wire.post("/", b"{}")  # on the connection that the first one had
                first.cancel()
                assert (await second).body == b"again"
                await asyncio.gather(first, return_exceptions=True)

    run(work())


def test_a_question_is_out_in_the_step_that_asks_it(run: Run) -> None:
    async def work() -> None:
        loop, listening = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        async with to(f"http://127.0.0.1:{listening.getsockname()[1]}") as wire:
            first = asyncio.ensure_future(wire.post("/", b"{}"))
            peer, _ = await loop.sock_accept(listening)
            await loop.sock_recv(peer, 65536)
            await loop.sock_sendall(peer, whole(b"hello"))
            await first
            asking = wire.post("/", b'{"a": 1}')
            asking.send(None)  # type: ignore[attr-defined]
            assert peer.recv(65536).endswith(b'Content-Length: 8\r\n\r\n{"a": 1}')
            asking.close()
        peer.close()
        listening.close()

    run(work())


def test_an_answer_before_the_whole_question_is_the_last_of_its_connection(run: Run) -> None:
    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(whole(b"", status="413 Content Too Large"))
        await asyncio.sleep(5)

    async def work() -> None:
        async with serving(early) as port, to(f"http://127.0.0.1:{port}") as wire:
            assert (await wire.post("/", bytes(60_000_000))).status == 413
            assert not wire.idle

    run(work())


def test_a_server_that_ends_before_it_has_read_the_question_is_not_waited_for(run: Run) -> None:
    async def ending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        await asyncio.sleep(10)

    async def work() -> None:
        async with serving(ending) as port, to(f"http://127.0.0.1:{port}") as wire:
            with pytest.raises(WireError, match=r"^the connection was closed at"):
                await wire.post("/", bytes(60_000_000))

    run(work())


def test_who_waits_when_the_wire_is_closed_is_told(run: Run) -> None:
    async def work() -> None:
        server = Scripted([whole(b"")], [HANG])
        async with server.serve() as url, to(url) as wire:
            await wire.post("/", b"{}")
            asking = [asyncio.ensure_future(wire.post("/", b"{}")) for _ in range(2)]
            await asyncio.sleep(0.1)
            await wire.close()
            ends = await asyncio.gather(*asking, return_exceptions=True)
            assert any(isinstance(end, WireError) and "was closed" in str(end) for end in ends)
            assert not wire.open

    run(work())


# Time, and ways that there are not


@pytest.fixture
def silent() -> Iterable[int]:
    """A port that takes no connection and refuses none."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than it holds for whoever accepts them; Linux lets the next ones wait for ever
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        yield full.getsockname()[1]


def dead() -> int:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return int(gone.getsockname()[1])


def test_time_runs_out_before_and_after_the_question(silent: int, run: Run) -> None:
    async def work() -> None:
        async with to(f"http://127.0.0.1:{silent}", connect_s=0.2) as wire:
            with pytest.raises(WireError, match=rf"^no connection to 127\.0\.0\.1:{silent} within 0\.2 s$") as caught:
                await wire.post("/", b"{}")
            assert not caught.value.sent
        server = Scripted([HANG], [whole(b"hello")[:-1], HANG])
        async with server.serve() as url, to(url, timeout_s=0.2) as wire:
            for _ in range(2):
                with pytest.raises(WireError, match=r"^no answer from 127\.0\.0\.1:\d+ within 0\.2 s$") as caught:
                    await wire.post("/", b"{}")
                assert caught.value.sent
            assert not wire.idle

    run(work())


def test_the_time_of_one_question_is_not_that_of_the_next(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url, to(url, timeout_s=0.5) as wire:
            await wire.post("/", b"{}")
            await asyncio.sleep(0.7)
            await wire.post("/", b"{}")
            assert server.by == [1, 1]

    run(work())


def test_nobody_there_is_told_and_nothing_was_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def work() -> None:
        port = dead()
        async with to(f"http://127.0.0.1:{port}") as wire:
            with pytest.raises(WireError, match=rf"^connection refused at 127\.0\.0\.1:{port}$") as caught:
                await wire.post("/", b"{}")
            assert not caught.value.sent
        monkeypatch.setattr(wires, "_found", unknown)
        async with to("http://me:pw@nobody.test") as wire:
            ends = await asyncio.gather(*(wire.post("/", b"{}") for _ in range(3)), return_exceptions=True)
            assert [str(end) for end in ends] == ["no such host at nobody.test"] * 3

    run(work())


def test_a_connection_that_ends_before_it_is_asked_costs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    dial = Wire._dial

    async def ended(*args: Any) -> Any:
        connection = await dial(*args)
        connection.transport.abort()
        return connection

    async def work() -> None:
        async with Scripted().serve() as url, to(url) as wire:
            monkeypatch.setattr(Wire, "_dial", ended)
            with pytest.raises(WireError, match=r"^the connection was closed at 127") as caught:
                await wire.post("/", b"{}")
            assert not caught.value.sent

    run(work())


def test_the_addresses_of_a_host_are_tried_in_turn(silent: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "TURN_S", 0.1)
    asked = []

    async def work() -> None:
        server = Scripted()
        async with server.serve() as url:
            live = int(url.rpartition(":")[2])

            async def found(*_: Any) -> Any:
                asked.append(1)
                await asyncio.sleep(0.01)
                return [("127.0.0.1", port) for port in (dead(), silent, live)]

            monkeypatch.setattr(wires, "_found", found)
            async with to("http://several.test/v1") as wire:
                given_up = asyncio.ensure_future(wire.post("/", b"{}"))
                asking = [asyncio.ensure_future(wire.post("/", b"{}")) for _ in range(10)]
                await asyncio.sleep(0.001)
                given_up.cancel()  # which looked the name up for all
                ends = await asyncio.gather(*asking)
                assert {end.body for end in ends} == {b"again"}
            assert (server.connections, len(asked)) == (10, 1)
            assert server.requests[0][1]["host"] == "several.test"

    run(work())


# What is sent


@pytest.mark.parametrize(
    ("url", "line", "host"),
    [
        ("http://127.0.0.1:{}", "POST /x?a=b HTTP/1.1", "127.0.0.1:{}"),
        ("http://127.0.0.1:{}/v1", "POST /v1/x?a=b HTTP/1.1", "127.0.0.1:{}"),
        ("http://LOCALHOST:{}/a b/\xf6/%20/", "POST /a%20b/%C3%B6/%20//x?a=b HTTP/1.1", "localhost:{}"),
        ("http://127.0.0.1:{}/v1\r\nX-Evil: 1", "POST /v1X-Evil:%201/x?a=b HTTP/1.1", "127.0.0.1:{}"),
    ],
)
def test_the_target_is_the_urls(url: str, line: str, host: str, run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as at:
            port = at.rpartition(":")[2]
            async with to(url.format(port)) as wire:
                await wire.post("/x?a=b", b"{}")
        [(said, headers, _)] = server.requests
        assert (said, headers["host"]) == (line, host.format(port))
        assert "x-evil" not in headers

    run(work())


def test_a_name_and_password_are_sent_unless_there_is_a_key(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url:
            named = url.replace("//", "//me:p%40w@")
            for at, headers in ((url, {}), (named, {}), (named, {"authorization": "Bearer k"})):
                async with to(at, headers) as wire:
                    await wire.post("/", b"{}")
                    assert wire.place == url.removeprefix("http://")
        assert [headers.get("authorization") for _, headers, _ in server.requests] == [None, "Basic bWU6cEB3", "Bearer k"]

    run(work())


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"X": "a\nb"}, {"X": "\0"}, {"X": "\xf6"}, {"X: y\r\nZ": "a"}, {"": "a"}])
def test_a_header_does_not_leave_its_line(headers: dict[str, str]) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match=r"^a header holds characters that none may hold$"):
            Wire("http://a.test", headers, timeout_s=1, connect_s=1)

    asyncio.run(work())


@pytest.mark.parametrize(
    "url", ["http://", "ftp://a", "a.test", "http://a b", "http://a..b", "http://a:99999", "http://" + "a" * 70, "http://\0"]
)
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match=r"' is no address of a server$"):
            Wire(url, {}, timeout_s=1, connect_s=1)
        with pytest.raises(TeacherFault, match=r"is no address of a server$") as caught:
            async with open_server(url.replace("//", "//me:pw@"), OpenAI(model="m")):
                pass
        assert "pw" not in str(caught.value)
        assert caught.value.kind == "stop"

    asyncio.run(work())


@pytest.mark.parametrize("proxy", ["socks5://a:1", "http://", "a b:1", "a:99999"])
def test_a_proxy_that_is_none_is_told_at_once(proxy: str) -> None:
    async def work() -> None:
        with pytest.raises(ValueError, match=r"^the system's proxy is no address of a server$"):
            Wire("http://a.test", {}, timeout_s=1, connect_s=1, proxy=proxy)

    asyncio.run(work())


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Certificates that sign themselves, for this machine and for another, each with its key in the same file."""
    made = {}
    for name, names in (("ours", "IP:127.0.0.1,DNS:localhost"), ("others", "DNS:others.test"), ("inside", "DNS:inside.test")):
        made[name] = tmp_path_factory.mktemp("tls") / f"{name}.pem"
        order = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x -addext subjectAltName={names}"
        done = subprocess.run([*order.split(), "-keyout", "-", "-out", "-"], capture_output=True, check=True)
        made[name].write_bytes(done.stdout)
    return made


def safely(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def test_tls_is_spoken_with_whom_the_system_trusts(certificates: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates["ours"]))

    async def work() -> None:
        server = Scripted([whole(b"hello")], [whole(b"a" * 1_000_000)], [head(), b"until the end", END])
        async with server.serve(safely(certificates["ours"])) as url, to(url) as wire:
            assert (await wire.post("/", b"{}")).body == b"hello"
            assert (await wire.post("/", bytes(3_000_000))).body == b"a" * 1_000_000
            assert (server.connections, server.alpn) == (1, "http/1.1")
            assert (await wire.post("/", b"{}")).body == b"until the end"
            assert (await wire.post("/", b"{}")).body == b"again"
            assert server.connections == 2

    run(work())


@pytest.mark.parametrize("why", ["unknown", "another's name", "no TLS"])
def test_a_connection_that_is_not_safe_stops_the_run(
    why: str, certificates: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why != "unknown":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates["others"]))

    server = Scripted()

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(whole(b"", status="400 Bad Request"))
        await reader.read()

    async def work() -> None:
        script, safety = (plain, None) if why == "no TLS" else (server, safely(certificates["others"]))
        async with serving(script, safety) as port:
            url = f"https://127.0.0.1:{port}"
            async with to(url) as wire:
                with pytest.raises(Unsafe, match=rf"^no safe connection to 127\.0\.0\.1:{port}: .") as caught:
                    await wire.post("/", b"{}")
                assert not caught.value.sent
            async with open_server(url, OpenAI(model="m", base_url=url)) as opened:
                with pytest.raises(TeacherFault, match="no safe connection") as told:
                    await opened.post("/", {})
                assert (told.value.kind, told.value.paid) == ("stop", False)
        assert not server.requests

    run(work())


# Proxies


async def proxying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: list[Any], to_port: int) -> None:
    """A proxy that knows one place, and lets nobody through without the right name and password."""
    first, headers, _ = await read(reader)
    seen.append((first, headers))
    if headers.get("proxy-authorization") != "Basic bWU6cHc=":
        writer.write(whole(b"who are you", status="407 Proxy Authentication Required"))
        await reader.read()
        return
    there, beyond = await asyncio.open_connection("127.0.0.1", to_port)
    writer.write(head(status="200 Connection Established"))

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
        except ConnectionError:
            pass
        finally:
            sink.close()

    await asyncio.gather(carry(reader, beyond), carry(there, writer))


def test_a_proxy_gets_the_whole_address_of_what_is_not_secret(run: Run) -> None:
    async def work() -> None:
        server = Scripted()
        async with server.serve() as url:
            for proxy in (url.replace("//", "//me:pw@"), url.removeprefix("http://")):
                async with to("http://you:pw2@outside.test:81/v1", proxy=proxy) as wire:
                    assert (await wire.post("/x", b"{}")).body == b"again"
        one, other = server.requests
        assert one[0] == other[0] == "POST http://outside.test:81/v1/x HTTP/1.1"
        assert (one[1]["host"], one[1]["proxy-authorization"]) == ("outside.test:81", "Basic bWU6cHc=")
        assert one[1]["authorization"] == "Basic eW91OnB3Mg=="
        assert "proxy-authorization" not in other[1]

    run(work())


def test_a_proxy_sees_nothing_of_what_is_secret(certificates: dict[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates["inside"]))
    seen: list[Any] = []

    async def work() -> None:
        server = Scripted()
        async with server.serve(safely(certificates["inside"])) as url:
            port = int(url.rpartition(":")[2])
            async with (
                serving(lambda reader, writer: proxying(reader, writer, seen, port)) as proxy,
                to("https://inside.test/v1", {"Authorization": "Bearer k"}, proxy=f"http://me:pw@127.0.0.1:{proxy}") as wire,
            ):
                for _ in range(2):
                    assert (await wire.post("/x", b"{}")).body == b"again"
        assert [(first, headers["host"]) for first, headers in seen] == [("CONNECT inside.test:443 HTTP/1.1", "inside.test:443")]
        assert "authorization" not in seen[0][1]
        assert [(first, headers["host"]) for first, headers, _ in server.requests] == [("POST /v1/x HTTP/1.1", "inside.test")] * 2
        assert server.requests[0][1]["authorization"] == "Bearer k"
        assert "proxy-authorization" not in server.requests[0][1]

    run(work())


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([whole(b"who", status="407 Proxy Authentication Required")], "the proxy answered 407 at inside.test"),
        ([head(status="502 Bad Gateway")], "the proxy answered 502 at inside.test"),
        ([END], "the connection was closed at inside.test"),
        ([b"SSH-2.0"], "the answer is not HTTP at inside.test"),
        ([HANG], "no connection to inside.test within 0.3 s"),
        ([head(status="200 OK"), HANG], "no connection to inside.test within 0.3 s"),
    ],
)
def test_a_proxy_that_does_not_let_through_costs_nothing(pieces: list[bytes | None], says: str, run: Run) -> None:
    async def work() -> None:
        server, connect_s = Scripted(pieces), 0.3 if HANG in pieces else 5.0
        async with server.serve() as url, to("https://inside.test", proxy=url.replace("//", "//me:pw@"), connect_s=connect_s) as wire:
            with pytest.raises(WireError) as caught:
                await wire.post("/", b"{}")
            assert (str(caught.value), caught.value.sent) == (says, False)
        async with to("https://inside.test", proxy=f"http://me:pw@127.0.0.1:{dead()}") as wire:
            with pytest.raises(WireError, match=r"^connection refused at inside\.test$"):
                await wire.post("/", b"{}")

    run(work())


# Whatever comes


class Sink(asyncio.Transport):
    """A transport that takes everything and is nowhere."""

    closed = False

    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


async def told(pieces: Iterable[bytes]) -> Response | WireError:
    """How an exchange ends to which the pieces come, and then the connection's end."""
    wire = Wire("http://a.test", {}, timeout_s=5, connect_s=5)
    connection, transport = wires.Connection(wire), Sink()
    connection.connection_made(transport)
    asking = asyncio.ensure_future(connection.ask(b"", 5))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    assert not wire.idle or not transport.closed
    if not transport.closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert transport.closed and not wire.open and not wire.idle
    [end] = await asyncio.wait_for(asyncio.gather(asking, return_exceptions=True), 1)
    await wire.close()
    assert isinstance(end, (Response, WireError)), repr(end)
    return end


def test_an_answer_to_nobody_breaks_nothing() -> None:
    async def work() -> None:
        wire = Wire("http://a.test", {}, timeout_s=5, connect_s=5)
        connection = wires.Connection(wire)
        connection.connection_made(Sink())
        asking = asyncio.ensure_future(connection.ask(b"", 5))
        await asyncio.sleep(0)
        asking.cancel()
        connection.data_received(whole(b"hello"))  # before the one who asked has heard that it is cancelled
        assert list(wire.idle) == [connection]
        await asyncio.gather(asking, return_exceptions=True)
        assert list(wire.idle) == [connection]
        connection.connection_lost(None)
        await wire.close()

    asyncio.run(work())


def test_a_body_is_unpacked_no_further_than_it_may_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "BODY_BYTES", 2000)
    assert len(wires._unpacked(gzip.compress(b"a" * 100_000), "gzip")) == 2001


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(at)]


PLACES = st.lists(st.integers(0, 10_000), max_size=12)
VALID = [(b"".join(piece for piece in pieces if piece), status, body) for pieces, status, body, _ in ANSWERS.values()]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(VALID), PLACES)
def test_an_answer_may_come_in_any_pieces(answer: tuple[bytes, int, bytes], places: list[int]) -> None:
    data, status, body = answer
    end = asyncio.run(told(cut(data, places)))
    assert isinstance(end, Response)
    assert (end.status, end.body) == (status, body)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(VALID), PLACES, st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=4)), min_size=1, max_size=4))
def test_whatever_comes_ends_in_an_answer_or_in_the_error_of_this_module(
    answer: tuple[bytes, int, bytes], places: list[int], changes: list[tuple[int, bytes]]
) -> None:
    data = answer[0]
    for place, change in changes:
        at = place % (len(data) + 1)
        data = data[:at] + change + data[at + place % 3 :]
    asyncio.run(told(cut(data, places)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), max_size=5), st.sampled_from([b"", head(), head(CHUNKED), whole(b"x" * 400)[:-400]]))
def test_random_bytes_are_no_answer_or_the_body_of_one(pieces: list[bytes], before: bytes) -> None:
    end = asyncio.run(told([*([before] if before else []), *pieces]))
    if isinstance(end, Response) and end.status == 200 and before == head():
        assert end.body == b"".join(pieces)
