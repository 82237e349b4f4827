"""Runs what nobody has read in a process of its own with bounds: a sample's code, query or formula may cost a verdict, and no machine.

What bounds it: the wall clock (its process group is killed as a whole), CPU time, memory, size and number of open files, processes,
core dumps (limits of the kernel); an empty environment, a closed stdin, output that is cut off, and a temporary folder that is
deleted; and an audit hook (PEP 578) that refuses sockets, new processes, ctypes, writing outside of the folder and reading
outside of it and of Python's own files. Where the machine lets anybody have namespaces of their own (`unshare`), there is no
network either, whatever the code calls, and its processes die with it.

What it does not cover: **it stops accidents, not an attacker.** An audit hook is no boundary against code that means to get
past it (native code, or Python that digs in its own frames); the number of processes is not limited for root, nor where there is no
user namespace to count them in; the sizes of all files together are bounded by time alone; nothing here filters system calls. Who runs
code of teachers that they don't trust runs Gristmill itself in a container or a virtual machine. POSIX only.

This file is both sides. The inner one starts it as a script, and imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

if __name__ != "__main__":
    from factory.errors import GristmillError

Fate = Literal["answered", "died", "timed out"]
Say = Callable[[Any], None]

START_S = 60.0  # an interpreter under load, with the imports of a filter
LIFE_S = 120  # of a lasting process; where Gristmill itself was killed, its CPU time ends what it was at
RECORDS_KB = 1024
_CODE = Path(__file__).resolve().parents[1]  # where the functions that may be named are imported from
_UNSHARE_SAYS = re.compile(r"^unshare: .*\n", re.MULTILINE)  # where the process in it was killed
# What a process ends with that the kernel kills for its CPU time: the signal, or, where it is the first of a namespace and `unshare`
# waits for it, 1 as well (it fails to die by SIGKILL itself, util-linux 2.38). Others are killed too, and Python's own 1 is an
# exception: the time used decides. The kernel holds ticks to the limit, which may run ahead of the time that it tells.
_KILLED = (-signal.SIGKILL, -signal.SIGXCPU, 128 + signal.SIGKILL, 128 + signal.SIGXCPU, 1)
_NEARLY = 0.8
_UNSHARE = ("--user", "--map-root-user", "--net", "--ipc")


@dataclass(frozen=True)
class Limits:
    """What one question may cost. `memory_mb` is on top of what the interpreter holds when it is ready; a file: its size."""

    seconds: float = 10.0
    cpu_seconds: int | None = None  # of the process's whole life: only where it is asked one question
    memory_mb: int = 512
    file_mb: int = 16
    open_files: int = 64
    processes: int = 32
    output_chars: int = 4000


@dataclass(frozen=True)
class Answer:
    """What came of one question.

    value: what the function gave back; None unless fate is "answered". said: what it said on the way, which a process that died
    has said too. output: what was written to stdout and stderr, its beginning. seconds: of the wall clock.
    """

    fate: Fate
    value: Any = None
    said: tuple[Any, ...] = ()
    output: str = ""
    seconds: float = 0.0


def ask(
    function: str,
    questions: Sequence[Any],
    *,
    limits: Limits = Limits(),
    workers: int | None = None,
    lasting: bool = False,
    packages: bool = False,
    preload: Sequence[str] = (),
) -> list[Answer]:
    """Put each question (a JSON value) to `function` ("package.module:name", called with it and a `Say`), inside; answers in order.

    workers: processes at once; one a core by default. lasting: a process answers one question after the other, and a new one
    takes over where it died or was killed; else each question has a process and a folder of its own. packages: what is installed beside
    Gristmill can be imported inside. preload: modules whose import is not to count as the first question's time.
    """
    if not questions:
        return []
    if os.name != "posix":
        raise GristmillError("the sandbox needs Linux or macOS", next="Run Gristmill in WSL or in a container.")
    at_once = min(workers or os.cpu_count() or 1, len(questions) if not lasting else (len(questions) + 9) // 10)
    answers: list[Answer | None] = [None] * len(questions)
    waiting = iter(range(len(questions)))
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        with _Inside(function, limits, lasting=lasting, packages=packages, preload=preload) as inside:
            while not stop.is_set():
                with lock:
                    if (i := next(waiting, None)) is None:
                        return
                answers[i] = inside.ask(questions[i])

    with ThreadPoolExecutor(at_once, "sandbox") as pool:
        try:
            for future in [pool.submit(work) for _ in range(at_once)]:
                future.result()
        finally:
            stop.set()  # what was interrupted waits for the questions that are being answered, and for no more
    return [answer for answer in answers if answer is not None]


def isolation() -> str:
    """What keeps code inside on this machine, in words for a report."""
    kinds = [word.removeprefix("--") for word in _namespaces() if word in ("--net", "--ipc", "--pid")]
    return "limits, audit hook" + (f", namespaces ({', '.join(kinds)})" if kinds else ", no namespaces")


@cache
def _namespaces() -> tuple[str, ...]:
    """The command before a command that gives it namespaces of its own; empty where the machine does not let us."""
    if (unshare := shutil.which("unshare")) is None or sys.platform != "linux":
        return ()
    for more in (("--pid", "--fork", "--kill-child"), ()):
        command = (unshare, *_UNSHARE, *more)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            tried = subprocess.run([*command, sys.executable, "-S", "-c", ""], capture_output=True, timeout=START_S, check=False)
            if tried.returncode == 0:
                return command
    return ()


class _Inside:
    """A process that answers questions, started when it is first asked and again after it died. Not for two threads at once."""

    def __init__(self, function: str, limits: Limits, *, lasting: bool, packages: bool, preload: Sequence[str]) -> None:
        self.function, self.limits, self.lasting = function, limits, lasting
        self.token = secrets.token_hex(8)  # what the code inside writes by itself is no answer
        self.job = {
            "function": function,
            "code": str(_CODE),
            "packages": [entry for entry in sys.path if entry and Path(entry).is_dir()] if packages else None,
            "preload": list(preload),
            "limits": asdict(limits) | ({"cpu_seconds": LIFE_S + int(limits.seconds) + 1} if lasting else {}),
            "token": self.token,
            "counted": bool(_namespaces()),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.output, self.rest, self.size = b"", b"", 0
        self.said: list[dict[str, Any]] = []
        self.born = 0.0
        self.cpu, self.used = math.inf, 0.0  # seconds of the processor: what it is killed for, what it had when it ended

    def __enter__(self) -> _Inside:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, question: Any) -> Answer:
        if self.process is None or self._ended() or time.monotonic() - self.born > LIFE_S:
            self.end()
            self._start()
        assert self.process is not None and self.process.stdin is not None
        start = time.monotonic()
        self.output, self.said, self.size = b"", [], 0
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        fate = self._listen(start + self.limits.seconds, "answer")
        seconds = round(time.monotonic() - start, 3)
        said = [record["said"] for record in self.said if "said" in record]
        value = next((record["answer"] for record in self.said if "answer" in record), None)
        if fate != "answered" or not self.lasting:
            code = self.end()
            if fate == "died" and code in _KILLED and self.used >= _NEARLY * self.cpu:
                fate = "timed out"
        output = _UNSHARE_SAYS.sub("", self.output.decode(errors="replace"))[: self.limits.output_chars]
        return Answer(fate, value, tuple(said), output, seconds)

    def end(self) -> int | None:
        """Kill the process with all that it started, and delete its folder; the return code, if there was one."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._ended(0)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not read any more
                if pipe is not None:
                    pipe.close()
        os.close(self.records)
        self.ears.close()
        code, self.process = self.process.returncode, None
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
        except RecursionError:  # folders in folders in folders
            subprocess.run(["rm", "-rf", self.folder], check=False, capture_output=True)
        return code

    def _ended(self, options: int = os.WNOHANG) -> bool:
        """Whether the process has ended; then its return code and the CPU time that it `used` are known. options: of wait4."""
        assert self.process is not None
        if self.process.returncode is None:
            try:
                pid, status, cost = os.wait4(self.process.pid, options)
            except ChildProcessError:  # where SIGCHLD is ignored nobody can tell
                self.process.returncode, self.used = 0, 0.0
            else:
                if pid:
                    self.process.returncode = os.waitstatus_to_exitcode(status)
                    self.used = cost.ru_utime + cost.ru_stime
        return self.process.returncode is not None

    def _start(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="gristmill-")
        self.records, theirs = os.pipe()
        command = [*_namespaces(), sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", __file__, str(theirs), self.folder]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={"PYTHONHASHSEED": "0", "HOME": self.folder, "TMPDIR": self.folder, "LC_ALL": "C.UTF-8"},
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.output, self.said, self.rest = b"", [], b""
        self.ears = selectors.DefaultSelector()
        for pipe in (self.records, self.process.stdout.fileno()):
            os.set_blocking(pipe, False)
            self.ears.register(pipe, selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(self.job).encode() + b"\n")
            self.process.stdin.flush()
        if (fate := self._listen(time.monotonic() + START_S, "ready")) != "answered":
            output = self.output.decode(errors="replace")
            self.end()
            raise GristmillError(
                f"the sandbox did not start ({fate}): {output[-500:]}",
                where=self.function,
                next="Free memory, or allow more processes, and run the same command.",
            )
        self.cpu = next(record["ready"] for record in self.said if "ready" in record) or math.inf
        self.born = time.monotonic()

    def _listen(self, deadline: float, what: str) -> Fate:
        """Read until a record with the key `what` has come, the process has ended, or the time is over."""
        assert self.process is not None
        while self.ears.get_map():
            if (left := deadline - time.monotonic()) <= 0:
                return "timed out"
            ready = self.ears.select(min(left, 0.1))
            ended = not ready and self._ended()  # a grandchild may hold the pipes open
            for key, _ in ready:
                try:
                    data = os.read(key.fd, 65536)
                except BlockingIOError:
                    continue
                if not data:
                    self.ears.unregister(key.fd)
                elif key.fd == self.records:
                    self._hear(data)
                else:
                    self._note(data)
            if any(what in record for record in self.said):
                self._note_the_rest()
                return "answered"
            if ended or self.size > RECORDS_KB << 10:
                break
        return "died"

    def _note(self, data: bytes) -> None:
        self.output += data[: max(0, 4 * self.limits.output_chars - len(self.output))]

    def _note_the_rest(self) -> None:
        """Read what was written before an answer and may have come after the look that found it."""
        assert self.process is not None and self.process.stdout is not None
        with contextlib.suppress(BlockingIOError):
            while len(self.output) < 4 * self.limits.output_chars and (data := os.read(self.process.stdout.fileno(), 65536)):
                self._note(data)

    def _hear(self, data: bytes) -> None:
        self.size += len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            token, _, record = line.partition(b" ")
            if token.decode(errors="replace") == self.token:
                self.said.append(json.loads(record))


# From here on it is what happens inside.


def _serve() -> None:
    """Bound itself, lock the doors, and answer the questions that come as lines of JSON; end with the last of them."""
    records, folder = int(sys.argv[1]), sys.argv[2]
    lines = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    job = json.loads(lines.readline())
    token = job["token"].encode()

    def write(record: dict[str, Any]) -> None:
        data = token + b" " + json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"  # no lone surrogates
        while data:
            data = data[os.write(records, data) :]

    standard = list(sys.path)
    sys.path[:] = [job["code"], *(job["packages"] or standard)]
    module, _, name = job["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    for other in job["preload"]:
        importlib.import_module(other)
    sys.path[:] = [folder, *(job["packages"] or standard)]
    sys.argv[:] = ["sample"]
    cpu = _limit(job["limits"], counted=job["counted"])
    _lock(folder, [*sys.path, sys.prefix, sys.base_prefix])
    write({"ready": cpu})
    for line in lines:
        answer = function(json.loads(line), lambda said: write({"said": said}))
        sys.stdout.flush()
        sys.stderr.flush()
        write({"answer": answer})
    os._exit(0)  # threads that the code has left behind are not waited for


def _limit(limits: dict[str, Any], *, counted: bool) -> int | None:
    """Set the limits; that of CPU time, in seconds of the process's whole life, None where there is none."""
    import resource

    held = 0
    with contextlib.suppress(OSError, ValueError):
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["file_mb"] << 20),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_AS, held + (limits["memory_mb"] << 20)),
    ]
    if limits["cpu_seconds"] is not None:
        # Whole seconds, beside those that the start took: who is killed earlier has not had its time.
        wanted.append((resource.RLIMIT_CPU, math.ceil(time.process_time()) + limits["cpu_seconds"]))
    if counted:  # else all processes of this user count, and it could not start one
        wanted.append((resource.RLIMIT_NPROC, limits["processes"]))
    for which, most in wanted:
        hard = resource.getrlimit(which)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of memory
            resource.setrlimit(which, (most, most))
    cpu = resource.getrlimit(resource.RLIMIT_CPU)[0]
    return None if cpu == resource.RLIM_INFINITY else cpu


