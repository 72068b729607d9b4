"""Optuna's journal file, made safe against writers that are killed.

A killed writer leaves two things behind. Its lock, for which Optuna's other writers wait 30 s: here the lock is known
to be stale as soon as its holder is dead. And half a line, to which the next writer would append: here it is cut off.
This file knows the file and its lock, not what the lines mean.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from optuna_merge.internals.optuna import SymlinkLock


class WholeLinesBackend(JournalFileBackend):
    """A journal file that ends with a whole line before a line is appended.

    Args:
        file: The journal; made if it is missing.

    Attributes:
        lock: The lock that writers hold.

    Raises:
        ValueError: If the file ends with something that is not a line of a journal.
        OSError: If it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.lock = MortalLock(file)
        super().__init__(str(file), self.lock)
        if _torn_line(file):
            with self.lock.held():  # another process may be writing the line
                self._cut()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append some lines in one write, and sync them to disk."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self.lock.held():
            self._cut()
            with self._file.open("ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())

    def _cut(self) -> None:
        torn = _torn_line(self._file)
        if torn and not torn.startswith(b"{"):
            raise ValueError(f"{torn[:40]!r} in its last line")
        if torn:
            os.truncate(self._file, self._file.stat().st_size - len(torn))


class MortalLock(SymlinkLock):
    """Optuna's own lock, a symbolic link, that is known to be stale as soon as its holder is dead.

    Optuna's processes respect the link. Ours point it to a ``.writer`` file and hold a kernel lock on that file. The
    kernel lock ends with its process, so whoever gets it may remove a link to that file.

    Args:
        file: The journal.
    """

    def __init__(self, file: Path) -> None:
        self._writer = Path(f"{file}.writer")
        super().__init__(file, self._writer)
        self._held: list[int] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> bool:
        """Take the lock; waits for it."""
        handle = os.open(self._writer, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(OSError):
                if self.link.readlink() == self._writer:
                    self.link.unlink()
            super().acquire()
        except BaseException:
            os.close(handle)
            raise
        self._held.append(handle)
        return True

    def release(self) -> None:
        """Give the lock back."""
        try:
            super().release()
        finally:
            if self._held:  # empty when Optuna's acquire breaks the lock of a process that hangs
                os.close(self._held.pop())


def _torn_line(file: Path) -> bytes:
    """What follows the last newline of a file."""
    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size == 0:
            return b""
        handle.seek(size - 1)
        if handle.read() == b"\n":
            return b""
    return file.read_bytes().rpartition(b"\n")[2]
