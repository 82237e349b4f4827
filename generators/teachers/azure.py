"""Teachers in Azure OpenAI's own form of the protocol, which has deployments and API versions in its addresses.

It goes through the official `openai` client, which knows that form, at fifty times the CPU of the kind `openai`. Azure's
newer addresses (`https://NAME.openai.azure.com/openai/v1`) need none of this: the kind `openai` takes them as `base_url`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import orjson
from pydantic import field_validator

from factory.errors import TeacherFault
from factory.teacher import Connection, Heard, Port, Teacher
from generators.teachers.http import (
    CONNECT_S,
    address,
    each,
    fault_of,
    in_the_shape_of,
    missing_keys,
    ports_of,
    read_key,
    readings_of,
    server_name,
)
from generators.teachers.openai import Structured, question, reply_of
from schemas.call import Call, Params

if TYPE_CHECKING:
    from openai import AsyncAzureOpenAI


class Azure(Teacher):
    """A deployment (`model`) at `endpoint`. Several keys may be named, as for the kind `openai`, and so may `structured` be set.

    `limit` is what the deployment calls the most tokens of an answer; reasoning models know only max_completion_tokens.
    `provider` names who answers; until then the endpoint's address does, since a deployment's name is the user's own.
    """

    kind: ClassVar[str] = "azure"

    endpoint: str
    api_version: str = "2024-10-21"
    api_key_env: str | tuple[str, ...] = "AZURE_OPENAI_API_KEY"
    provider: str | None = None
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    structured: Literal["schema", "object", "prompt"] = "schema"

    @field_validator("endpoint")
    @classmethod
    def _address(cls, value: str) -> str:
        return address(value, "endpoint is an address such as https://NAME.openai.azure.com").removesuffix("/openai")

    def identity(self) -> tuple[str, str]:
        return self.provider or server_name(self.endpoint), self.model

    def check(self) -> str | None:
        return missing_keys(each(self.api_key_env))

    def ports(self) -> tuple[Port, ...]:
        return ports_of((self.endpoint,), each(self.api_key_env), self.model, self._open)

    def connect(self, home: Path) -> AbstractAsyncContextManager[Connection]:
        return self.ports()[0].connect(home)

    @asynccontextmanager
    async def _open(self, url: str, key_env: str | None, home: Path) -> AsyncIterator[Connection]:
        import httpx2
        import openai

        async with openai.AsyncAzureOpenAI(
            azure_endpoint=url,
            api_version=self.api_version,
            api_key=read_key(key_env or ""),
            max_retries=0,  # the gateway must see every refusal
            timeout=httpx2.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s / 2)),
        ) as client:
            yield AzureConnection(client, self)


@dataclass(frozen=True)
class AzureConnection:
    """Asks a deployment through the official client, in the words of the kind `openai`."""

    client: AsyncAzureOpenAI
    teacher: Azure

    async def ask(self, call: Call, params: Params) -> Heard:
        teacher = self.teacher
        structured: Structured = "strict" if teacher.structured == "schema" else teacher.structured
        body = question(call, params, teacher.model, teacher.limit, structured)
        with _faults(teacher):
            # The client's timeout holds for each piece of an answer; this one for the whole.
            async with asyncio.timeout(teacher.timeout_s):
                said = await self._post(body)
        readings = readings_of(said.headers)
        with in_the_shape_of("Azure", said.content, readings):
            return Heard(reply_of(orjson.loads(said.content), call, params, structured), readings)

    async def _post(self, body: dict[str, Any]) -> Any:
        asked = "prompt" if "prompt" in body else "messages"
        rest = {name: value for name, value in body.items() if name not in ("model", asked)}
        if asked == "prompt":
            text = self.client.completions.with_raw_response
            return (await text.create(model=body["model"], prompt=body["prompt"], extra_body=rest)).http_response
        chat = self.client.chat.completions.with_raw_response
        return (await chat.create(model=body["model"], messages=body["messages"], extra_body=rest)).http_response


@contextmanager
def _faults(teacher: Azure) -> Iterator[None]:
    """The client's errors as ours."""
    import httpx2
    import openai

    place = server_name(teacher.endpoint)
    try:
        yield
    except openai.APIStatusError as error:
        raise fault_of(error.status_code, error.response.content, error.response.headers, teacher.endpoint) from error
    except (openai.APITimeoutError, TimeoutError) as error:
        if isinstance(error.__cause__, httpx2.ConnectTimeout):
            raise TeacherFault("again", f"no connection to {place} within {min(CONNECT_S, teacher.timeout_s / 2):g} s") from error
        raise TeacherFault("again", f"no answer from {place} within {teacher.timeout_s:g} s", paid=True) from error
    except openai.APIConnectionError as error:
        unsent = isinstance(error.__cause__, httpx2.ConnectError)
        what = str(error.__cause__ or "") or "the connection was closed"
        raise TeacherFault("again", f"{what} at {place}", paid=not unsent) from error
