"""Posts JSON to a model's server and names what goes wrong, so that every teacher that speaks HTTP fails in the same words."""

from __future__ import annotations

import email.utils
import hashlib
import json
import math
import os
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from factory.errors import TeacherFault
from factory.teacher import Connection, Port, Teacher
from generators.teachers.wire import Unsafe, Wire, WireError
from schemas.call import Of, Reading

# In a body of any status: words that mean that no call will be answered until somebody pays. (OpenAI answers 429 here,
# which would be waited for; Anthropic answers 400, which would fail call by call.)
NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached", "billing_error", "credit balance is too low")
# Of OpenAI and Azure; OpenAI, Anthropic, vLLM, llama.cpp.
REFUSED = ("content_policy_violation", "content_filter")
TOO_LONG = ("context_length_exceeded", "prompt is too long", "maximum context length", "exceed_context_size")
STOP, AGAIN, LATER = {401, 402, 403, 404}, {408, 409}, {429, 529}
PROVIDERS = {"api.openai.com", "api.anthropic.com"}
HERE = {"127.0.0.1", "localhost", "::1"}

CONNECT_S = 10.0


class _Names(NamedTuple):
    of: Of
    limit: str
    remaining: str
    reset: str


# https://platform.openai.com/docs/guides/rate-limits and https://docs.anthropic.com/en/api/rate-limits
OPENAI: tuple[Of, ...] = ("requests", "tokens")
ANTHROPIC: dict[Of, str] = {"requests": "requests", "tokens": "tokens", "tokens_in": "input-tokens", "tokens_out": "output-tokens"}
PARTS = ("limit", "remaining", "reset")
READINGS = (
    *(_Names(of, *(f"x-ratelimit-{part}-{of}" for part in PARTS)) for of in OPENAI),
    *(_Names(of, *(f"anthropic-ratelimit-{name}-{part}" for part in PARTS)) for of, name in ANTHROPIC.items()),
)
DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
DURATION_PART = re.compile(r"([\d.]+)(ms|[smhd])")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Server:
    """An open way to one server. `url` has no slash at its end, and may hold a password: never print it."""

    wire: Wire
    url: str

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Reading, ...]]:
        """Post JSON; give the JSON object that comes back and what its headers say of the rate limits.

        Raises TeacherFault with the server's own message; its `paid` is true for what happened after the request went out.
        """
        try:
            sent = orjson.dumps(body)
        except TypeError as error:
            raise TeacherFault("never", f"the question can't be written as JSON: {error}") from error
        try:
            status, headers, raw = await self.wire.post(path, sent)
        except Unsafe as error:
            raise TeacherFault("stop", str(error)) from error
        except WireError as error:
            raise TeacherFault("again", str(error), paid=error.sent) from error
        if status != 200:
            raise fault_of(status, raw, headers, self.url)
        readings = readings_of(headers)
        try:
            answer = _parse(raw)
        except ValueError as error:
            message = f"{self.wire.place} answered with something that is not JSON: {raw[:80]!r}"
            raise TeacherFault("again", message, paid=True, readings=readings) from error
        if not isinstance(answer, dict):
            message = f"{self.wire.place} answered with something that is not an object: {raw[:80]!r}"
            raise TeacherFault("again", message, paid=True, readings=readings)
        return answer, readings


@asynccontextmanager
async def open_server(url: str, teacher: Teacher, headers: Mapping[str, str] = {}) -> AsyncIterator[Server]:
    """The way to the server at `url`, with the teacher's timeout. It has no limit of its own to what may be in flight.

    Raises TeacherFault of the kind "stop" where that can be no server's address.
    """
    here = urlsplit(url).hostname in HERE
    common = {"Accept": "*/*", "Content-Type": "application/json", "User-Agent": "gristmill"}
    if not here:  # unpacking costs more than it saves on this machine's own network; outside, bytes are the dearer
        common["Accept-Encoding"] = "gzip, deflate"
    try:
        wire = Wire(
            url.rstrip("/"),
            {**common, **headers},
            timeout_s=teacher.timeout_s,
            # A timeout must say which one it was: whoever is still connecting when half of the time is over is not answered either.
            connect_s=min(CONNECT_S, teacher.timeout_s / 2),
            proxy=None if here else _proxy(url),
        )
    except ValueError as error:
        raise TeacherFault("stop", str(error)) from error
    try:
        yield Server(wire, url.rstrip("/"))
    finally:
        await wire.close()


