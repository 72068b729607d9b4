"""The file ``holdout.json``: what the best merges and the baselines scored on the held-out documents.

Knows the file and its rows; does not score (``holdout.py`` does).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import StudyError
from optuna_merge.evaluation.results import Answers
from optuna_merge.storage import attributes
from optuna_merge.storage.outages import reason
from optuna_merge.storage.trials import best_merges

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

__all__ = [
    "HOLDOUT_FILE",
    "N_BEST",
    "Answers",
    "HoldoutRow",
    "TaskFigure",
    "needs_holdout",
    "read_holdout",
    "write_holdout",
    "write_scores",
]

HOLDOUT_FILE = "holdout.json"
_TEST = "permutation"
"""What gives the p-values. Rows with p-values of another test are made again, from the scores that are kept."""
N_BEST = 5
"""How many of the best merges a report scores on the holdout; the searched documents rank them."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one model on one task.

    ``stderr`` is None where lm-eval estimates none, ``answers`` where nothing is generated.
    """

    metric: str
    value: float
    stderr: float | None
    n_documents: int
    answers: Answers | None = None


@dataclass(frozen=True)
class HoldoutRow:
    """One trial on the holdout.

    Attributes:
        trial: Its number.
        value: Sum of weight x metric.
        tasks: Eval task to its figure.
        difference: The best merge's value minus this one's.
        difference_stderr: Standard error of the difference, paired by document.
        p_value: Two-sided, of the permutation test of ``evaluation/difference.py``, which pairs documents.
    """

    trial: int
    value: float
    tasks: dict[str, TaskFigure]
    difference: float
    difference_stderr: float
    p_value: float


@dataclass(frozen=True)
class _Holdout:
    """The content of the file: its rows, the best merge that their differences are from, and what tested these."""

    study: str
    best_trial: int
    recipe: str | None
    rows: list[HoldoutRow]
    test: str = "z"  # of a version that did not name it


_HOLDOUT = TypeAdapter(_Holdout)


def needs_holdout(study: optuna.Study, storage_path: Path, n_best: int, max_gen_toks: int | None = None) -> bool:
    """Whether one of the best merges has no row in the file yet; see :func:`read_holdout`."""
    best = best_merges(study, n_best)
    scored = read_holdout(storage_path, study, next(iter(best), None), max_gen_toks)
    return any(trial.number not in scored for trial in best)


def read_holdout(
    storage_path: Path, study: optuna.Study, best: FrozenTrial | None, max_gen_toks: int | None = None
) -> dict[int, HoldoutRow]:
    """Trial number to its row; empty if there is no file, or if it was made for another best merge or by a z test.

    Args:
        storage_path: The study's folder.
        study: The study.
        best: Its best merge.
        max_gen_toks: Tokens that answers could have at most; None: as many as each task allows.

    Raises:
        StudyError: If the file cannot be read.
    """
    path = _path(storage_path, max_gen_toks)
    if best is None or not path.exists():
        return {}
    try:
        found = _HOLDOUT.validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as exc:
        problem = exc.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise _unreadable(path, f"{where}: {problem['msg']}") from exc
    except (OSError, ValueError) as exc:
        raise _unreadable(path, reason(exc)) from exc
    made_for = (found.study, found.best_trial, found.recipe, found.test)
    if made_for != (study.study_name, best.number, best.user_attrs.get(attributes.RECIPE_DIGEST), _TEST):
        return {}  # another study may have written there, even one of the same name
    return {row.trial: row for row in found.rows}


def write_holdout(
    storage_path: Path,
    study: optuna.Study,
    best: FrozenTrial,
    rows: list[HoldoutRow],
    max_gen_toks: int | None = None,
) -> None:
    """Write the rows, whose differences are from ``best``; for ``max_gen_toks`` see :func:`read_holdout`.

    Raises:
        StudyError: If the file cannot be written.
    """
    content = _Holdout(study.study_name, best.number, best.user_attrs.get(attributes.RECIPE_DIGEST), rows, _TEST)
    write_scores(_path(storage_path, max_gen_toks), json.dumps(asdict(content), indent=1))


def write_scores(path: Path, text: str) -> None:
    """Write a file of holdout scores atomically.

    Raises:
        StudyError: If it cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as exc:
        raise StudyError(f"{path}: holdout scores must be writable, got {reason(exc)}; make room") from exc


def _path(storage_path: Path, max_gen_toks: int | None) -> Path:
    """The file; each other length of answers has one of its own."""
    return storage_path / (HOLDOUT_FILE if max_gen_toks is None else f"holdout_{max_gen_toks}_tokens.json")


def _unreadable(path: Path, found: str) -> StudyError:
    return StudyError(f"{path}: must hold the holdout's figures, got {found}; delete it: report writes it")
