"""Questions about a study's trials."""

from __future__ import annotations

import math

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.storage import attributes

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def generation(trial: FrozenTrial) -> int | None:
    """The generation in which CMA-ES drew a trial, from 0 on; None if it did not."""
    found: int | None = next((value for key, value in trial.system_attrs.items() if key.endswith(":generation")), None)
    return found


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's score: its value, or the sum of its values where there are several objectives; None without any."""
    return None if trial.values is None else math.fsum(trial.values)


def n_finished(study: optuna.Study) -> int:
    """Trials that count towards ``n_trials``: complete, pruned or failed."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def best_merge(study: optuna.Study) -> FrozenTrial | None:
    """The best trial that is a merge and was scored on every document; a source as it stands is none."""
    return next(iter(best_merges(study, 1)), None)


def best_merges(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """The best merge, which may be a uniform one, and the next best trials that the search drew.

    With several objectives the best has their largest sum, and the next are those on the front before all others.

    Args:
        study: The study.
        n: How many at most.
    """
    merges = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get(attributes.BASELINE_KIND) not in ("source", "base")
    ]
    merges.sort(key=lambda trial: (_score_or_worst(trial), -trial.number), reverse=True)
    front = {trial.number for trial in front_of(study)}
    drawn = [trial for trial in merges[1:] if attributes.BASELINE not in trial.user_attrs]
    drawn.sort(key=lambda trial: trial.number not in front)
    return merges[:1] + drawn[: n - 1]


def _score_or_worst(trial: FrozenTrial) -> float:
    score = score_of(trial)
    return -math.inf if score is None else score


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials that no other beats in every objective; empty if there is one objective only."""
    return study.best_trials if len(study.directions) > 1 else []
