"""What the sandbox must stop, tried from inside: each of these would hurt, hang or lie if a bound were missing."""

from __future__ import annotations

import functools
import json
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from filters import sandbox
from filters.sandbox import Answer, Limits

SHORT = Limits(seconds=2, cpu_seconds=1, memory_mb=96, file_mb=1, output_chars=500)


def run(code: str, *tests: str, limits: Limits = SHORT) -> Answer:
    (answer,) = asked([(code, tests or ("assert True",))], limits=limits)
    return answer


def asked(pairs: list[tuple[str, tuple[str, ...]]], **settings: Any) -> list[Answer]:
    questions = [{"before": "", "code": code, "tests": list(tests), "entry": None} for code, tests in pairs]
    return sandbox.ask("filters.trial:run", questions, **settings)


def error(answer: Answer) -> str:
    assert answer.fate == "answered", answer
    return str(answer.value.get("error", ""))


def test_what_runs_well_is_answered_with_its_output() -> None:
    answer = run("print('hello')\ndef double(x): return 2 * x", "assert double(2) == 4")
    assert (answer.fate, answer.value, answer.output) == ("answered", {}, "hello\n")
    assert [record.get("error", "-") for record in answer.said if "test" in record] == [None]


REFUSED = [
    ("import socket; socket.socket()", "refuses socket"),
    ("import socket; socket.create_connection(('127.0.0.1', PORT), 1)", "refuses socket"),
    ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:PORT')", "refuses socket"),
    ("import subprocess; subprocess.run(['true'])", "refuses subprocess.Popen"),
    ("import os; os.system('true')", "refuses os.system"),
    ("import os; os.fork()", "refuses os.fork"),
    ("import os; os.execv('/bin/true', ['true'])", "refuses os.exec"),
    ("import os; os.kill(1, 9)", "refuses os.kill"),
    ("import ctypes", "refuses ctypes"),
    ("open('OUTSIDE/new', 'w')", "refuses to write"),
    ("import os; os.open('OUTSIDE/new', os.O_CREAT | os.O_WRONLY)", "refuses to write"),
    ("open('OUTSIDE/secret').read()", "refuses to read"),
    ("open('../secret', 'a')", "refuses to write"),
    ("import os; os.symlink('OUTSIDE/secret', 'here'); open('here').read()", "refuses"),
    ("import os; os.remove('OUTSIDE/secret')", "refuses os.remove"),
    ("import os; os.rename('OUTSIDE/secret', 'mine')", "refuses os.rename"),
    ("import os; os.mkdir('OUTSIDE/folder')", "refuses os.mkdir"),
    ("import os; os.chmod('OUTSIDE/secret', 0o777)", "refuses os.chmod"),
    ("import shutil; shutil.rmtree('OUTSIDE')", "refuses"),
    ("import os; os.listdir('OUTSIDE')", "refuses os.listdir"),
    ("import sqlite3; sqlite3.connect('OUTSIDE/new.db')", "refuses to open"),
    ("import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "refuses resource"),
    ("x = 'a' * 10**9", "MemoryError"),
    ("open('big', 'w').write('a' * 3_000_000)", "File too large"),
    ("files = [open(f'f{i}', 'w') for i in range(1000)]", "Too many open files"),
    ("import sys; sys.exit(0)", "SystemExit"),
    ("input()", "EOFError"),
    ("def f(): return f()\nf()", "RecursionError"),
    ("import numpy", "No module named 'numpy'"),
    ("raise ValueError('line one\\nline two')", "ValueError: line one line two"),
]


def test_what_it_has_no_business_to_do_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {"OUTSIDE": str(tmp_path), "PORT": str(server.getsockname()[1])}
        codes = [functools.reduce(lambda code, name: code.replace(name, places[name]), places, code) for code, _ in REFUSED]
        answers = asked([(code, ("assert True",)) for code in codes], limits=SHORT)
    for (code, words), answer in zip(REFUSED, answers, strict=True):
        assert words in error(answer), code
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_text() == "s"


ENDLESS = [
    "while True: pass",
    "import time\ntime.sleep(60)",
    "9**9**9",
    "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "while True: print('x' * 1000)",
    "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,)); t.start(); t.join()",
    "try:\n    while True: pass\nexcept BaseException:\n    pass\nwhile True: pass",
]


def test_what_does_not_end_is_ended() -> None:
    start = time.monotonic()
    answers = asked([(code, ("assert True",)) for code in ENDLESS], limits=SHORT, workers=len(ENDLESS))
    assert {code: answer.fate for code, answer in zip(ENDLESS, answers, strict=True)} == dict.fromkeys(ENDLESS, "timed out")
    assert time.monotonic() - start < 40
    assert max(len(answer.output) for answer in answers) == SHORT.output_chars


def test_time_of_the_processor_is_bounded_too() -> None:
    start = time.monotonic()
    assert run("while True: pass", limits=Limits(seconds=60, cpu_seconds=1)).fate == "timed out"
    assert time.monotonic() - start < 30


BURNS = """
import hashlib, threading
threads = [threading.Thread(target=hashlib.pbkdf2_hmac, args=("sha256", b"x", b"y", 10**9)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture(params=["namespaces", "no namespaces"])
def namespaces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no namespaces":
        monkeypatch.setattr(sandbox, "_namespaces", lambda: ())
    elif not sandbox._namespaces():
        pytest.skip("this machine lets nobody have namespaces of their own")


@pytest.mark.usefixtures("namespaces")
def test_threads_that_use_up_the_time_of_the_processor_early_are_timed_out_too() -> None:
    answer = run(BURNS, limits=Limits(seconds=60, cpu_seconds=4))
    assert (answer.fate, answer.output) == ("timed out", "")


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("end", ["os._exit(0)", "os._exit(1)", "os._exit(137)", "os.abort()", "signal.raise_signal(9); os._exit(1)"])
def test_a_process_that_ends_itself_late_has_died(end: str) -> None:
    answer = run(f"import os, signal, time\ntime.sleep(1.2)\n{end}", limits=Limits(seconds=30, cpu_seconds=1))
    assert answer.fate == "died"


@pytest.mark.parametrize("code", ["import os\nos._exit(0)", "import os\nos.abort()"])
def test_a_process_that_ends_itself_has_not_answered(code: str) -> None:
    answer = run(code)
    assert (answer.fate, answer.value) == ("died", None)
    assert "unshare" not in answer.output


def test_what_code_writes_by_itself_is_no_answer() -> None:
    forged = json.dumps({"answer": {}})
    answer = run(f"import os\nfor fd in range(1, 30):\n    try: os.write(fd, b'0 {forged}\\n')\n    except OSError: pass\nos._exit(0)")
    assert answer.fate == "died"


def test_the_environment_is_empty_and_hashing_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    first, second = (run("import os\nprint(sorted(os.environ), hash('a'), list({'x', 'y', 'z'}))").output for _ in range(2))
    assert first == second
    assert "OPENAI" not in first


def test_a_folder_of_its_own_is_there_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deep = "import os\nfor i in range(1200): os.mkdir('d'); os.chdir('d')"
    own = "import tempfile\nopen('a', 'w').write('x')\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x')"
    answers = asked([(own, ("assert open('a').read() == 'x'",)), (deep, ("assert True",)), ("while True: pass", ())], limits=SHORT)
    assert [answer.fate for answer in answers] == ["answered", "answered", "timed out"]
    assert [record["error"] for record in answers[0].said if "test" in record] == [None]
    left = list(tmp_path.iterdir())
    subprocess.run(["rm", "-rf", *left], check=True)  # pytest can't remove so deep a folder, and would say so in every later run
    assert left == []


def test_what_honest_code_needs_is_let_through() -> None:
    code = """
import asyncio, collections, concurrent.futures, csv, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, logging
import math, mimetypes, pathlib, pickle, random, re, sqlite3, statistics, string, tempfile, threading, typing, unittest.mock, uuid, zoneinfo
async def later(): return 3
with concurrent.futures.ThreadPoolExecutor(2) as pool: assert list(pool.map(abs, [-1, 2])) == [1, 2]
assert sqlite3.connect(':memory:').execute('select 1').fetchone() == (1,)
assert mimetypes.guess_type('a.html')[0] == 'text/html'
pathlib.Path('folder').mkdir(); pathlib.Path('folder/a.json').write_text('{}'); pathlib.Path('folder').rename('other')
datetime.datetime.now(); zoneinfo.ZoneInfo('UTC'); uuid.uuid4(); logging.warning('x')
with open('helper.py', 'w') as file: file.write('x = 5')
import helper
assert helper.x == 5 and pathlib.Path('other/a.json').exists()
"""
    answer = run(code, "assert asyncio.run(later()) == 3", limits=Limits())
    assert answer.value == {}, answer
    assert [record["error"] for record in answer.said if "test" in record] == [None]


def test_packages_are_there_where_they_are_asked_for() -> None:
    (answer,) = asked([("import numpy", ("assert int(numpy.arange(3).sum()) == 3",))], limits=Limits(memory_mb=2048), packages=True)
    assert [record.get("error", "-") for record in answer.said if "test" in record] == [None], answer


def test_questions_are_answered_in_order_and_at_once() -> None:
    pairs = [(f"import time\ntime.sleep(0.5)\nprint({i})", ("assert True",)) for i in range(4)]
    start = time.monotonic()
    answers = asked(pairs, limits=Limits(seconds=20), workers=4)
    assert [answer.output for answer in answers] == ["0\n", "1\n", "2\n", "3\n"]
    assert sum(answer.seconds for answer in answers) >= 1.9
    assert time.monotonic() - start < 15
    assert asked([], limits=SHORT) == []


def test_output_that_comes_between_a_look_and_the_reading_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test said wakes the reader; output and answer come before it reads, and it reads both pipes' worth of one of them."""

    class Slow(selectors.DefaultSelector):
        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            ready = super().select(timeout)
            time.sleep(0.3 if ready else 0)
            return ready

    monkeypatch.setattr("filters.sandbox.selectors.DefaultSelector", Slow)
    assert run("print('late')", "import time; time.sleep(0.1)").output == "late\n"


def test_a_lasting_process_goes_on_after_one_that_was_killed() -> None:
    codes = ["print(1)", "while True: pass", "import os\nos._exit(0)", "print(2)", "print(3)"]
    answers = asked([(code, ("assert True",)) for code in codes], limits=Limits(seconds=1), lasting=True, workers=1)
    assert [answer.fate for answer in answers] == ["answered", "timed out", "died", "answered", "answered"]
    assert [answer.output for answer in answers if answer.fate == "answered"] == ["1\n", "2\n", "3\n"]


def test_a_flood_of_records_is_cut_off() -> None:
    answer = run("pass", *(["assert True"] * 30_000), limits=Limits(seconds=60, memory_mb=512))
    assert answer.fate == "died"
    assert sum(len(json.dumps(record)) for record in answer.said) < 2 * sandbox.RECORDS_KB << 10


def networks_of_their_own() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not networks_of_their_own(), reason="this machine lets nobody have a network of their own")
def test_there_is_no_network_even_for_what_the_hook_does_not_see() -> None:
    (answer,) = sandbox.ask("tests.filters.inside:network", [None], limits=SHORT)
    assert answer.value == "ENETUNREACH"
