"""Posts JSON to a model's server and names what goes wrong, so that every teacher that speaks HTTP fails in the same words."""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from factory.errors import TeacherFault
from factory.teacher import Teacher

if TYPE_CHECKING:
    import aiohttp

# In a body of any status: words that mean that no call will be answered until somebody pays. (OpenAI answers 429 here,
# which would be waited for; Anthropic answers 400, which would fail call by call.)
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_error", "credit balance is too low")
STOP, NEVER, AGAIN = {401, 402, 403, 404}, {400, 413, 422}, {408, 409}


@dataclass(frozen=True)
class Server:
    """An open session with one server."""

    session: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post JSON and give the JSON object that comes back; raises TeacherFault with the server's own message."""
        import aiohttp

        try:
            async with self.session.post(self.url + path, json=body) as response:
                raw = await response.read()
        except TimeoutError as error:
            raise TeacherFault("again", f"no answer from {self._place} within {self.session.timeout.total:g} s") from error
        except aiohttp.InvalidURL as error:
            raise TeacherFault("stop", f"{self.url!r} is no address of a server") from error
        except aiohttp.ClientSSLError as error:
            raise TeacherFault("stop", f"no safe connection to {self._place}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise TeacherFault("again", f"{_reason(error)} at {self._place}") from error
        if response.status != 200:
            raise fault_of(response.status, raw, response.headers)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise TeacherFault("again", f"{self._place} answered with something that is not JSON: {raw[:80]!r}") from error
        if not isinstance(answer, dict):
            raise TeacherFault("again", f"{self._place} answered with something that is not an object: {raw[:80]!r}")
        return answer

    @property
    def _place(self) -> str:
        return server_name(self.url)


@asynccontextmanager
async def open_server(url: str, teacher: Teacher, headers: Mapping[str, str] = {}) -> AsyncIterator[Server]:
    """A session with the server at `url`, with the teacher's timeout and as many connections as it may have calls in flight."""
    import aiohttp

    # The system's proxy settings hold for the world outside, never for a server on this machine.
    outside = urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1")
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=teacher.concurrency),
        timeout=aiohttp.ClientTimeout(total=teacher.timeout_s),
        headers=headers,
        trust_env=outside,
    ) as session:
        yield Server(session, url.rstrip("/"))


def address(url: str) -> str:
    """`url` without a slash at its end; ValueError where it is no address of a server."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ValueError("base_url is an address such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


def server_name(url: str) -> str:
    """host:port of an address, without a user's name and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def missing_key(variable: str | None) -> str | None:
    """What to do about a key that the environment should hold and does not; None: nothing."""
    return f"the key is missing. Set it: export {variable}=…" if variable and not os.environ.get(variable) else None


def read_key(variable: str) -> str:
    """The key that the environment holds; a fault of the kind "stop" without one."""
    if missing := missing_key(variable):
        raise TeacherFault("stop", missing)
    return os.environ[variable]


def fault_of(status: int, raw: bytes, headers: Mapping[str, str]) -> TeacherFault:
    """The fault that a refusal means: its kind by status and body, and the server's message."""
    text = raw.decode(errors="replace")
    message = f"{status}: {_message(text) or 'no reason given'}"
    if status == 402 or any(words in text for words in NO_CREDIT):
        return TeacherFault("stop", message)
    if status == 429:
        return TeacherFault("later", message, _retry_after_s(headers))
    if status in STOP:
        return TeacherFault("stop", message)
    if status in AGAIN or status >= 500:
        return TeacherFault("again", message, _retry_after_s(headers))
    return TeacherFault("never", message)


def _message(text: str) -> str:
    """The sentence in a server's refusal; the servers differ in where they put it."""
    with suppress(ValueError):
        body = json.loads(text)
        found: Any = body
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        if isinstance(found, str):
            text = found
    return " ".join(text.split())[:500]


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header: a number, or a date (RFC 9110, 10.2.3); milliseconds where a server offers them."""
    with suppress(KeyError, ValueError):
        return _whole(float(headers["retry-after-ms"]) / 1000)
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return _whole(float(value))
    with suppress(ValueError, TypeError):
        return _whole(email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _whole(seconds: float) -> float | None:
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reason(error: Exception) -> str:
    """What a network error means, in words: the libraries' own texts are empty or name their classes."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "no such host"
    if isinstance(error, aiohttp.ClientConnectorError):
        return os.strerror(error.errno).lower() if error.errno else "no connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer broke off"
    if isinstance(error, (aiohttp.ServerDisconnectedError, ConnectionError)):
        return "the connection was closed"
    return str(error) or type(error).__name__
