"""The scores of single documents, in files beside the storage.

Knows lines of text and where they go; what a line says is the caller's affair.
"""

from __future__ import annotations

import os
from pathlib import Path

from optuna_merge.errors import StudyError
from optuna_merge.storage.outages import reason


class DocumentScores:
    """The documents' scores of each trial: one file for each trial, one line for each chunk.

    A trial that is resumed reads back what it has scored. These values do not go to Optuna's storage: with 1,000 of
    them in each trial, a dashboard takes 8 s to answer.

    Args:
        folder: Where the files are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, trial_number: int) -> Path:
        """The file of a trial."""
        return self._folder / f"trial_{trial_number:05d}.jsonl"

    def begin(self, trial_number: int, digest: str, n_reported: int) -> list[str]:
        """Start or resume the file of a trial: keep the lines of reported chunks, and drop all others.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe; lines of another recipe are dropped.
            n_reported: Chunks whose value the storage has.

        Returns:
            The lines that the file held, if any chunk was reported: first those that were kept, then those of chunks
            that were scored but not reported.

        Raises:
            StudyError: If the file cannot be written.
        """
        path = self.path(trial_number)
        there: list[str] = []
        try:
            if n_reported and path.exists():
                # A torn last line is dropped; it may end within a character.
                first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
                there = lines if first == digest else []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in [digest, *there[:n_reported]]), encoding="utf-8")
        except OSError as exc:
            raise _not_writable(path, exc) from exc
        return there

    def append(self, trial_number: int, line: str) -> None:
        """Write one chunk's line. It survives the end of this process, and after :meth:`end` also that of the machine.

        Raises:
            StudyError: If it cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as exc:
            raise _not_writable(path, exc) from exc

    def end(self, trial_number: int) -> None:
        """Sync the lines of a trial to disk.

        Raises:
            StudyError: If they cannot be written.
        """
        path = self.path(trial_number)
        try:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as exc:
            raise _not_writable(path, exc) from exc


def _not_writable(path: Path, exc: OSError) -> StudyError:
    return StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again")
