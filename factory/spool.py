"""Append-only files of what has happened and is not yet committed: a `write()` survives `kill -9`, where a transaction does not.

A frame is its length, the CRC-32 of its bytes (both little-endian, four bytes), and the bytes. A file that a dying process
left behind ends at its first frame that is not whole. A crash of the machine may leave zeros at its end, which are no frame.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

HEAD = struct.Struct("<II")


class Spool:
    """One file being written, begun with a first frame; its methods may be called from different threads.

    It is locked for as long as it is written to, as the file of an `Alive` is.
    """

    def __init__(self, path: Path, first: bytes) -> None:
        self.path, self.bytes = path, 0
        self._lock = threading.Lock()
        self._waiting = 0
        self._retired = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.append(first)
        except BaseException:
            self.retire()
            raise

    def append(self, payload: bytes, *, waits: bool = False) -> None:
        """Put one frame behind the others. `waits`: the file stays until it is committed.

        OSError where the disk does not take it whole; then nothing more may be appended, as it might stand behind half a frame.
        """
        frame = HEAD.pack(len(payload), zlib.crc32(payload)) + payload
        with self._lock:
            written = os.write(self._file, frame)
            if written != len(frame):
                raise OSError(errno.ENOSPC, f"{written} of {len(frame)} bytes could be written")
            self.bytes += written
            self._waiting += waits

    def committed(self, frames: int) -> None:
        """So many of the frames that waited are in the database now."""
        with self._lock:
            self._waiting -= frames
            self._remove_if_done()

    def retire(self, *, keep: bool = False) -> None:
        """Nothing more is appended; the file goes once nothing in it waits to be committed. `keep`: it stays, to be replayed."""
        with self._lock:
            os.close(self._file)
            self._file = -1  # a late append fails, where the number might be another file's by then
            self._retired = not keep
            self._remove_if_done()

    def _remove_if_done(self) -> None:
        if self._retired and not self._waiting:
            with suppress(OSError):  # replayed once more, it changes nothing
                self.path.unlink()


def frames(path: Path) -> Iterator[bytes]:
    """The whole frames of a file, oldest first."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            length, crc = HEAD.unpack(head)
            payload = file.read(length)
            if not length or len(payload) < length or zlib.crc32(payload) != crc:
                return
            yield payload


class Alive:
    """A file that says, by a lock on it, that the process which made it lives; the lock goes with the process, however it ends.

    A child by `fork` holds the lock as well.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")  # under its name it is never seen without its lock
        self._file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.rename(path)
        except BaseException:
            os.close(self._file)
            raise

    def end(self) -> None:
        """Give the lock back and remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def lives(path: Path) -> bool:
    """Whether the process that made this file (an `Alive`'s or a `Spool`'s) still holds it; one that is gone has ended in order."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two who look do not take each other for the owner
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def boot() -> str:
    """What tells this start of the machine from others (what was written but not synced is gone after a crash of it); "": unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
