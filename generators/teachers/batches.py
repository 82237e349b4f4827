"""Batches at OpenAI and Anthropic by their own clients: what is asked live is asked within a day, at half the price."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import orjson

from factory.errors import TeacherFault
from factory.teacher import BatchItem, BatchStatus, Trace
from generators.teachers import anthropic as claude
from generators.teachers import openai as gpt
from generators.teachers.http import HERE, fault_of, in_the_shape_of, server_name
from schemas.call import Call, Reply

if TYPE_CHECKING:  # each takes a second to import, which only a run with batches should wait for
    from anthropic import AsyncAnthropic
    from openai import AsyncOpenAI
    from openai.types import Batch

SKEW = timedelta(minutes=15)  # that the provider's clock may be behind ours
NO_KEY = "none"  # a client without one would look for others in the environment, and send them wherever base_url says
MARK = "gristmill"  # the name under which OpenAI keeps our mark
FULL = "token_limit_exceeded"  # OpenAI's: too much waits in batches already
# Of OpenAI's results: the question was never asked.
UNASKED = ("batch_expired", "batch_cancelled")
# https://docs.claude.com/en/api/errors
STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


@asynccontextmanager
async def open_openai(url: str, key: str | None, timeout_s: float) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client for the server at `url`."""
    import openai

    http = openai.DefaultAsyncHttpxClient(trust_env=urlsplit(url).hostname not in HERE)
    async with openai.AsyncOpenAI(base_url=url, api_key=key or NO_KEY, timeout=timeout_s, http_client=http) as client:
        yield client


@asynccontextmanager
async def open_anthropic(url: str, key: str | None, timeout_s: float) -> AsyncIterator[AsyncAnthropic]:
    """Anthropic's client for the server at `url`."""
    import anthropic

    http = anthropic.DefaultAsyncHttpxClient(trust_env=urlsplit(url).hostname not in HERE)
    async with anthropic.AsyncAnthropic(base_url=url, api_key=key or NO_KEY, timeout=timeout_s, http_client=http) as client:
        yield client


@dataclass(frozen=True)
class OpenAIBatches:
    """https://platform.openai.com/docs/guides/batch; `limit` and `structured` as for a live connection."""

    client: AsyncOpenAI
    url: str
    model: str
    limit: str
    structured: gpt.Structured

    def body(self, call: Call) -> Mapping[str, Any]:
        return gpt.question(call, call.params, self.model, self.limit, self.structured)

    async def submit(self, mark: str, items: Sequence[BatchItem]) -> str:
        endpoint: Literal["/v1/chat/completions", "/v1/completions"]
        endpoint = "/v1/chat/completions" if items[0].call.prompt is None else "/v1/completions"
        lines = [orjson.dumps({"custom_id": i.custom_id, "method": "POST", "url": endpoint, "body": i.body}) for i in items]
        with self._faults():
            file = await self.client.files.create(file=(f"{mark}.jsonl", b"\n".join(lines) + b"\n"), purpose="batch")
            batch = await self.client.with_options(max_retries=0).batches.create(
                input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={MARK: mark}
            )
        return batch.id

    async def find(self, mark: str, count: int, since: datetime, known: Container[str]) -> Trace:
        with self._faults():
            async for batch in self.client.batches.list(limit=100):  # the latest first
                if datetime.fromtimestamp(batch.created_at, UTC) < since - SKEW:
                    break
                if (batch.metadata or {}).get(MARK) == mark:
                    return Trace(batch.id)
        return Trace()

    async def status(self, provider_id: str) -> BatchStatus | None:
        batch = await self._retrieve(provider_id)
        if batch is None:
            return None
        counts = batch.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
        ended = batch.status in ("completed", "failed", "expired", "cancelled")
        return BatchStatus(ended, done, total, _refused(batch) if batch.status == "failed" else None)

    async def results(self, provider_id: str, calls: Mapping[str, Call]) -> AsyncIterator[tuple[str, Reply | TeacherFault]]:
        batch = await self._retrieve(provider_id)
        if batch is None:
            return
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                async for line in self._lines(file_id):
                    result = orjson.loads(line)
                    if (custom_id := result.get("custom_id")) in calls:
                        yield custom_id, self._end(result, calls[custom_id])

    async def _retrieve(self, provider_id: str) -> Batch | None:
        import openai

        with self._faults():
            try:
                return await self.client.batches.retrieve(provider_id)
            except openai.NotFoundError:
                return None

    async def _lines(self, file_id: str) -> AsyncIterator[bytes]:
        """A file line by line. Not by the client's iter_lines, which also breaks lines at U+2028 within a string."""
        rest = b""
        with self._faults():
            async with self.client.files.with_streaming_response.content(file_id) as response:
                async for chunk in response.iter_bytes():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        if line.strip():
                            yield line
        if rest.strip():
            yield rest

    def _end(self, result: dict[str, Any], call: Call) -> Reply | TeacherFault:
        response, error = result.get("response"), result.get("error")
        if response and response.get("status_code") == 200:
            return _read(lambda: gpt.reply_of(response["body"], call, call.params, self.structured), response["body"])
        if response:
            return fault_of(response.get("status_code") or 500, orjson.dumps(response.get("body")), {}, self.url)
        code = (error or {}).get("code")
        if code in UNASKED:
            return TeacherFault("again", "the batch ended before this was asked")
        return TeacherFault("again", f"no answer in the batch: {(error or {}).get('message') or code}", paid=True)

    def _faults(self) -> AbstractContextManager[None]:
        import openai

        return _named(openai.APIStatusError, openai.OpenAIError, self.url)


