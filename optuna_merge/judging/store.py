"""Every reply of the judge, in an SQLite file beside the study: nothing is asked twice, and the cost is known.

Knows digests of questions, scores and tokens. It does not know what is asked nor how.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from optuna_merge.errors import JudgeError, StudyError

JUDGEMENTS_FILE = "judgements.sqlite"

_LOCK_SUFFIX = ".lock"
_N_PLACES = 2**62
"""Bytes of the lock file that stand for questions; it stays empty, since what is not there can be locked, too."""

_BUSY_S = 60
"""How long to wait for another process that writes."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
"""Between two looks at whether another process still asks a question."""

_KEYS_AT_ONCE = 500
"""SQLite's older versions take at most 999 values in one statement."""

_TABLE = """
    CREATE TABLE IF NOT EXISTS replies (
        key TEXT NOT NULL, number INTEGER NOT NULL, score REAL, n_in INTEGER NOT NULL, n_out INTEGER NOT NULL,
        reply TEXT NOT NULL
    );
    CREATE INDEX IF NOT EXISTS replies_by_key ON replies (key);
"""


@dataclass(frozen=True)
class JudgeCost:
    """What a study has asked its judge.

    Attributes:
        n_replies: Replies, those without a score included.
        n_in, n_out: Tokens of all questions and of all replies, as far as the judge counts them.
    """

    n_replies: int
    n_in: int
    n_out: int


class Judgements:
    """The replies in one file, which several threads and processes may share.

    Args:
        path: The file; made with the first reply.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._locks: int | None = None
        self._opening = threading.Lock()

    def scores(self, keys: Iterable[str]) -> dict[tuple[str, int], float]:
        """The scores that are known: digest of a question and number of the judgement, to the first score for it.

        Raises:
            StudyError: If the file cannot be read.
        """
        found: dict[tuple[str, int], float] = {}
        wanted = list(keys)
        if not self._path.exists():
            return found
        with self._opened() as connection:
            for start in range(0, len(wanted), _KEYS_AT_ONCE):
                part = wanted[start : start + _KEYS_AT_ONCE]
                rows = connection.execute(
                    "SELECT key, number, score FROM replies WHERE score IS NOT NULL"
                    f" AND key IN ({', '.join('?' * len(part))}) ORDER BY rowid",
                    part,
                )
                for key, number, score in rows:
                    found.setdefault((key, number), score)
        return found

    def add(self, key: str, number: int, score: float | None, *, n_in: int, n_out: int, reply: str) -> None:
        """Keep a reply; it survives the end of this process and of the machine.

        Args:
            key: Digest of the question.
            number: Which of the judgements of this question it is.
            score: Its score; None if it has none.
            n_in: Tokens of the question.
            n_out: Tokens of the reply.
            reply: Its text.

        Raises:
            StudyError: If it cannot be written.
        """
        with self._opened() as connection:
            connection.execute(
                "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?)", (key, number, score, n_in, n_out, reply)
            )

    @contextmanager
    def alone(self, key: str, number: int, stopped: threading.Event) -> Iterator[None]:
        """Wait until no other process asks a question, and keep all others from asking it.

        The kernel ends this when the process dies. Threads of one process must not ask the same question.

        Args:
            key: Digest of the question.
            number: Which of its judgements it is.
            stopped: Ends the waiting once it is set.

        Raises:
            StudyError: If the file of locks cannot be used.
            JudgeError: If the waiting is ended.
        """
        place = int.from_bytes(hashlib.sha256(f"{key} {number}".encode()).digest()[:8], "big") % _N_PLACES
        pause = _FIRST_PAUSE_S
        while not self._lock(place):
            if stopped.wait(pause):
                raise JudgeError(
                    "judgements: another process must finish its question, got none finished; run it again"
                )
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        try:
            yield
        finally:
            fcntl.lockf(self._lock_file(), fcntl.LOCK_UN, 1, place)

    def cost(self) -> JudgeCost | None:
        """What all replies cost; None before the first.

        Raises:
            StudyError: If the file cannot be read.
        """
        if not self._path.exists():
            return None
        with self._opened() as connection:
            row = connection.execute("SELECT COUNT(*), SUM(n_in), SUM(n_out) FROM replies").fetchone()
        return JudgeCost(*(value or 0 for value in row))

    def _lock(self, place: int) -> bool:
        try:
            fcntl.lockf(self._lock_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise StudyError(f"{self._path}{_LOCK_SUFFIX}: must be lockable, got {exc}; use another disk") from exc
        return True

    def _lock_file(self) -> int:
        """Descriptor of the file of locks; it stays open: closing it once would end all locks of this process."""
        with self._opening:
            if self._locks is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._locks = os.open(f"{self._path}{_LOCK_SUFFIX}", os.O_RDWR | os.O_CREAT, 0o666)
            return self._locks

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S)) as connection, connection:
                connection.executescript(_TABLE)
                yield connection
        except (sqlite3.Error, OSError) as exc:
            raise StudyError(f"{self._path}: judgements must be readable and writable, got {exc}; make room") from exc
