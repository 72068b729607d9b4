"""When a trial has shown enough: the signed-rank test against the best trial.

Intermediate values are the scores of single chunks; step is the number of the chunk, the same documents for every
trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import known_trials

_DIGITS = 12


class SignedRankPruner(BasePruner):
    """Stops a trial that is worse than the best one on the chunks that both were scored on.

    Departures from ``optuna.pruners.WilcoxonPruner``:

    - the p-value is exact for any number of chunks, ties and zeros included, and costs less than a millisecond. Scipy's
      tries every combination of signs one by one where there are ties, as there are between accuracies: 0.2 s on
      average in a study of 20 chunks, more than it takes to score a chunk of a small model;
    - the best trial is the best point of the search space: a source that is scored as it stands is none, and where it
      is better than all merges, it would keep each of them from being scored in full;
    - only the shared chunks count. Optuna's also keeps a trial whose mean so far is above the best trial's mean over
      all chunks, as it is when the first ones are easy.

    Args:
        p_threshold: One-sided level, in (0, 1).
        n_startup_steps: Chunks before the first comparison; at least 2.
    """

    def __init__(self, *, p_threshold: float = 0.1, n_startup_steps: int = 4) -> None:
        self._p_threshold = p_threshold
        self._n_startup_steps = max(2, n_startup_steps)
        self._best: tuple[list[FrozenTrial], FrozenTrial | None] = ([], None)

    @property
    def n_least(self) -> int:
        """Chunks that a trial must have been scored on to be stopped, were it worse on each."""
        return max(self._n_startup_steps, math.floor(-math.log2(self._p_threshold)) + 1)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the test says that the trial is worse."""
        trials = known_trials(study)  # one list for all chunks of a trial
        if trials is not self._best[0]:
            self._best = (trials, best_point(study))
        best = self._best[1]
        if best is None:
            return False
        reached = best.intermediate_values
        ahead = [value - reached[step] for step, value in trial.intermediate_values.items() if step in reached]
        if len(ahead) < self._n_startup_steps or not all(map(math.isfinite, ahead)):
            return False
        if study.direction == StudyDirection.MINIMIZE:
            ahead = [-difference for difference in ahead]
        return signed_rank_p(ahead) < self._p_threshold


def best_point(study: optuna.Study) -> FrozenTrial | None:
    """The best complete trial that has parameters, the first of equals; None if there is none."""
    # as it was when the trial began: asking a database once more after each chunk costs more than it tells
    points = [t for t in known_trials(study, (TrialState.COMPLETE,)) if t.params]
    sign = -1 if study.direction == StudyDirection.MINIMIZE else 1
    return max(points, key=lambda trial: sign * cast(float, trial.value), default=None)


def signed_rank_p(differences: Sequence[float]) -> float:
    """One-sided p-value of the Wilcoxon signed-rank test that differences tend to be below 0.

    The exact distribution of the rank sum over all combinations of signs, given the ranks. Zeros are ranked and count
    half for either side (``zsplit``); equal sizes, up to 12 digits, share the mean of their ranks.

    Args:
        differences: At least one, finite.

    Returns:
        In (0, 1]; 1 if all are 0.
    """
    signed = np.round(differences, _DIGITS)
    size = np.abs(signed)
    # doubled, so that shared ranks are whole numbers
    ranks = 2 * (size < size[:, None]).sum(axis=1) + (size == size[:, None]).sum(axis=1) + 1
    ranks_of_signs = ranks[signed != 0]
    n_combinations = np.zeros(1 + ranks_of_signs.sum())  # by doubled sum of the ranks above 0
    n_combinations[0] = 1
    for rank in ranks_of_signs:
        n_combinations[rank:] += n_combinations[:-rank].copy()
    observed = ranks[signed > 0].sum()
    return float(n_combinations[: observed + 1].sum() / n_combinations.sum())


def paired_estimate(study: optuna.Study, scores: Sequence[float]) -> float | None:
    """What a pruned trial's value would probably have been.

    The best merge's full value plus the mean difference over the chunks that both were scored on. In a synthetic study
    of 12 dimensions with equal document budgets, CMA-ES told so ended at 0.55 of the loss of no pruning; not told of
    pruned trials at all, at 3.5 times it.

    Args:
        study: Its best trial that is a point of the search space is what is compared with.
        scores: Of the pruned trial's chunks, from the first on.

    Returns:
        None if no such trial is complete, or the best one reported none of the chunks.
    """
    best = best_point(study)
    if best is None:
        return None
    pairs = [
        (score, best.intermediate_values[chunk])
        for chunk, score in enumerate(scores)
        if chunk in best.intermediate_values
    ]
    if not pairs or best.value is None:
        return None
    return best.value + math.fsum(ours - theirs for ours, theirs in pairs) / len(pairs)
