"""A real PostgreSQL server for tests: Debian's, started once a session on a folder of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from itertools import count
from pathlib import Path

import psycopg
import pytest

UNSAFE = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")  # what a crash of the machine would break is of no use here
ROOM_BYTES = 2 << 30
_names = count()


def fresh_database() -> str:
    """The URL of a database that is empty; skips the test where no server is installed."""
    sockets = _sockets()
    if sockets is None:
        pytest.skip("PostgreSQL's server is not installed (Debian's package: postgresql)")
    name = f"test{next(_names)}"
    with psycopg.connect(f"postgresql://postgres@/postgres?host={sockets}", autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
    return f"postgresql://postgres@/{name}?host={sockets}"


@cache
def _sockets() -> Path | None:
    """The folder of a running server's socket; None: there is none to be started."""
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
    programs = newest or (Path(found).parent if (found := shutil.which("initdb")) else None)
    if programs is None:
        return None
    # Not below pytest's, which nobody else may enter; and a socket's path must be short. A database is 300 files: in memory it is
    # there in a tenth of the time.
    in_memory = Path("/dev/shm")
    roomy = in_memory.is_dir() and os.access(in_memory, os.W_OK) and shutil.disk_usage(in_memory).free > ROOM_BYTES
    folder = Path(tempfile.mkdtemp(prefix="pg", dir=in_memory if roomy else None))
    as_user: dict[str, object] = {}
    if os.geteuid() == 0:  # which the server refuses to run as
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")
    made = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "-A", "trust"]
    subprocess.run(made, check=True, capture_output=True, cwd="/", **as_user)  # type: ignore[call-overload]
    options = [word for option in ("listen_addresses=", f"unix_socket_directories={folder}", *UNSAFE) for word in ("-c", option)]
    # Beside us, under a shell that ends it and clears up once our end of the pipe is closed, however we end.
    watch = 'folder=$1; shift; "$@" >"$folder/log" 2>&1 & cat >/dev/null; kill -INT $!; wait $!; rm -rf "$folder"'
    command = ["sh", "-c", watch, "sh", folder, programs / "postgres", "-D", folder / "data", *options]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, cwd="/", start_new_session=True, **as_user)  # type: ignore[call-overload]
    atexit.register(_stop, server)
    for _ in range(400):
        try:
            psycopg.connect(f"postgresql://postgres@/postgres?host={folder}").close()
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return folder
    raise RuntimeError((folder / "log").read_text())


def _stop(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin
    server.stdin.close()
    server.wait(30)
