"""A study's folder, ``storage_path``: whose it is, where its files lie, and the best merge so far.

Knows file names; knows neither how trials run nor how a merge is scored.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.storages import InMemoryStorage
from pydantic import TypeAdapter, ValidationError

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import StudyError, first_line
from optuna_merge.internals.optuna import backend_of, storage_of
from optuna_merge.storage import attributes
from optuna_merge.storage.lock import file_lock
from optuna_merge.storage.outages import reason
from optuna_merge.storage.owner import Owner
from optuna_merge.storage.trials import best_merge, score_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import optuna
    from optuna.trial import FrozenTrial

BEST_CONFIG = "best_config.yaml"
"""The best merge so far, as a mergekit file."""

OWNER_FILE = "study.json"
"""Names the study that the folder belongs to."""
_WAY_OUT = "choose another storage_path"


@dataclass(frozen=True)
class _Record:
    """The content of ``study.json``.

    Attributes:
        study: Name of the study.
        id: Its id; None in a folder of a version without ids.
        process: The process of a study in memory; None of a study that outlives its process.
    """

    study: str
    id: str | None = None
    process: Owner | None = None

    def is_of(self, study_name: str, study_id: str | None) -> bool:
        """Whether this is the study of that name and id; None: it has none yet."""
        return self.study == study_name if self.id is None else self.id == study_id

    @property
    def is_over(self) -> bool:
        """Whether the study can certainly not be resumed: it was in memory, and its process has gone or left it."""
        return self.process is not None and self.process.is_gone


_RECORD = TypeAdapter(_Record)


def documents_folder(storage_path: Path, study_name: str) -> Path:
    """Where the scores of single documents lie, one file for each trial."""
    return storage_path / "documents" / study_name


def check_folder(study_name: str, folder: Path) -> None:
    """Refuse the folder of another study before a new one is created in its storage, where it would stay behind.

    Args:
        study_name: Name of a study that is not in the storage yet.
        folder: Its ``storage_path``; may be missing.

    Raises:
        StudyError: If the folder belongs to a study of another name.
    """
    found = _read(folder, study_name)
    if found is not None and not found.is_over and found.study != study_name:
        raise _refusal(found, study_name, folder, _WAY_OUT)


def claim_folder(study: optuna.Study, folder: Path, way_out: str = _WAY_OUT) -> None:
    """Make a folder the study's own, or refuse it. To be called before anything of the study is written there.

    A study has a random id among its attributes, and its folder has the same id in ``study.json``; both are made here.
    Where an earlier version has left no id, names are compared. The folder of a study in memory is free for another
    study when nobody can resume the former: its process has ended, or begins the other one.

    Args:
        study: The study.
        folder: Its ``storage_path``; made if it is missing.
        way_out: What the user can do if the folder is refused.

    Raises:
        StudyError: If the folder belongs to another study, or cannot be written.
    """
    path = folder / OWNER_FILE
    with file_lock(path.with_name(f"{OWNER_FILE}.lock")):
        found, own_id = _read(folder, study.study_name), study.user_attrs.get(attributes.STUDY_ID)
        if found is not None and not found.is_over and not found.is_of(study.study_name, own_id):
            raise _refusal(found, study.study_name, folder, way_out)
        if own_id is None:
            own_id = uuid.uuid4().hex
            study.set_user_attr(attributes.STUDY_ID, own_id)
        in_memory = isinstance(backend_of(storage_of(study)), InMemoryStorage)
        record = _Record(study.study_name, own_id, Owner.me() if in_memory else None)
        if record == found:
            return
        content = {key: value for key, value in asdict(record).items() if value is not None}
        try:
            write_atomically(path, json.dumps(content) + "\n")
        except OSError as exc:
            raise StudyError(f"{path}: must be writable, got {reason(exc)}; make room and run again") from exc


def _refusal(found: _Record, study_name: str, folder: Path, way_out: str) -> StudyError:
    got = f"study {found.study!r}" if found.study != study_name else "another study of that name"
    return StudyError(f"{folder}: must be of study {study_name!r}, got that of {got}; {way_out}")


def write_best_config(
    study: optuna.Study, folder: Path, merge_file: Callable[[FrozenTrial, Sequence[str]], str]
) -> Path | None:
    """Write the best merge so far as a mergekit file, atomically.

    Args:
        study: A study that has claimed the folder.
        folder: Its ``storage_path``.
        merge_file: Returns the mergekit file of a trial, with the given lines above it.

    Returns:
        The file; None if no merge has been scored yet.

    Raises:
        StudyError: If the file cannot be written; a file that is there stays as it was.
    """
    path = folder / BEST_CONFIG
    best = best_merge(study)
    if best is None:
        return None
    comment = [f"study {study.study_name}, trial {best.number}, score {score_of(best):.6g}"]
    try:
        write_atomically(path, merge_file(best, comment))
    except OSError as exc:
        raise StudyError(
            f"{path}: best merge must be writable, got {reason(exc)}; make room and run the same command again"
        ) from exc
    return path


def _read(folder: Path, study_name: str) -> _Record | None:
    """Whose folder it is; None if it is nobody's yet.

    A folder from before ``study.json`` was introduced belongs to ``study_name`` if that study has scored documents
    there, else to the study that has.
    """
    path = folder / OWNER_FILE
    try:
        return _RECORD.validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except ValidationError as exc:
        problem = exc.errors()[0]
        got = ": ".join([*map(str, problem["loc"]), problem["msg"]])
        raise StudyError(f"{path}: must name the study of its folder, got {got}; delete it") from exc
    except (OSError, ValueError) as exc:
        raise StudyError(f"{path}: must name the study of its folder, got {first_line(exc)}; delete it") from exc
    if not (folder / BEST_CONFIG).exists():
        return None
    if documents_folder(folder, study_name).is_dir():
        return _Record(study_name)
    others = sorted(other.name for other in (folder / "documents").glob("*") if other.is_dir())
    return _Record(others[0]) if others else None