_READ_TOO = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/zero", "/usr/share/zoneinfo", "/etc/localtime", "/etc/mime.types")
_REFUSED = (
    "socket.",
    "ctypes.",
    "subprocess.",
    "syslog.",
    "pty.",
    "os.fork",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.kill",
    "os.setxattr",
    "os.removexattr",
    "resource.",
    "signal.pthread_kill",
    "sqlite3.enable_load_extension",
    "sqlite3.load_extension",
    "webbrowser.",
)
_WRITES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.chflags",
    "os.lockf",
    "os.utime",
)
_READS = ("os.listdir", "os.scandir", "os.chdir", "os.fwalk", "os.walk", "glob.glob")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _lock(folder: str, readable: Sequence[str]) -> None:
    """Refuse, from now on and for good, what a sample has no business to do."""
    realpath, fspath, fsdecode, sep = os.path.realpath, os.fspath, os.fsdecode, os.sep
    own, local = realpath(folder), (1, -1)  # AF_UNIX, and what has been made already
    known = tuple({realpath(entry) for entry in (*readable, *_READ_TOO) if entry})

    def within(path: Any, roots: tuple[str, ...]) -> bool:
        if path is None or isinstance(path, int):  # what is open already
            return True
        real = realpath(fsdecode(fspath(path)))
        return any(real == root or real.startswith(root + sep) for root in roots)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writing = isinstance(flags, int) and flags & _WRITING
            if not within(path, (own, os.devnull) if writing else (own, *known)):
                raise PermissionError(f"the sandbox refuses to {'write' if writing else 'read'} {path!r}")
        elif event.startswith(_WRITES):
            for path in args:
                if isinstance(path, str | bytes | os.PathLike) and not within(path, (own,)):
                    raise PermissionError(f"the sandbox refuses {event} of {path!r}")
        elif event.startswith(_READS):
            if args and isinstance(args[0], str | bytes | os.PathLike) and not within(args[0], (own, *known)):
                raise PermissionError(f"the sandbox refuses {event} of {args[0]!r}")
        elif event == "sqlite3.connect":
            if args[0] not in (":memory:", "") and not within(args[0], (own,)):
                raise PermissionError(f"the sandbox refuses to open {args[0]!r}")
        elif event == "socket.__new__" and args[1] in local:
            pass  # a pair of them is how asyncio wakes itself; they reach nobody, since "socket.connect" is refused
        elif event.startswith("ctypes."):
            raise ImportError(f"the sandbox refuses {event}")  # as if ctypes were not there, which libraries expect
        elif event.startswith(_REFUSED):
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
