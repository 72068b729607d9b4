"""The sampler of a study that races methods: each method has a sampler of its own, which sees its own trials.

Knows which method a trial belongs to; knows nothing of how the race is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.storage import attributes


class RaceSampler(BaseSampler):
    """Passes each trial on to the sampler of its method, which the trial's user attribute names.

    A trial without that attribute has fixed parameters or none; any sampler will do.

    Attributes:
        during, afterwards: Method to its sampler for the trials of the race, and of the search that follows.
    """

    def __init__(self, during: Mapping[str, BaseSampler], afterwards: Mapping[str, BaseSampler]) -> None:
        self.during = during
        self.afterwards = afterwards

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the method's sampler draws together."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw several parameters together."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the method's sampler that a trial begins."""
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the method's sampler that a trial has ended."""
        self._of(trial).after_trial(study, trial, state, values)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        samplers = self.during if attributes.RACE_ROUND in trial.user_attrs else self.afterwards
        return samplers[trial.user_attrs.get(attributes.METHOD, next(iter(samplers)))]
