"""Pruning by a signed-rank test against the best trial, and what a pruned trial would have scored.

An intermediate value is the score of one chunk, its step the number of the chunk; a chunk holds the same documents in
every trial. This file knows these numbers, and nothing of documents or merges.
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
"""Differences that agree to this many decimals count as equal: they come from the same documents."""


class SignedRankPruner(BasePruner):
    """Prunes a trial that is significantly worse than the best trial on the chunks that both were scored on.

    Departures from ``optuna.pruners.WilcoxonPruner``:

    - The p-value is exact for any number of chunks, with ties and zeros, and takes less than a millisecond. Accuracies
      often tie, and scipy then tries every combination of signs: 0.2 s on average in a study of 20 chunks, which is
      more than scoring a chunk of a small model takes.
    - The best trial is the best point of the search space. A source that is scored by itself does not count: if it
      were better than all merges, none of them would be scored in full.
    - Only the shared chunks count. Optuna also keeps a trial whose mean so far is above the best trial's mean over all
      chunks, which happens when the first chunks are easy.

    Args:
        p_threshold: One-sided significance level, in (0, 1).
        n_startup_steps: Chunks before the first comparison; values below 2 mean 2.
    """

    def __init__(self, *, p_threshold: float = 0.1, n_startup_steps: int = 4) -> None:
        self._p_threshold = p_threshold
        self._n_startup_steps = max(2, n_startup_steps)
        self._best: tuple[list[FrozenTrial], FrozenTrial | None] = ([], None)

    @property
    def n_least(self) -> int:
        """The least number of chunks after which a trial can be pruned: if it is worse on each of them."""
        return max(self._n_startup_steps, math.floor(-math.log2(self._p_threshold)) + 1)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is significantly worse than the best one."""
        trials = known_trials(study)  # the same list at every chunk of a trial
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
    """The best complete trial with parameters, the first if several are equal; None if there is none."""
    # As of the start of the running trial: reading the database after each chunk would cost more than it tells.
    points = [t for t in known_trials(study, (TrialState.COMPLETE,)) if t.params]
    sign = -1 if study.direction == StudyDirection.MINIMIZE else 1
    return max(points, key=lambda trial: sign * cast(float, trial.value), default=None)


def signed_rank_p(differences: Sequence[float]) -> float:
    """One-sided p-value of the Wilcoxon signed-rank test that differences tend to be below 0.

    It uses the exact distribution of the rank sum over all combinations of signs, given the ranks. Zeros are ranked,
    and half of their ranks counts for each side (scipy's ``zsplit``). Sizes that are equal to 12 decimals share the
    mean of their ranks.

    Args:
        differences: At least one; finite.

    Returns:
        In (0, 1]; 1 if all are 0.
    """
    signed = np.round(differences, _DIGITS)
    size = np.abs(signed)
    # Doubled, so that shared ranks are whole numbers.
    ranks = 2 * (size < size[:, None]).sum(axis=1) + (size == size[:, None]).sum(axis=1) + 1
    ranks_of_signs = ranks[signed != 0]
    n_combinations = np.zeros(1 + ranks_of_signs.sum())  # by doubled sum of the ranks above 0
    n_combinations[0] = 1
    for rank in ranks_of_signs:
        n_combinations[rank:] += n_combinations[:-rank].copy()
    observed = ranks[signed > 0].sum()
    return float(n_combinations[: observed + 1].sum() / n_combinations.sum())


def paired_estimate(study: optuna.Study, scores: Sequence[float]) -> float | None:
    """Estimate the value that a pruned trial would have had.

    The estimate is the best merge's value plus the mean difference over the chunks that both were scored on. In a
    synthetic study of 12 dimensions with equal document budgets, CMA-ES ended at 0.55 times the loss of a study without
    pruning when it learned from these estimates, and at 3.5 times that loss when it ignored pruned trials.

    Args:
        study: The study; the trial is compared with its best point, see :func:`best_point`.
        scores: Scores of the pruned trial's chunks, from chunk 0 on.

    Returns:
        None if there is no best point, or if it has no value for any of the chunks.
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
