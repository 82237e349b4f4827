"""A server that speaks OpenAI's protocol (and Azure's form of it) and Anthropic's, counts what it is asked, and fails when told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from aiohttp import web


@dataclass(frozen=True)
class Fault:
    """A refusal with a status; or, by `how`, a connection that is reset, an answer that is cut, garbled, of an odd shape, or late.

    "cut-refusal" breaks off the body of a refusal, and "break" the head of an answer. It happens after `delay_s`.
    """

    status: int = 500
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    how: Literal["refuse", "reset", "cut", "cut-refusal", "break", "garble", "odd", "hang"] = "refuse"
    delay_s: float = 0.0


RESET, CUT, GARBLE, ODD, HANG, BREAK = (Fault(how=how) for how in ("reset", "cut", "garble", "odd", "hang", "break"))


@dataclass
class MockServer:
    """A context. `faults` are met in order, one a request, then `always`; what is answered is counted by its question.

    `headers` stand on every answer; `shape` may change an answer's JSON, given what was asked. A chat is told the log-probabilities
    that it asks for: one token a word, each at -0.5, and the others of `top_logprobs` at -1.5, -2.5 and so on.
    """

    faults: deque[Fault] = field(default_factory=deque)
    always: Fault | None = None
    answer: Callable[[str], str] = lambda question: f"answer to {question}"
    latency_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    shape: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda asked, answer: answer
    answered: Counter[str] = field(default_factory=Counter)
    received: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", self._serve(_chat))
        app.router.add_post("/v1/completions", self._serve(_completion))
        app.router.add_post("/v1/messages", self._serve(_messages))
        app.router.add_post("/openai/deployments/{model}/chat/completions", self._serve(_chat))
        app.router.add_post("/openai/deployments/{model}/completions", self._serve(_completion))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # requests that hang, as they were told to
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _serve(self, protocol: Callable[[dict[str, Any], Callable[[str], str]], tuple[str, dict[str, Any]]]) -> Any:
        async def respond(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            self.received.append((request.path, {name.lower(): value for name, value in request.headers.items()}, body))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(self.latency_s)
                fault = self.faults.popleft() if self.faults else self.always
                question, answer = protocol(body, self.answer)
                answer = self.shape(body, answer)
                if fault is not None:
                    await asyncio.sleep(fault.delay_s)
                    return await _fail(request, fault, json.dumps(answer).encode())
                self.answered[question] += 1
                return web.json_response(answer, headers=self.headers)
            finally:
                self.in_flight -= 1

        return respond


async def _fail(request: web.Request, fault: Fault, answer: bytes) -> web.StreamResponse:
    assert request.transport is not None
    match fault.how:
        case "reset":
            request.transport.abort()
            return web.Response()
        case "cut" | "cut-refusal":
            status = 200 if fault.how == "cut" else fault.status
            response = web.StreamResponse(status=status, headers={**fault.headers, "Content-Length": str(len(answer))})
            await response.prepare(request)
            await response.write(answer[:20])
            request.transport.close()
            return response
        case "break":
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-")
            request.transport.close()
            return web.Response()
        case "garble":
            return web.Response(body=answer[:20], content_type="application/json", headers=fault.headers)
        case "odd":
            return web.json_response({"surprise": True}, headers=fault.headers)
        case "hang":
            await asyncio.sleep(30)
            return web.Response()
    text = fault.body if isinstance(fault.body, str) else json.dumps(fault.body or {"error": {"message": f"planned {fault.status}"}})
    return web.Response(status=fault.status, text=text, headers=fault.headers)


def _words(*texts: str) -> int:
    return sum(len(text.split()) for text in texts)


def _chat(body: dict[str, Any], answer: Callable[[str], str]) -> tuple[str, dict[str, Any]]:
    question = body["messages"][-1]["content"]
    text = answer(question)
    said = {"role": "assistant", "content": text, "refusal": None}
    return question, {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": said, "finish_reason": "stop", "logprobs": _logprobs(text, body)}],
        "usage": _usage(_words(*(m["content"] for m in body["messages"])), _words(text)),
    }


def _logprobs(text: str, body: dict[str, Any]) -> dict[str, Any] | None:
    if not body.get("logprobs"):
        return None

    def told(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    others = range(body.get("top_logprobs", 0))
    return {
        "content": [
            {**told(word, -0.5), "top_logprobs": [told(word if n == 0 else f"other{n}", -0.5 - n) for n in others]} for word in text.split()
        ],
        "refusal": None,
    }


def _completion(body: dict[str, Any], answer: Callable[[str], str]) -> tuple[str, dict[str, Any]]:
    text = answer(body["prompt"])
    return body["prompt"], {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "text": text, "finish_reason": "length", "logprobs": None}],
        "usage": _usage(_words(body["prompt"]), _words(text)),
    }


def _messages(body: dict[str, Any], answer: Callable[[str], str]) -> tuple[str, dict[str, Any]]:
    question = body["messages"][-1]["content"]
    text = answer(question)
    forced = body.get("tool_choice", {}).get("name")
    block: dict[str, Any] = {"type": "text", "text": text}
    if forced:
        block = {"type": "tool_use", "id": "toolu_1", "name": forced, "input": json.loads(text)}
    return question, {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [block],
        "stop_reason": "tool_use" if forced else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": _words(question), "output_tokens": _words(text)},
    }


def _usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
