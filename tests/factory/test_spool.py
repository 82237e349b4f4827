"""Frames on a disk that may end anywhere, and locks that say who lives."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factory import spool as module
from factory.spool import HEAD, Alive, Spool, boot, frames, lives


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads=st.lists(st.binary(min_size=1, max_size=60), max_size=6), data=st.data())
def test_what_was_written_whole_is_read_back_wherever_the_file_ends(tmp_path: Path, payloads: list[bytes], data: st.DataObject) -> None:
    path = tmp_path / "a.spool"
    path.unlink(missing_ok=True)
    spool = Spool(path, b"first")
    ends = [spool.bytes]
    for payload in payloads:
        spool.append(payload)
        ends.append(spool.bytes)
    spool.retire(keep=True)
    whole = path.read_bytes()
    assert [*frames(path)] == [b"first", *payloads]
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert [*frames(path)] == [b"first", *payloads][: sum(end <= cut for end in ends)]


@pytest.mark.parametrize("tail", [b"\0" * 4096, HEAD.pack(4_000_000_000, 1) + b"x", HEAD.pack(3, 0) + b"abc", b"\x05"])
def test_what_a_crash_of_the_machine_leaves_behind_is_no_frame(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.spool"
    Spool(path, b"first").retire(keep=True)
    path.write_bytes(path.read_bytes() + tail)
    assert [*frames(path)] == [b"first"]
    assert [*frames(tmp_path / "none")] == []


def test_a_file_stays_until_what_waits_in_it_is_committed_and_nothing_more_is_appended(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool", b"first")
    spool.append(b"one", waits=True)
    spool.append(b"two", waits=True)
    spool.append(b"sent")
    spool.committed(1)
    spool.retire()
    assert spool.path.exists()
    spool.committed(1)
    assert not spool.path.exists()

    spool = Spool(tmp_path / "b.spool", b"first")
    spool.retire()
    assert not spool.path.exists()
    taken = os.open(tmp_path / "another", os.O_CREAT | os.O_RDWR)  # has the number that the spool's file had
    with pytest.raises(OSError):
        spool.append(b"late")
    os.close(taken)
    assert (tmp_path / "another").read_bytes() == b""


def test_a_disk_that_takes_half_a_frame_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "a.spool", b"first")
    spool.append(b"whole", waits=True)
    write = os.write
    monkeypatch.setattr(module.os, "write", lambda file, frame: write(file, frame[: len(frame) // 2]))
    with pytest.raises(OSError, match="could be written"):
        spool.append(b"half of this", waits=True)
    with pytest.raises(OSError):
        Spool(tmp_path / "b.spool", b"first")
    assert not (tmp_path / "b.spool").exists(), "a file without its first frame tells nothing"
    monkeypatch.undo()
    assert [*frames(spool.path)] == [b"first", b"whole"]
    spool.retire()
    assert spool.path.exists()
    spool.committed(1)
    assert not spool.path.exists(), "what was not written does not wait"


def test_two_spools_never_share_a_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool", b"first")
    with pytest.raises(FileExistsError):
        Spool(tmp_path / "a.spool", b"first")
    spool.retire()


def test_appending_and_committing_from_two_threads_loses_no_count(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool", b"first")
    written = threading.Semaphore(0)

    def commit() -> None:
        for _ in range(2000):
            written.acquire()
            spool.committed(1)

    thread = threading.Thread(target=commit)
    thread.start()
    for _ in range(2000):
        spool.append(b"x", waits=True)
        written.release()
    thread.join()
    assert len([*frames(spool.path)]) == 2001
    spool.retire()
    assert not spool.path.exists()


def test_who_lives_is_known_by_a_lock_that_goes_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "owners" / "one"
    assert not lives(path)
    alive = Alive(path)
    assert [lives(path), lives(path)] == [True, True]
    alive.end()
    assert not lives(path)
    assert [*path.parent.iterdir()] == []

    script = (
        "import sys, time; from pathlib import Path; from factory.spool import Alive\n"
        "alive = Alive(Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert lives(path)
        process.kill()
    assert path.exists()
    assert not lives(path)


def test_two_who_look_at_once_do_not_take_each_other_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not lives(path)


def test_a_spool_that_is_written_to_is_known_to_live(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a.spool", b"first")
    assert lives(spool.path)
    spool.retire(keep=True)
    assert spool.path.exists()
    assert not lives(spool.path)


def test_this_start_of_the_machine_has_a_name() -> None:
    assert boot() == boot()
    assert len(boot()) == 36 or sys.platform != "linux"
