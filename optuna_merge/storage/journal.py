"""Optuna's journal file, made to outlive writers that are killed at any moment.

A writer that is killed leaves its lock, for which all others would wait half a minute, or half a line, to which the
next one would be glued. Here the lock's holder is known to be dead as soon as it is, and half a line is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file


class WholeLinesBackend(JournalFileBackend):
    """A journal file, which always ends with a whole line before one is added.

    Args:
        file: The journal; made if it is missing.

    Raises:
        ValueError: If it ends with something that is no journal's line.
        OSError: If it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        super().__init__(str(file), _MortalLock(file))
        if _torn_line(file):
            with get_lock_file(self._lock):  # its writer may be at it
                self._cut()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write some lines, together, and see them on disk."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with get_lock_file(self._lock):
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


class _MortalLock(JournalFileSymlinkLock):
    """Optuna's own lock, a symbolic link, which others respect; ours are known to be stale as soon as they are.

    Who makes our link holds a kernel lock on the file that it points to. That ends with its process.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(str(file))
        self._lock_target_file = f"{file}.writer"  # exists: waiting processes of others look at its age
        self._held: list[int] = []

    def acquire(self) -> bool:
        handle = os.open(self._lock_target_file, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with suppress(OSError):
                if str(Path(self._lock_file).readlink()) == self._lock_target_file:
                    Path(self._lock_file).unlink()
            super().acquire()
        except BaseException:
            os.close(handle)
            raise
        self._held.append(handle)
        return True

    def release(self) -> None:
        try:
            super().release()
        finally:
            if self._held:  # not while Optuna's acquire takes the link of a process that hangs
                os.close(self._held.pop())


def _torn_line(file: Path) -> bytes:
    with file.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        if size == 0:
            return b""
        handle.seek(size - 1)
        if handle.read() == b"\n":
            return b""
    return file.read_bytes().rpartition(b"\n")[2]
