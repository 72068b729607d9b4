"""The scores of single documents, in files beside the storage.

Knows lines of text, where they go, and who may add to them; what a line says is the caller's affair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import StudyError, TrialTakenError
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

    def read(self, trial_number: int, digest: str) -> list[str]:
        """The lines in the file of a trial, in the order in which they were written; a torn last line is left out.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe; lines of another recipe are left out.

        Raises:
            StudyError: If the file cannot be read.
        """
        path = self.path(trial_number)
        try:
            # A torn line may end within a character.
            first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise _not_writable(path, exc) from exc
        return lines if first == digest else []

    def begin(self, trial_number: int, digest: str, lines: Iterable[str] = ()) -> TrialDocuments:
        """Start the file of a trial, in place of one that is there. A kill leaves the old file or the new one.

        Args:
            trial_number: Number of the trial.
            digest: Digest of its recipe.
            lines: What the file holds to begin with.

        Returns:
            The file, to add lines to.

        Raises:
            StudyError: If the file cannot be written.
        """
        path, kept = self.path(trial_number), [*lines]
        try:
            write_atomically(path, "".join(f"{line}\n" for line in [digest, *kept]), sync=bool(kept))
            return TrialDocuments(trial_number, path)
        except OSError as exc:
            raise _not_writable(path, exc) from exc


class TrialDocuments:
    """The file of a trial that this process runs. Used as a context, it closes the file.

    When another process begins the trial, it puts a new file in the place of this one. From then on nothing can be
    added here: this process has lost the trial.
    """

    def __init__(self, trial_number: int, path: Path) -> None:
        self._trial_number = trial_number
        self._path = path
        self._file = path.open("ab", buffering=0)  # no part of a line is written later

    def __enter__(self) -> TrialDocuments:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: str) -> None:
        """Write one chunk's line. It survives the end of this process, and after :meth:`sync` also that of the machine.

        Raises:
            StudyError: If it cannot be written.
            TrialTakenError: If another process has begun the trial.
        """
        try:
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                raise TrialTakenError(
                    f"{self._path}: trial {self._trial_number} must be run by one process, another one has begun it"
                )
            left = f"{line}\n".encode()
            while left:
                left = left[self._file.write(left) :]
        except OSError as exc:
            raise _not_writable(self._path, exc) from exc

    def sync(self) -> None:
        """Sync the lines to disk.

        Raises:
            StudyError: If they cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as exc:
            raise _not_writable(self._path, exc) from exc


def _not_writable(path: Path, exc: OSError) -> StudyError:
    return StudyError(f"{path}: scores must be writable, got {reason(exc)}; make room and run again")
