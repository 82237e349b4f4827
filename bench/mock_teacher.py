"""A teacher's server that is never the bottleneck, so that a measurement shows the client: its limits and faults are options.

    python bench/mock_teacher.py [--port 0] [--latency-ms 200] [--rpm 600 --burst 10] [--errors 0.05 --resets 0.02] ...

Prints its address as its first line, and ends when its standard input closes. Speaks OpenAI's chat completions, completions
and models (no streaming, no tools) over HTTP/1.1 written by hand on an asyncio protocol. The answer to a question is a
function of it, so that `GET /stats` tells which questions were answered, and which more than once.

`--errors` is a share of 500s. `--resets`: the connection is reset in place of an answer. `--truncated`: the whole of the
Content-Length comes, but its JSON stops in the middle. `--cut`: the connection closes in the middle of the body. `--hangs`: no
answer ever. All are drawn by `--seed`, in the order of arrival. Refusals (429) come at once, all else after the latency.

`--rpm` and `--tpm` are leaky buckets, told in OpenAI's x-ratelimit headers; a call weighs what OpenAI's documentation says:
the greater of max_tokens and a quarter of its characters. `--hidden-concurrency` refuses without such headers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import uvloop

FAULTS = ("errors", "resets", "truncated", "cut", "hangs")
LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)")
STATUS = {200: b"200 OK", 400: b"400 Bad Request", 404: b"404 Not Found", 429: b"429 Too Many Requests", 500: b"500 Internal Server Error"}


class Bucket:
    """What is left of a limit: `a_minute` flow in, at most `capacity` stay."""

    def __init__(self, a_minute: float, capacity: float) -> None:
        self.a_minute, self.capacity, self.left = a_minute, capacity, capacity
        self._at = time.monotonic()

    def refill(self) -> None:
        """Let in what has come since the last time."""
        now = time.monotonic()
        self.left = min(self.capacity, self.left + (now - self._at) * self.a_minute / 60)
        self._at = now

    def take(self, amount: float) -> None:
        """Take it; at most as much as fits is owed, or a client that hammers would be shut out for hours."""
        self.left = max(-self.capacity, self.left - amount)

    def headers(self, what: str) -> str:
        """OpenAI's three headers of this limit; "reset" is when it will be whole again."""
        reset = duration((self.capacity - self.left) * 60 / self.a_minute)
        return (
            f"x-ratelimit-limit-{what}: {self.a_minute:.0f}\r\nx-ratelimit-remaining-{what}: {max(0, int(self.left))}\r\n"
            f"x-ratelimit-reset-{what}: {reset}\r\n"
        )


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them: "120ms", "1s", "7.66s", "6m0s"."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    whole = f"{rest:.3f}".rstrip("0").rstrip(".")
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{whole}s"


def example(schema: Any, text: str, top: Any = None) -> Any:
    """Something that fits a JSON schema of the kinds that strict modes take, with `text` where a string is due."""
    top = schema if top is None else top
    if "$ref" in schema:
        found = top
        for name in schema["$ref"].lstrip("#/").split("/"):
            found = found[name]
        return example(found, text, top)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return example(schema[name][0], text, top)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: example(inner, text, top) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [example(schema["items"], text, top)] * max(1, schema.get("minItems", 1)) if "items" in schema else []
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
    return text


