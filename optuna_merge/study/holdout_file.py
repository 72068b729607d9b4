"""The file that holds the scores on held-out documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from optuna_merge.errors import StudyError
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merges

HOLDOUT_FILE = "holdout.json"
N_BEST = 5
"""Merges that a report scores on the holdout, best first on the searched documents."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one model on one task; ``stderr`` is None where lm-eval estimates none."""

    metric: str
    value: float
    stderr: float | None
    n_documents: int


@dataclass(frozen=True)
class HoldoutRow:
    """One trial on the holdout.

    Attributes:
        trial: Its number.
        value: Sum of weight x metric.
        tasks: Eval task to its figure.
        difference: The best merge's value minus this one's.
        difference_stderr: Its standard error, paired by document.
        p_value: Of a difference at least as large in either direction if there were none (paired z test).
    """

    trial: int
    value: float
    tasks: dict[str, TaskFigure]
    difference: float
    difference_stderr: float
    p_value: float


def needs_holdout(study: optuna.Study, storage_path: Path, n_best: int) -> bool:
    """Whether the figures on the holdout of one of the best merges are not there yet."""
    best = best_merges(study, n_best)
    scored = _read_holdout(storage_path / HOLDOUT_FILE, study, next(iter(best), None))
    return any(trial.number not in scored for trial in best)


def _read_holdout(file: Path, study: optuna.Study, best: FrozenTrial | None) -> dict[int, HoldoutRow]:
    """The rows by trial number; empty if there are none, or if they were made for another best merge."""
    if best is None or not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        made_for = (data["study"], data["best_trial"], data["recipe"])
        if made_for != (study.study_name, best.number, best.user_attrs.get(attributes.RECIPE_DIGEST)):
            return {}  # another study may have written there, even one of that name
        rows = [
            HoldoutRow(**{**row, "tasks": {name: TaskFigure(**task) for name, task in row["tasks"].items()}})
            for row in data["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StudyError(f"{file}: must hold the holdout's figures, got {exc!r}; delete it: report writes it") from exc
    return {row.trial: row for row in rows}
