"""A study's folder, ``storage_path``: whose it is, where its files lie, and the best merge so far.

Knows file names; knows neither how trials run nor how a merge is scored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import StudyError, first_line
from optuna_merge.storage.outages import reason
from optuna_merge.storage.trials import best_merge, score_of

if TYPE_CHECKING:
    import optuna

    from optuna_merge.study.objective import MergeObjective

BEST_CONFIG = "best_config.yaml"
"""The best merge so far, as a mergekit file."""

OWNER_FILE = "study.json"
"""Names the study whose best merge the folder holds."""


def documents_folder(storage_path: Path, study_name: str) -> Path:
    """Where the scores of single documents lie, one file for each trial."""
    return storage_path / "documents" / study_name


def write_best_config(study: optuna.Study, objective: MergeObjective) -> Path | None:
    """Write the best merge so far as a mergekit file, atomically.

    Returns:
        The file; None if no merge has been scored yet.

    Raises:
        StudyError: If the file cannot be written, or belongs to another study; a file that is there stays as it was.
    """
    folder = objective.config.storage_path
    path = folder / BEST_CONFIG
    owner = _owner(folder, study.study_name)
    if owner not in (None, study.study_name):
        raise StudyError(
            f"{path}: must be of study {study.study_name!r}, got that of study {owner!r}; choose another storage_path"
        )
    best = best_merge(study)
    if best is None:
        return None
    comment = [f"study {study.study_name}, trial {best.number}, score {score_of(best):.6g}"]
    try:
        if not (folder / OWNER_FILE).exists():
            write_atomically(folder / OWNER_FILE, json.dumps({"study": study.study_name}) + "\n")
        write_atomically(path, objective.merge_file(best, comment))
    except OSError as exc:
        raise StudyError(
            f"{path}: best merge must be writable, got {reason(exc)}; make room and run the same command again"
        ) from exc
    return path


def _owner(folder: Path, study_name: str) -> str | None:
    """The study whose best merge a folder holds; None if it holds none yet.

    A folder from before ``study.json`` was introduced belongs to ``study_name`` if that study has scored documents
    there, else to the study that has.
    """
    path = folder / OWNER_FILE
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["study"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StudyError(f"{path}: must name the study of its folder, got {first_line(exc)}; delete it") from exc
    if not (folder / BEST_CONFIG).exists():
        return None
    if documents_folder(folder, study_name).is_dir():
        return study_name
    others = sorted(other.name for other in (folder / "documents").glob("*") if other.is_dir())
    return next(iter(others), None)
