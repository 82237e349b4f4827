"""A server that takes batches as OpenAI and as Anthropic do, counts what it is asked, and fails when told to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from aiohttp import web

from tests.mock_server import _chat, _completion, _messages

End = Literal["ok", "expired", "bad", "busy"]


@dataclass
class Submitted:
    """A batch as it came."""

    id: str
    endpoint: str
    asked: list[tuple[str, dict[str, Any], End]]  # custom_id, body, how it ends
    created: float
    metadata: dict[str, str]
    refused: str | None = None


@dataclass
class BatchServer:
    """A context. A batch ends once `held` is false; `ends` says how a question does that is asked for the nth time.

    `breaks` are met in order, one a submission: True breaks the connection once the batch is taken, a status refuses it.
    `refuses` are codes with which a batch that was taken fails as a whole. `questions` counts what was taken.
    """

    held: bool = False
    ends: Callable[[str, int], End] = lambda question, nth: "ok"
    breaks: deque[Literal[True] | int | None] = field(default_factory=deque)
    refuses: deque[str] = field(default_factory=deque)
    questions: Counter[str] = field(default_factory=Counter)
    batches: list[Submitted] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    looks: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_post("/v1/batches", self._openai_submit)
        app.router.add_get("/v1/batches", self._openai_list)
        app.router.add_get("/v1/batches/{id}", self._openai_status)
        app.router.add_post("/v1/messages/batches", self._anthropic_submit)
        app.router.add_get("/v1/messages/batches", self._anthropic_list)
        app.router.add_get("/v1/messages/batches/{id}", self._anthropic_status)
        app.router.add_get("/v1/messages/batches/{id}/results", self._anthropic_results)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _take(
        self, request: web.Request, endpoint: str, asked: list[tuple[str, dict[str, Any]]], mark: dict[str, str]
    ) -> web.Response | None:
        """Keep a batch; gives the refusal instead, where one is due."""
        self.headers.append(dict(request.headers))
        how = self.breaks.popleft() if self.breaks else None
        if how is not None and how is not True:
            return web.json_response({"error": {"type": "x", "message": f"planned {how}"}}, status=how)
        kept: list[tuple[str, dict[str, Any], End]] = []
        for custom_id, body in asked:
            question = _question(body)
            self.questions[question] += 1
            kept.append((custom_id, body, self.ends(question, self.questions[question])))
        refused = self.refuses.popleft() if self.refuses else None
        name = f"batch_{len(self.batches) + 1}"
        self.batches.append(Submitted(name, endpoint, kept, time.time(), mark, refused))
        if how is True:
            assert request.transport is not None
            request.transport.abort()
        return None

    def _find(self, request: web.Request) -> Submitted | None:
        self.looks += 1
        return next((batch for batch in self.batches if batch.id == request.match_info["id"]), None)

    # OpenAI's.

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        assert form["purpose"] == "batch"
        name, file = f"file_{len(self.files)}", form["file"]
        assert isinstance(file, web.FileField)
        self.files[name] = file.file.read()
        return web.json_response(
            {"id": name, "object": "file", "bytes": 1, "created_at": 1, "filename": "f", "purpose": "batch", "status": "ok"}
        )

    async def _openai_submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["completion_window"] == "24h"
        lines = [json.loads(line) for line in self.files[body["input_file_id"]].splitlines()]
        assert all(line["method"] == "POST" and line["url"] == body["endpoint"] for line in lines)
        refusal = self._take(request, body["endpoint"], [(line["custom_id"], line["body"]) for line in lines], body["metadata"])
        return refusal or web.json_response(self._openai(self.batches[-1]))

    async def _openai_list(self, request: web.Request) -> web.Response:
        newest = [self._openai(batch) for batch in reversed(self.batches)]
        after = request.query.get("after")
        first = next((n + 1 for n, batch in enumerate(newest) if batch["id"] == after), 0)
        page = newest[first : first + 2]  # small pages, so that they are turned
        return web.json_response({"object": "list", "data": page, "has_more": first + 2 < len(newest)})

    async def _openai_status(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        if batch is None:
            return web.json_response({"error": {"message": "no such batch"}}, status=404)
        return web.json_response(self._openai(batch))

    async def _content(self, request: web.Request) -> web.Response:
        what, _, name = request.match_info["id"].partition("-")
        batch = next(batch for batch in self.batches if batch.id == name)
        lines = []
        for custom_id, body, end in batch.asked:
            if (what == "output") != (end == "ok"):
                continue
            result: dict[str, Any] = {"id": "r", "custom_id": custom_id, "response": None, "error": None}
            if end == "ok":
                protocol = _chat if batch.endpoint == "/v1/chat/completions" else _completion
                _, answer = protocol(body, _answer)
                result["response"] = {"status_code": 200, "request_id": "q", "body": answer}
            elif end == "expired":
                result["error"] = {"code": "batch_expired", "message": "it was not asked in time"}
            else:
                status = {"bad": 400, "busy": 500}[end]
                result["response"] = {"status_code": status, "request_id": "q", "body": {"error": {"message": f"planned {status}"}}}
            lines.append(json.dumps(result, ensure_ascii=False))
        return web.Response(body="\n".join(lines).encode() + b"\n")

    def _openai(self, batch: Submitted) -> dict[str, Any]:
        fine = [end == "ok" for *_, end in batch.asked]
        status = "failed" if batch.refused else "in_progress" if self.held else "completed"
        done = 0 if self.held else len(fine)
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": batch.endpoint,
            "input_file_id": "f",
            "completion_window": "24h",
            "created_at": int(batch.created),
            "status": status,
            "metadata": batch.metadata,
            "request_counts": {"total": len(fine), "completed": min(done, sum(fine)), "failed": max(0, done - sum(fine))},
            "errors": {"object": "list", "data": [{"code": batch.refused, "message": "planned"}]} if batch.refused else None,
            "output_file_id": f"output-{batch.id}" if status == "completed" and any(fine) else None,
            "error_file_id": f"error-{batch.id}" if status == "completed" and not all(fine) else None,
        }

    # Anthropic's.

    async def _anthropic_submit(self, request: web.Request) -> web.Response:
        asked = [(each["custom_id"], each["params"]) for each in (await request.json())["requests"]]
        assert len({custom_id for custom_id, _ in asked}) == len(asked)
        refusal = self._take(request, "/v1/messages", asked, {})
        return refusal or web.json_response(self._anthropic(self.batches[-1]))

    async def _anthropic_list(self, request: web.Request) -> web.Response:
        newest = [self._anthropic(batch) for batch in reversed(self.batches)]
        after = request.query.get("after_id")
        first = next((n + 1 for n, batch in enumerate(newest) if batch["id"] == after), 0)
        page = newest[first : first + 2]
        last = page[-1]["id"] if page else None
        return web.json_response({"data": page, "has_more": first + 2 < len(newest), "first_id": None, "last_id": last})

    async def _anthropic_status(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        if batch is None:
            return web.json_response({"type": "error", "error": {"type": "not_found_error", "message": "no such batch"}}, status=404)
        return web.json_response(self._anthropic(batch))

    async def _anthropic_results(self, request: web.Request) -> web.Response:
        batch = self._find(request)
        assert batch is not None
        lines = []
        for custom_id, body, end in reversed(batch.asked):
            result: dict[str, Any] = {"type": "expired"}
            if end == "ok":
                result = {"type": "succeeded", "message": _messages(body, _answer)[1]}
            elif end != "expired":
                kind = {"bad": "invalid_request_error", "busy": "overloaded_error"}[end]
                result = {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": f"planned {kind}"}}}
            lines.append(json.dumps({"custom_id": custom_id, "result": result}, ensure_ascii=False))
        return web.Response(body="\n".join(lines).encode() + b"\n", content_type="application/binary")

    def _anthropic(self, batch: Submitted) -> dict[str, Any]:
        ends = Counter(end for *_, end in batch.asked)
        counts = {
            "succeeded": ends["ok"],
            "errored": ends["bad"] + ends["busy"],
            "expired": ends["expired"],
            "canceled": 0,
            "processing": 0,
        }
        if self.held:
            counts = {**dict.fromkeys(counts, 0), "processing": len(batch.asked)}
        created = datetime.fromtimestamp(batch.created, UTC).isoformat()
        return {
            "id": batch.id,
            "type": "message_batch",
            "created_at": created,
            "expires_at": created,
            "processing_status": "in_progress" if self.held else "ended",
            "request_counts": counts,
            "results_url": None if self.held else f"{self.url}/v1/messages/batches/{batch.id}/results",
        }


def _question(body: dict[str, Any]) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


def _answer(question: str) -> str:
    return f"answer to\u2028{question}"  # a character at which str.splitlines breaks a line
