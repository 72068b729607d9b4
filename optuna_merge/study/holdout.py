"""The holdout: what the best merges and the baselines score on documents that the search never saw.

The best of many noisy trials looks better than it is; only here is it compared fairly, document by document with
the same documents for everyone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.evaluation.results import Score
from optuna_merge.storage import attributes
from optuna_merge.storage.outages import reason
from optuna_merge.storage.trials import best_merges
from optuna_merge.study.holdout_file import HOLDOUT_FILE, N_BEST, HoldoutRow, TaskFigure
from optuna_merge.study.objective import MergeObjective


@dataclass(frozen=True)
class _Entry:
    trial: FrozenTrial
    score: Score


def score_holdout(
    study: optuna.Study,
    objective: MergeObjective,
    note: Callable[[str], None] = lambda _: None,
    n_best: int = N_BEST,
) -> list[HoldoutRow]:
    """Score the best merges and every finished baseline on the holdout, and write the figures down.

    What was scored before is read back; only new merges cost anything.

    Args:
        study: The study.
        objective: Its objective; its resident model is overwritten.
        note: Is told what is being scored.
        n_best: How many of the best merges.

    Returns:
        The best merges first, then the baselines in order; empty without a holdout or without a merge.

    Raises:
        StudyError: If the figures cannot be written.
    """
    merges = best_merges(study, n_best)
    if not merges or not objective.scorer.has_holdout:
        return []
    best = merges[0]
    baselines = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if attributes.BASELINE in trial.user_attrs and trial.number != best.number
    ]
    entries = [_Entry(trial, _score(trial, objective, note)) for trial in [*merges, *baselines]]
    rows = [_row(entry, entries[0], objective) for entry in entries]
    _write(
        objective.config.storage_path / HOLDOUT_FILE,
        json.dumps(
            {
                "study": study.study_name,
                "best_trial": best.number,
                "recipe": best.user_attrs.get(attributes.RECIPE_DIGEST),
                "rows": [asdict(row) for row in rows],
            },
            indent=1,
        ),
    )
    return rows


def _score(trial: FrozenTrial, objective: MergeObjective, note: Callable[[str], None]) -> Score:
    recipe = objective.recipe(trial)
    key = objective.models.identify(recipe) + objective.scorer.fingerprint()
    cache = objective.config.storage_path / "holdout" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if cache.exists():
        return Score.from_json(cache.read_text(encoding="utf-8"))
    what = trial.user_attrs.get(attributes.BASELINE, "one of the best merges")
    note(f"scoring trial {trial.number} ({what}) on the holdout")
    objective.load(recipe)
    score = objective.scorer.score_holdout(stderr=True)
    _write(cache, score.to_json())
    return score


def _row(entry: _Entry, best: _Entry, objective: MergeObjective) -> HoldoutRow:
    difference, stderr = objective.scorer.paired_difference(best.score, entry.score)
    return HoldoutRow(
        trial=entry.trial.number,
        value=entry.score.value,
        tasks={
            name: TaskFigure(task.metric, task.value, task.stderr, task.n_documents)
            for name, task in entry.score.tasks.items()
        },
        difference=difference,
        difference_stderr=stderr,
        p_value=two_sided_p(difference, stderr),
    )


def two_sided_p(difference: float, stderr: float) -> float:
    """Of the z test that a difference is 0.

    Args:
        difference: Finite.
        stderr: Its standard error, at least 0; infinite where it is unknown.

    Returns:
        In [0, 1]; 1 if the difference is 0.
    """
    if difference == 0:
        return 1.0
    return math.erfc(abs(difference) / stderr / math.sqrt(2)) if stderr > 0 else 0.0


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as exc:
        raise StudyError(f"{path}: holdout scores must be writable, got {reason(exc)}; make room") from exc
