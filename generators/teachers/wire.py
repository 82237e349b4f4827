"""Posts to one server over HTTP/1.1, with as little work a call as can be: it was once more than a third of the gateway's."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

# Longer than a minute's rate limit lets a connection lie idle, so that it is not opened anew for each burst.
KEEP_ALIVE_S = 75.0
TURN_S = 2.0  # how long one of several addresses of a host may be silent before the next is tried: many a network drops IPv6
HEAD_BYTES, BODY_BYTES = 1 << 16, 1 << 28
RESERVED = "!#$%&'()*+,/:;=?@[]~"  # not quoted in a target: they mean something, or are quoted already
ZLIB, RAW, GZIP = 15, -15, 31  # zlib's wbits; "deflate" is the first by RFC 9110, and the second by some servers


class WireError(Exception):
    """An exchange that came to nothing, as a sentence that names the server. `sent`: the question may have reached it.

    WireError
      Unsafe: TLS was not agreed on, or the certificate is not the server's
    """

    def __init__(self, said: str, *, sent: bool) -> None:
        super().__init__(said)
        self.sent = sent


class Unsafe(WireError):
    """No safe connection can be had: nothing was sent."""


class Response(NamedTuple):
    """What a server answered. Of headers, with names in lower case, the first of a name counts. The body is unpacked."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Address(NamedTuple):
    """Where a URL leads: `name` is its host as a header has it, `basic` the value of an authorization by its name and password."""

    host: str
    port: int
    safe: bool
    name: str
    basic: str | None

    @classmethod
    def of(cls, url: str) -> _Address:
        """Raises ValueError, of whose text nothing should be shown: it may quote a password."""
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        if parts.scheme not in ("http", "https") or not re.fullmatch("[!-~]+", host):
            raise ValueError
        safe, name = parts.scheme == "https", f"[{host}]" if ":" in host else host
        usual = 443 if safe else 80
        port = parts.port or usual
        secret = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode("latin-1")
        basic = None if secret == b":" else f"Basic {base64.b64encode(secret).decode()}"
        return cls(host, port, safe, name if port == usual else f"{name}:{port}", basic)