class Teacher:
    """The state behind all connections: the options, the limits, and what is counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.latency_s = options.latency_ms / 1000
        self.slow_s = options.slow_ms / 1000
        self.shares = [(name, getattr(options, name)) for name in FAULTS if getattr(options, name)]
        self.random = random.Random(options.seed)
        self.requests = Bucket(options.rpm, options.burst or options.rpm) if options.rpm else None
        self.tokens = Bucket(options.tpm, options.burst_tokens or options.tpm) if options.tpm else None
        self.usage = tuple(int(number) for number in options.usage.split(","))
        self.counts: Counter[str] = Counter()
        self.answered: dict[str, int] = {}
        self.in_flight = self.most_in_flight = 0

    def refusal(self, body: dict[str, Any], length: int) -> bytes | None:
        """The whole 429 for this request, or None where every limit has room for it (which it then takes)."""
        hidden = self.options.hidden_concurrency
        if hidden and self.in_flight > hidden:
            return reply(429, error("too many requests at once", "rate_limit_exceeded"))
        weight = max(body.get("max_completion_tokens") or body.get("max_tokens") or 16, length // 4)
        limits = [(bucket, amount) for bucket, amount in ((self.requests, 1), (self.tokens, weight)) if bucket]
        for bucket, _ in limits:
            bucket.refill()
        full = [(bucket, amount) for bucket, amount in limits if bucket.left < amount]
        if not full or self.options.refused_count:
            for bucket, amount in limits:
                bucket.take(amount)
        if not full:
            return None
        bucket, amount = full[0]
        what = "requests per min (RPM)" if bucket is self.requests else "tokens per min (TPM)"
        wait = duration((amount - bucket.left) * 60 / bucket.a_minute)
        message = f"Rate limit reached for {body.get('model')} on {what}: Limit {bucket.a_minute:.0f}. Please try again in {wait}."
        return reply(429, error(message, "rate_limit_exceeded"), self.limit_headers())

    def limit_headers(self) -> bytes:
        """The headers of every limit; as it stands now."""
        if not (self.requests or self.tokens):
            return b""
        for bucket in (self.requests, self.tokens):
            if bucket:
                bucket.refill()
        told = (self.requests.headers("requests") if self.requests else "") + (self.tokens.headers("tokens") if self.tokens else "")
        return told.encode()

    def fate(self) -> str:
        """What becomes of the next request: "answered", or one of FAULTS."""
        if self.shares:
            drawn = self.random.random()
            for name, share in self.shares:
                if drawn < share:
                    return name
                drawn -= share
        return "answered"

    def delay_s(self) -> float:
        """How long the request that has just been counted takes: every so many take `--slow-ms`."""
        every = self.options.slow_every
        slow = every and self.counts["requests"] % every == 0
        return float(self.slow_s if slow else self.latency_s)

    def stats(self) -> dict[str, Any]:
        """What was counted since the start."""
        doubled = sum(1 for times in self.answered.values() if times > 1)
        return {
            **{name: self.counts[name] for name in ("requests", "answered", "refused", *FAULTS, "abandoned")},
            "distinct": len(self.answered),
            "doubled": doubled,
            "most_in_flight": self.most_in_flight,
            "cpu_seconds": time.process_time(),
        }


class Line(asyncio.Protocol):
    """One connection: a request at a time, kept alive between them."""

    def __init__(self, teacher: Teacher, loop: asyncio.AbstractEventLoop) -> None:
        self.teacher, self.loop = teacher, loop
        self.received = b""
        self.busy = False
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:  # the client gave up
            self.teacher.in_flight -= 1
            self.teacher.counts["abandoned"] += 1
        if self.timer:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        self.received = self.received + data if self.received else data
        while self.received and not self.busy and (found := parse(self.received)) is not None:
            head, body, self.received = found
            try:
                self.serve(head, body)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as fault:
                self.transport.write(reply(400, error(f"not understood: {fault!r}"), self.teacher.limit_headers()))

    def serve(self, head: bytes, body: bytes) -> None:
        teacher = self.teacher
        if not head.startswith(b"post /v1/"):
            return self.look(head)
        asked = orjson.loads(body)
        chat = head.startswith(b"post /v1/chat/completions ")
        if not chat and not head.startswith(b"post /v1/completions "):
            return self.look(head)
        question = said(asked["messages"][-1]["content"]) if chat else asked["prompt"]
        teacher.counts["requests"] += 1
        teacher.in_flight += 1
        if refusal := teacher.refusal(asked, len(body)):
            teacher.in_flight -= 1
            teacher.counts["refused"] += 1
            self.transport.write(refusal)
            return None
        teacher.most_in_flight = max(teacher.most_in_flight, teacher.in_flight)
        self.busy = True
        fate, delay_s = teacher.fate(), teacher.delay_s()
        if fate == "hangs":
            teacher.counts["hangs"] += 1
        elif delay_s:
            self.timer = self.loop.call_later(delay_s, self.finish, asked, question, chat, fate)
        else:
            self.finish(asked, question, chat, fate)
        return None

    def look(self, head: bytes) -> None:
        if head.startswith(b"get /stats "):
            self.transport.write(reply(200, self.teacher.stats()))
        elif head.startswith(b"get /v1/models "):
            models = [{"id": self.teacher.options.model, "object": "model", "created": 1, "owned_by": "mock"}]
            self.transport.write(reply(200, {"object": "list", "data": models}))
        else:
            self.transport.write(reply(404, error("no such page")))

    def finish(self, asked: dict[str, Any], question: str, chat: bool, fate: str) -> None:
        teacher = self.teacher
        self.timer, self.busy = None, False
        teacher.in_flight -= 1
        teacher.counts[fate] += 1
        if fate == "answered":
            teacher.answered[question] = teacher.answered.get(question, 0) + 1
            self.transport.write(reply(200, self.answer(asked, question, chat), teacher.limit_headers()))
        elif fate == "errors":
            self.transport.write(reply(500, error("planned failure", kind="server_error"), teacher.limit_headers()))
        elif fate == "truncated":
            body = orjson.dumps(self.answer(asked, question, chat))
            self.transport.write(whole(200, body[: len(body) // 2], teacher.limit_headers()))
        elif fate == "cut":
            sent = reply(200, self.answer(asked, question, chat), teacher.limit_headers())
            self.transport.write(sent[: sent.index(b"\r\n\r\n") + 40])
            self.transport.close()
        else:  # without lingering, close() sends RST in place of FIN
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        if self.received:  # a client that does not wait for an answer before it sends the next
            self.loop.call_soon(self.data_received, b"")

    def answer(self, asked: dict[str, Any], question: str, chat: bool) -> dict[str, Any]:
        teacher = self.teacher
        text = f"answer to {question}"
        wanted = asked.get("response_format") or {}
        if wanted.get("type") == "json_schema":
            text = orjson.dumps(example(wanted["json_schema"]["schema"], text)).decode()
        elif wanted.get("type") == "json_object":
            text = orjson.dumps({"answer": text}).decode()
        ends: dict[str, Any] = {"finish_reason": "stop", "logprobs": None}
        ends |= {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        tokens_in, tokens_out = teacher.usage
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{teacher.counts['requests']}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": asked.get("model"),
            "choices": [{"index": n, **ends} for n in range(asked.get("n") or 1)],
            "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out},
        }


def parse(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """The first request's head (lower case), its body, and what follows it; None: it has not come whole."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head, start = data[:end].lower(), end + 4
    if length := LENGTH.search(head):
        stop = start + int(length[1])
        return (head, data[start:stop], data[stop:]) if len(data) >= stop else None
    if b"transfer-encoding: chunked" not in head:
        return head, b"", data[start:]
    body = b""
    while (line := data.find(b"\r\n", start)) >= 0:
        size = int(data[start:line].split(b";")[0], 16)
        start = line + 2 + size + 2
        if len(data) < start:
            return None
        if not size:
            return head, body, data[start:]
        body += data[line + 2 : line + 2 + size]
    return None