def addresses(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """`base_url` as it is used, without a slash at its end; ValueError where it is no address of a server, or names none."""
    if isinstance(value, str):
        return address(value)
    if not value:
        raise ValueError("base_url names no server")
    return tuple(address(url) for url in value)


def address(url: str, otherwise: str = "base_url is an address such as http://127.0.0.1:8000/v1") -> str:
    """`url` without a slash at its end; ValueError (`otherwise`) where it is no address of a server."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ValueError(otherwise)
    return url.rstrip("/")


def each(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """What a key of a recipe that takes one name or several holds."""
    return value if isinstance(value, tuple) else (value,) if value else ()


def ports_of(
    servers: Sequence[str],
    key_envs: Sequence[str],
    model: str,
    connect: Callable[[str, str | None, Path], AbstractAsyncContextManager[Connection]],
) -> tuple[Port, ...]:
    """A port for every server with every key, which `connect(server, key's variable, home)` opens."""
    return tuple(
        Port(
            name=f"{server_name(server)} · {variable}" if len(key_envs) > 1 else server_name(server),
            account="/".join((server_name(server), model, _account(variable))),
            connect=partial(connect, server, variable),
        )
        for server in servers
        for variable in key_envs or (None,)
    )


def server_name(url: str) -> str:
    """host:port of an address, without a user's name and password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def missing_keys(variables: Sequence[str]) -> str | None:
    """What to do about keys that the environment should hold and does not; None: nothing."""
    missing = [variable for variable in variables if not os.environ.get(variable, "").strip()]
    if not missing:
        return None
    what = "the key is missing" if len(missing) == 1 else f"{len(missing)} keys are missing"
    return f"{what}. Set {'it' if len(missing) == 1 else 'them'}: export {' '.join(f'{variable}=…' for variable in missing)}"


def read_key(variable: str) -> str:
    """The key that the environment holds; a fault of the kind "stop" where it can't be one."""
    if missing := missing_keys((variable,)):
        raise TeacherFault("stop", missing)
    key = os.environ[variable].strip()
    if not (key.isascii() and key.isprintable()):
        raise TeacherFault("stop", f"{variable} holds characters that no key has: set it anew")
    return key


def fault_of(status: int, raw: bytes, headers: Mapping[str, str], url: str = "") -> TeacherFault:
    """The fault that a refusal by the server at `url` means: its kind by status and body, and the server's message."""
    text = raw.decode(errors="replace")
    message, readings = f"{status}: {_message(text) or 'no reason given'}", readings_of(headers)
    retry_after_s = _retry_after_s(headers)
    if status == 402 or any(words in text for words in NO_CREDIT):
        return TeacherFault("stop", message, readings=readings)
    if any(words in text for words in TOO_LONG):
        return TeacherFault("never", f"too long for the model's context: {message}", readings=readings)
    if status < 500 and any(words in text for words in REFUSED):
        return TeacherFault("never", f"refused for its content: {message}", readings=readings)
    if status in LATER or (status == 503 and retry_after_s is not None):
        return TeacherFault("later", message, retry_after_s, readings=readings)
    if status in STOP:
        return TeacherFault("stop", message + _wrong_path(status, url), readings=readings)
    if status in AGAIN or status >= 500:
        return TeacherFault("again", message, retry_after_s, readings=readings)
    if 300 <= status < 400:  # not followed: the key would go along, to wherever it points
        return TeacherFault("stop", f"{status}: the server is at {headers.get('location', 'another address')}: set base_url to that")
    return TeacherFault("never", message, readings=readings)


def readings_of(headers: Mapping[str, str]) -> tuple[Reading, ...]:
    """What a server's headers say of its rate limits, in OpenAI's and in Anthropic's words; what can't be read is left out."""
    return tuple(reading for names in READINGS if names.limit in headers and (reading := _reading(names, headers)) is not None)


def _reading(names: _Names, headers: Mapping[str, str]) -> Reading | None:
    try:
        limit, remaining = int(headers[names.limit]), int(headers[names.remaining])
    except (KeyError, ValueError):
        return None
    return Reading(names.of, limit, max(0, remaining), _reset_s(headers.get(names.reset, ""), headers)) if limit > 0 else None


def _reset_s(value: str, headers: Mapping[str, str]) -> float | None:
    """Seconds from a number, a duration ("1h2m3.5s", "120ms") or a moment (RFC 3339)."""
    if DURATION.fullmatch(value):
        return sum(float(number) * SECONDS[unit] for number, unit in DURATION_PART.findall(value))
    with suppress(ValueError):
        return _whole(float(value))
    with suppress(ValueError):
        moment = datetime.fromisoformat(value)
        return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - _now(headers))
    return None