class Wire:
    """The way to the server at `url`: its idle connections, and as many others as there are questions in flight. For one loop.

    A name and password in `url` are sent as Basic authorization, unless `headers` have one. `proxy` is the URL of a proxy.
    Raises ValueError where one of the two is no address, or a header holds what could end it.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout_s: float, connect_s: float, proxy: str | None = None) -> None:
        self.place = urlsplit(url).netloc.rpartition("@")[2]
        what = repr(self.place)
        try:
            self._server, self._url = _Address.of(url), url
            what = "the system's proxy"
            self._proxy = _Address.of(proxy if "://" in proxy else f"http://{proxy}") if proxy else None
        except ValueError:
            raise ValueError(f"{what} is no address of a server") from None
        self.headers, self.timeout_s, self._connect_s = dict(headers), timeout_s, connect_s
        if self._server.basic and not any(name.lower() == "authorization" for name in headers):
            self.headers["Authorization"] = self._server.basic
        if self._proxy and self._proxy.basic and not self._server.safe:
            self.headers["Proxy-Authorization"] = self._proxy.basic
        if not all(re.fullmatch(r"[\w-]+: [ -~]*", f"{name}: {value}", re.ASCII) for name, value in self.headers.items()):
            raise ValueError("a header holds characters that none may hold")
        self._loop = asyncio.get_running_loop()
        self._context = ssl.create_default_context() if self._server.safe or (self._proxy and self._proxy.safe) else None
        if self._context:
            self._context.set_alpn_protocols(["http/1.1"])
        self._heads: dict[str, bytes] = {}
        self._looking: asyncio.Task[list[Any]] | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self.idle: deque[Connection] = deque()  # the latest used last
        self.open: set[Connection] = set()

    async def post(self, path: str, body: bytes) -> Response:
        """Post a body to `path` of the URL. The question is on its way in the step that asks, if a connection is idle.

        A refusal (400 and above) whose body does not come whole is given without one. Nothing is asked twice, no redirect is
        followed. Raises WireError.
        """
        head = self._heads.get(path) or self._heads.setdefault(path, self._head(path))
        question = b"%b%d\r\n\r\n%b" % (head, len(body), body)
        left_s = self.timeout_s
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                break
        else:
            began = self._loop.time()
            connection = await self._connect()
            left_s -= self._loop.time() - began
        return await connection.ask(question, left_s)

    async def close(self) -> None:
        """Close all connections; who still waits for an answer gets an error."""
        for connection in list(self.open):
            connection.fail(f"the connection was closed at {self.place}")
        if self._sweeping:
            self._sweeping.cancel()
        if self._looking:
            self._looking.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while self.open:  # a transport that has not told its protocol is one that Python warns of
                    await asyncio.sleep(0)

    def _head(self, path: str) -> bytes:
        parts = urlsplit(self._url + path)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=RESERVED)
        if self._proxy and not self._server.safe:
            target = f"http://{self._server.name}{target}"
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return f"POST {target} HTTP/1.1\r\nHost: {self._server.name}\r\n{headers}Content-Length: ".encode("ascii")

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(self._connect_s) as limit:
                hop = self._proxy or self._server
                connection = await (self._tunnel(hop) if self._proxy and self._server.safe else self._dial(hop))
        except ssl.SSLError as error:
            raise Unsafe(f"no safe connection to {self.place}: {error}", sent=False) from error
        except OSError as error:
            long = f"no connection to {self.place} within {self._connect_s:g} s"
            raise WireError(long if limit.expired() else f"{_reason(error)} at {self.place}", sent=False) from error
        if connection.transport.is_closing():
            raise WireError(f"the connection was closed at {self.place}", sent=False)
        return connection

    async def _dial(self, hop: _Address) -> Connection:
        """A connection to the first of a host's addresses that takes one. Raises OSError."""
        safety: dict[str, Any] = {"ssl": self._context, "server_hostname": hop.host} if hop.safe else {}
        found = await self._look_up(hop)
        for more, (at, port) in zip(range(len(found) - 1, -1, -1), found, strict=True):
            try:
                async with asyncio.timeout(TURN_S if more else None):
                    _, connection = await self._loop.create_connection(partial(Connection, self), at, port, **safety)
                    return connection
            except OSError:
                if not more:
                    raise
        raise socket.gaierror

    async def _look_up(self, hop: _Address) -> list[tuple[str, int]]:
        """A host's addresses. Those who ask at the same time ask once, as a hundred threads for one name would be too many."""
        if self._looking is None:
            self._looking = self._loop.create_task(_found(self._loop, hop))
            self._looking.add_done_callback(self._looked)
        return await asyncio.shield(self._looking)

    def _looked(self, _: asyncio.Task[Any]) -> None:
        self._looking = None

    async def _tunnel(self, proxy: _Address) -> Connection:
        """A connection through a proxy that sees nothing of what is said (RFC 9110, 9.3.6)."""
        outer, server = await self._dial(proxy), self._server
        at = f"[{server.host}]:{server.port}" if ":" in server.host else f"{server.host}:{server.port}"
        key = f"Proxy-Authorization: {proxy.basic}\r\n" if proxy.basic else ""
        try:
            said = await outer.ask(f"CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n{key}\r\n".encode(), self.timeout_s, tunnel=True)
        except WireError as error:
            raise WireError(str(error), sent=False) from error
        if not 200 <= said.status < 300:
            outer.abort()
            raise WireError(f"the proxy answered {said.status} at {self.place}", sent=False)
        inner = Connection(self)
        inner.transport = outer.transport  # should it end before the other is there
        self.open.discard(outer)  # which is told nothing more
        assert self._context is not None
        transport = await self._loop.start_tls(outer.transport, inner, self._context, server_hostname=server.host)
        assert transport is not None
        inner.connection_made(transport)
        return inner

    def rest(self, connection: Connection) -> None:
        """Keep a connection for the next question."""
        connection.idle_since = self._loop.time()
        self.idle.append(connection)
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(KEEP_ALIVE_S, self._sweep)

    def _sweep(self) -> None:
        before = self._loop.time() - KEEP_ALIVE_S
        while self.idle and self.idle[0].idle_since <= before:
            self.idle.popleft().abort()
        self._sweeping = self._loop.call_at(self.idle[0].idle_since + KEEP_ALIVE_S, self._sweep) if self.idle else None


