"""Every reply of the judge, in an SQLite file beside the study: nothing is asked twice, and the cost is known.

Knows digests of questions, scores and tokens. It does not know what is asked nor how.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from optuna_merge.errors import StudyError

JUDGEMENTS_FILE = "judgements.sqlite"

_BUSY_S = 60
"""How long to wait for another process that writes."""

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

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=_BUSY_S)) as connection, connection:
                connection.executescript(_TABLE)
                yield connection
        except (sqlite3.Error, OSError) as exc:
            raise StudyError(f"{self._path}: judgements must be readable and writable, got {exc}; make room") from exc
