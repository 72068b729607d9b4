"""Scores of single documents, in files beside the storage."""

from __future__ import annotations

import os
from pathlib import Path

from optuna_merge.errors import StudyError
from optuna_merge.storage.outages import reason


class DocumentScores:
    """What each chunk of a trial scored, document by document: a file for each trial, a line for each chunk.

    A trial that is taken up again reads back what it scored before. Values of single documents do not go to
    Optuna's storage: 1,000 of them a trial make a dashboard take 8 s to answer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, trial_number: int) -> Path:
        """The file of a trial."""
        return self._folder / f"trial_{trial_number:05d}.jsonl"

    def append(self, trial_number: int, line: str) -> None:
        """Write one chunk's line; it outlives this process at once, and the machine after :meth:`end`.

        Raises:
            StudyError: If it cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc

    def end(self, trial_number: int) -> None:
        """See the lines of a trial on disk.

        Raises:
            StudyError: If they cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc

    def begin(self, trial_number: int, digest: str, n_reported: int) -> list[str]:
        """Open the file of a trial for ``append``: keep the lines of the chunks that it reported.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe; lines made with another are dropped.
            n_reported: Chunks that the storage has a value of.

        Returns:
            The lines that were there, of a trial that reported any: first those that were kept, then those that were
            written and not reported.

        Raises:
            StudyError: If the file cannot be written.
        """
        path = self.path(trial_number)
        there: list[str] = []
        try:
            if n_reported and path.exists():
                # A torn last line may end within a character; it is dropped.
                first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
                there = lines if first == digest else []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in [digest, *there[:n_reported]]), encoding="utf-8")
        except OSError as exc:
            raise StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again") from exc
        return there