class Connection(asyncio.Protocol):
    """One connection of a wire, which holds at most one exchange. What comes unasked ends it."""

    transport: asyncio.Transport
    idle_since = 0.0

    def __init__(self, wire: Wire) -> None:
        self._wire, self._loop = wire, wire._loop
        self._parser = HttpResponseParser(self)
        # As aiohttp and curl: there are servers that end lines by a line feed, or leave a space where none belongs.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._answer: asyncio.Future[Response] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._begin()

    def _begin(self) -> None:
        self._tunnel = self._headed = self._spoilt = self._keep = False
        self._fed = self._status = 0
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._response: Response | None = None

    async def ask(self, question: bytes, within_s: float, *, tunnel: bool = False) -> Response:
        """Send a whole request and give its answer; with `tunnel`, as soon as its head is there. Raises WireError.

        Whoever is cancelled takes the connection along, since the answer to come is not the next one's.
        """
        self._tunnel = tunnel
        answer: asyncio.Future[Response] = self._loop.create_future()
        self._answer = answer
        self._timer = self._loop.call_later(within_s, self._late)
        self.transport.write(question)
        try:
            return await answer
        except BaseException:
            if self._answer is answer:
                self.abort()
            raise

    def abort(self) -> None:
        """Close it at once."""
        self._answer = None
        if self._timer:
            self._timer.cancel()
        with suppress(ValueError):
            self._wire.idle.remove(self)
        self.transport.abort()

    def fail(self, said: str) -> None:
        """End the exchange, and the connection, without an answer; a refusal's status has said what matters."""
        if self._answer and self._headed and self._status >= 400:
            self._settle(Response(self._status, self._headers, b""))
        else:
            self._settle(WireError(said, sent=True))

    # What asyncio tells

    def connection_made(self, transport: Any) -> None:  # uvloop's are no subclasses of asyncio's
        self.transport = transport
        self._wire.open.add(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.abort()
            return
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._spoilt = True
        if self._response is not None:
            self._end(self._response)
        elif self._spoilt:
            self.fail(f"the answer {'broke off' if self._headed else 'is not HTTP'} at {self._wire.place}")
        elif self._fed > (BODY_BYTES if self._headed else HEAD_BYTES):
            self._too_long()

    def eof_received(self) -> None:
        self._lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wire.open.discard(self)
        self._lost(exc)

    def _lost(self, error: Exception | None) -> None:
        if self._answer is None:
            self.abort()
        elif not self._headed:
            closed = error is None or isinstance(error, ConnectionError)
            self.fail(f"{'the connection was closed' if closed else _reason(error)} at {self._wire.place}")
        elif error is None and "content-length" not in self._headers and "transfer-encoding" not in self._headers:
            self._end(Response(self._status, self._headers, b"".join(self._body)))  # its end is the connection's
        else:
            self.fail(f"the answer broke off at {self._wire.place}")

    # What the parser tells, of every message: there may be some of the status 1xx before the answer, and anything after it

    def on_message_begin(self) -> None:
        self._spoilt = self._response is not None

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:  # or it is a trailer
            self._headers.setdefault(name.lower().decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._headed = self._status >= 200
        if not self._headed:
            self._headers = {}
        elif self._tunnel:
            self._response = Response(self._status, self._headers, b"")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._headed and self._response is None:
            self._keep = self._parser.should_keep_alive()  # it has forgotten once this is over
            self._response = Response(self._status, self._headers, b"".join(self._body))

    # How an exchange ends

    def _end(self, response: Response) -> None:
        if packing := response.headers.get("content-encoding"):
            try:
                response = response._replace(body=_unpacked(response.body, packing.strip().lower()))
            except zlib.error:
                return self.fail(f"the answer broke off at {self._wire.place}")
        if len(response.body) > BODY_BYTES:
            return self._too_long()
        return self._settle(response)

    def _late(self) -> None:
        self.fail(f"no answer from {self._wire.place} within {self._wire.timeout_s:g} s")

    def _too_long(self) -> None:
        what = f"is longer than {BODY_BYTES:,}" if self._headed else f"has a head of more than {HEAD_BYTES:,}"
        self.fail(f"the answer {what} bytes at {self._wire.place}")

    def _settle(self, outcome: Response | WireError) -> None:
        answer, self._answer = self._answer, None
        if self._timer:
            self._timer.cancel()
        # An answer to a question that has not gone out whole is the last: who knows what becomes of the rest.
        failed = isinstance(outcome, WireError)
        keep, tunnel = self._keep and not (failed or self._spoilt or self.transport.get_write_buffer_size()), self._tunnel
        self._begin()  # and hold the answer no longer than who asked
        if keep:
            self._wire.rest(self)
        elif failed or not tunnel:
            self.abort()
        if answer is None or answer.done():
            return
        if isinstance(outcome, WireError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


async def _found(loop: asyncio.AbstractEventLoop, hop: _Address) -> list[tuple[str, int]]:
    infos = await loop.getaddrinfo(hop.host, hop.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(address[0]), int(address[1])) for *_, address in infos))


def _unpacked(body: bytes, packing: str) -> bytes:
    """A body as it was before its Content-Encoding, if that is one of ours; longer than BODY_BYTES only by one. Raises zlib.error."""
    if packing not in ("gzip", "x-gzip", "deflate"):
        return body
    wbits = GZIP if packing != "deflate" else ZLIB if body[:1] and body[0] & 15 == 8 else RAW
    made = b""
    while body and len(made) <= BODY_BYTES:
        stream = zlib.decompressobj(wbits)
        made += stream.decompress(body, BODY_BYTES + 1 - len(made))
        if not stream.eof and len(made) <= BODY_BYTES:
            raise zlib.error("it stops in the middle")
        body = stream.unused_data  # gzip has members
    return made


def _reason(error: Exception | None) -> str:
    """What a network's error means, in words."""
    if isinstance(error, socket.gaierror):
        return "no such host"
    number = getattr(error, "errno", None)
    return os.strerror(number).lower() if number else str(error) or "no connection"