def said(content: Any) -> str:
    """A message's text, whole or in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def error(message: str, code: str | None = None, kind: str = "requests") -> dict[str, Any]:
    """OpenAI's body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def reply(status: int, body: Any, headers: bytes = b"") -> bytes:
    """A response with a JSON body."""
    return whole(status, orjson.dumps(body), headers)


def whole(status: int, body: bytes, headers: bytes) -> bytes:
    """A response with these bytes as its body."""
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (STATUS[status], headers, len(body), body)


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Such a server in a process of its own; gives its address."""
    command = [sys.executable, __file__, "--port", "0", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the mock server did not start; what it says stands above")
            yield url
        finally:
            process.stdin.close()


def read_stats(url: str) -> dict[str, Any]:
    """What the server at `url` has counted."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"{url}/stats", timeout=30) as response:
        stats: dict[str, Any] = json.load(response)
    return stats


async def serve(options: argparse.Namespace) -> None:
    """Serve until standard input closes."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    teacher = Teacher(options)
    server = await loop.create_server(lambda: Line(teacher, loop), "127.0.0.1", options.port, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)

    def wait_for_the_end() -> None:
        while os.read(0, 4096):
            pass
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    await ended.wait()


def main() -> None:
    """Read the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("port", 0, "0: any that is free"),
        ("burst", 0, "how many requests --rpm lets through at once; as many as --rpm where it is 0"),
        ("burst-tokens", 0, "the same for --tpm"),
        ("hidden-concurrency", 0, "refuse, without headers, when more are in flight"),
        ("slow-every", 0, "one request in so many takes --slow-ms"),
        ("seed", 0, "of the faults"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=what)
    for name in ("latency-ms", "slow-ms", "rpm", "tpm", *FAULTS):
        parser.add_argument(f"--{name}", type=float, default=0, help="a share" if name in FAULTS else None)
    parser.add_argument("--refused-count", action="store_true", help="refused calls use up the limit as well")
    parser.add_argument("--usage", default="20,30", help="tokens in and out of each answer")
    parser.add_argument("--model", default="m", help="what /v1/models lists")
    parser.add_argument("--core", type=int, help="the only core that it may use, where the system knows how")
    options = parser.parse_args()
    if options.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    uvloop.run(serve(options))


if __name__ == "__main__":
    main()