def _now(headers: Mapping[str, str]) -> float:
    """The time by the server's clock, where it tells it: ours may be wrong."""
    told = _moment(headers.get("date", ""))
    return time.time() if told is None else told


@lru_cache(64)  # a busy server says the same second many times over
def _moment(value: str) -> float | None:
    with suppress(ValueError, TypeError, OverflowError):
        return email.utils.parsedate_to_datetime(value).timestamp()
    return None


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header: a number, or a date (RFC 9110, 10.2.3); milliseconds where a server offers them."""
    with suppress(KeyError, ValueError):
        return _whole(float(headers["retry-after-ms"]) / 1000)
    value = headers.get("retry-after", "")
    with suppress(ValueError):
        return _whole(float(value))
    moment = _moment(value)
    return None if moment is None else max(0.0, moment - _now(headers))


def _whole(seconds: float) -> float | None:
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _parse(raw: bytes) -> Any:
    """JSON as the standard has it, or with what models' servers do to it: NaN, and halves of characters, which become "?"."""
    try:
        return orjson.loads(raw)
    except ValueError:
        lenient = json.dumps(json.loads(raw), ensure_ascii=False)
        return json.loads(lenient.encode(errors="replace"))


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


def _wrong_path(status: int, url: str) -> str:
    if status != 404 or not url or urlsplit(url).hostname in PROVIDERS:
        return ""
    return f" (asked at {server_name(url)}{urlsplit(url).path}: does it serve this model, and is the path in base_url right?)"


def _account(variable: str | None) -> str:
    """What tells one account from another and gives no key away: two variables may hold one key, which has one rate limit."""
    key = os.environ.get(variable, "").strip() if variable else ""
    return hashlib.blake2b(key.encode(), digest_size=4).hexdigest() if key else variable or "no key"


@contextmanager
def in_the_shape_of(whose: str, answer: object, readings: tuple[Reading, ...] = ()) -> Iterator[None]:
    """Name what goes wrong while an answer that was given, and so may be on the bill, is taken apart."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        said = str(answer)[:200]
        raise TeacherFault("again", f"an answer of another shape than {whose}'s: {said}", paid=True, readings=readings) from error


def named(teacher: Any) -> Any:
    """Check that a teacher of several servers has a name for them all (pydantic's `model_validator`)."""
    if len(teacher.servers) > 1 and not teacher.provider:
        raise ValueError("several servers in base_url need one name for all, since they answer alike: set provider")
    return teacher


def _proxy(url: str) -> str | None:
    """The system's proxy for an address; None: it is reached without one."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(server_name(url)):
        return None
    return urllib.request.getproxies().get(parts.scheme)
