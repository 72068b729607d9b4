"""Which trials count, what their score is, and which is the best.

Knows Optuna's trials and our attributes; knows nothing of models.
"""

from __future__ import annotations

import math

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.storage import attributes

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

_GENERATIONS = ("cma:generation", "sepcma:generation", "cmawm:generation")
"""Where CMA-ES and its variants record a trial's generation. Genetic algorithms have keys of their own."""


def generation(trial: FrozenTrial) -> int | None:
    """The generation in which CMA-ES drew a trial, counted from 0; None if another way of drawing did."""
    found: int | None = next((trial.system_attrs[key] for key in _GENERATIONS if key in trial.system_attrs), None)
    return found


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's score: its value, or with several objectives the sum of its values; None if it has no value."""
    return None if trial.values is None else math.fsum(trial.values)


def score_or_worst(trial: FrozenTrial) -> float:
    """A trial's score, to compare trials by; minus infinity if it has none."""
    score = score_of(trial)
    return -math.inf if score is None else score


def n_finished(study: optuna.Study) -> int:
    """How many trials count towards ``n_trials``: those that are complete, pruned or failed."""
    return len(study.get_trials(deepcopy=False, states=FINISHED))


def documents_spent(trial: FrozenTrial) -> float:
    """The documents that a trial scored, and for its ascent as many as could have been scored in the same time."""
    n_documents: int = trial.user_attrs.get(attributes.DOCUMENTS, 0)
    seconds: float = trial.user_attrs.get(attributes.EVALUATION_SECONDS, 0.0)
    ascent: float = trial.user_attrs.get(attributes.ASCENT_SECONDS, 0.0)
    return n_documents * (1 + ascent / seconds) if seconds else n_documents


def best_merge(study: optuna.Study) -> FrozenTrial | None:
    """The best merge that was scored on every document; None if there is none. A source by itself is not a merge."""
    return next(iter(best_merges(study, 1)), None)


def best_merges(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """The best merge, which may be a uniform one, followed by the next best trials that the search drew.

    With several objectives the best merge is the one with the largest sum. Of the next, those on the Pareto front come
    before all others.

    Args:
        study: The study.
        n: How many merges to return at most.
    """
    merges = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get(attributes.BASELINE_KIND) not in ("source", "base")
    ]
    merges.sort(key=lambda trial: (score_or_worst(trial), -trial.number), reverse=True)
    front = {trial.number for trial in front_of(study)}
    drawn = [trial for trial in merges[1:] if attributes.BASELINE not in trial.user_attrs]
    drawn.sort(key=lambda trial: trial.number not in front)
    return merges[:1] + drawn[: n - 1]


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The Pareto front: complete trials that no other trial beats in every objective; empty with one objective."""
    return study.best_trials if len(study.directions) > 1 else []