@dataclass(frozen=True)
class AnthropicBatches:
    """https://docs.claude.com/en/docs/build-with-claude/batch-processing"""

    client: AsyncAnthropic
    url: str
    model: str

    def body(self, call: Call) -> Mapping[str, Any]:
        return claude.question(call, call.params, self.model)

    async def submit(self, mark: str, items: Sequence[BatchItem]) -> str:
        requests: Any = [{"custom_id": item.custom_id, "params": item.body} for item in items]
        with self._faults():
            batch = await self.client.with_options(max_retries=0).messages.batches.create(requests=requests)
        return batch.id

    async def find(self, mark: str, count: int, since: datetime, known: Container[str]) -> Trace:
        """It keeps no mark of ours but in the results, so one of the same size that has not ended may be it, and is waited for."""
        unsure = False
        with self._faults():
            async for batch in self.client.messages.batches.list(limit=100):  # the latest first
                if batch.created_at < since - SKEW:
                    break
                counts = batch.request_counts
                total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                if batch.id in known or total != count:
                    continue
                if batch.processing_status != "ended":
                    unsure = True
                elif await self._is_of(batch.id, mark):
                    return Trace(batch.id)
        return Trace(unsure=unsure)

    async def status(self, provider_id: str) -> BatchStatus | None:
        import anthropic

        with self._faults():
            try:
                batch = await self.client.messages.batches.retrieve(provider_id)
            except anthropic.NotFoundError:
                return None
        counts = batch.request_counts
        done = counts.succeeded + counts.errored + counts.canceled + counts.expired
        return BatchStatus(batch.processing_status == "ended", done, done + counts.processing)

    async def results(self, provider_id: str, calls: Mapping[str, Call]) -> AsyncIterator[tuple[str, Reply | TeacherFault]]:
        with self._faults():
            async for line in await self.client.messages.batches.results(provider_id):
                if line.custom_id in calls:
                    yield line.custom_id, self._end(line.result.to_dict(), calls[line.custom_id])

    async def _is_of(self, provider_id: str, mark: str) -> bool:
        results = await self.client.messages.batches.results(provider_id)
        try:
            async for line in results:
                return line.custom_id.startswith(f"{mark}-")
            return False
        finally:
            await results.close()

    def _end(self, result: Mapping[str, Any], call: Call) -> Reply | TeacherFault:
        if result["type"] == "succeeded":
            return _read(lambda: claude.reply_of(result["message"], call), result["message"])
        if result["type"] == "errored":
            refused = result["error"]
            return fault_of(STATUSES.get(refused["error"]["type"], 500), orjson.dumps(refused), {}, self.url)
        return TeacherFault("again", f"the batch ended before this was asked: {result['type']}")

    def _faults(self) -> AbstractContextManager[None]:
        import anthropic

        return _named(anthropic.APIStatusError, anthropic.AnthropicError, self.url)


def _refused(batch: Batch) -> TeacherFault:
    errors = (batch.errors and batch.errors.data) or []
    said = "; ".join(error.message or error.code or "" for error in errors[:3]) or "no reason given"
    return TeacherFault("later" if any(error.code == FULL for error in errors) else "stop", f"the batch was refused: {said}")


def _read(read: Callable[[], Reply], answer: object) -> Reply | TeacherFault:
    try:
        with in_the_shape_of("the provider", answer):
            return read()
    except TeacherFault as fault:
        return fault


@contextmanager
def _named(status_error: type[Any], any_error: type[Exception], url: str) -> Iterator[None]:
    """Name what a client raises as a TeacherFault. What is no refusal may have been done: its `paid` is true."""
    import httpx2

    try:
        yield
    except status_error as error:
        raise fault_of(error.status_code, error.response.content, error.response.headers, url) from error
    except (any_error, httpx2.HTTPError, OSError) as error:
        raise TeacherFault("again", f"{str(error) or type(error).__name__} at {server_name(url)}", paid=True) from error
    except ValueError as error:  # half a line of JSON
        raise TeacherFault("again", f"{server_name(url)} answered with something that is not JSON: {error}", paid=True) from error
