"""Which point of the search space a trial tries: Optuna's CMA-ES made repeatable, and the other samplers by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import cmaes
import numpy as np
import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import known_trials, whole_study
from optuna_merge.storage.attributes import PAIRED_ESTIMATE

_EDGE = 1.5
"""The mean starts at least this many standard deviations inside the bounds: cmaes redraws what falls outside and then
clips it, and started at a bound 45 % of the coordinates sat on it."""

_OTHERS = 4
"""Trials of a generation for each other worker: then CMA-ES learns from 4 of 5 trials."""

Start = Mapping[str, float] | Callable[[optuna.Study], Mapping[str, float]]


def population_size(n_dimensions: int, n_workers: int = 1) -> int:
    """Trials in a generation: 4 + floor(3 ln n), or more where many workers run at the same time.

    What the other workers run when a generation is complete ends too late to teach CMA-ES anything: of
    p + n_workers - 1 trials it learns from p, the population. It is the least with which that is 80 %.

    Args:
        n_dimensions: At least 1.
        n_workers: At least 1.
    """
    usual = 4 + int(3 * np.log(max(1, n_dimensions)))
    return max(usual, _OTHERS * (n_workers - 1))


class StableCmaEsSampler(CmaEsSampler):
    """CMA-ES whose draws depend on nothing but the seed, the trial's number and the trials before it.

    Departures from ``optuna.samplers.CmaEsSampler``:

    - the search space is given, and used in the order of its names: the first trial is drawn by CMA-ES too, and every
      worker uses one space;
    - the random state of a draw is keyed by (seed, trial number): a study that was killed and resumed draws what
      an uninterrupted one would have drawn;
    - a PRUNED trial with a ``paired_estimate`` user attribute counts with that value; without it, it is ignored;
    - enqueued trials keep their fixed parameters and no generation;
    - the first covariance can be any;
    - every so many trials another sampler's point takes the place of the one that CMA-ES drew, and counts as it would
      have (Hansen 2011, Injecting External Solutions Into CMA-ES, arXiv:1110.4181, without its bound on the step).

    Any study over float parameters can use it::

        space = {"x": FloatDistribution(-1, 1), "y": FloatDistribution(0, 10)}
        study = optuna.create_study(sampler=StableCmaEsSampler(space, seed=1))

    Args:
        search_space: Name to distribution of every parameter that CMA-ES draws, float and neither log nor stepped.
        seed: In [0, 2**32).
        start: Where the mean begins, in the parameters' units, or a function of the study that says so when the
            first trial is drawn; None: the middle. It is moved at least 1.5 standard deviations inside the bounds.
        covariance: First covariance with every range mapped to [0, 1], shape ``[n, n]`` in the order of
            ``search_space``, positive definite; None: independent, a sixth of each range.
        popsize: Trials in a generation; None: 4 + floor(3 ln n).
        injected: Draws each trial whose number ``inject_every`` divides, where it proposes a whole point.
        inject_every: At least 1.

    Raises:
        ValueError: If an argument is none of these.
    """

    def __init__(
        self,
        search_space: Mapping[str, FloatDistribution],
        *,
        seed: int,
        start: Start | None = None,
        covariance: np.ndarray | None = None,
        popsize: int | None = None,
        injected: BaseSampler | None = None,
        inject_every: int = 5,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        if popsize is not None and popsize < 3:
            raise ValueError(f"popsize must be at least 3, got {popsize}")
        if inject_every < 1:
            raise ValueError(f"inject_every must be at least 1, got {inject_every}")
        super().__init__(
            seed=seed,
            n_startup_trials=0,
            popsize=popsize,
            independent_sampler=StableRandomSampler(seed=seed),
            warn_independent_sampling=False,
        )
        for name, distribution in search_space.items():
            if not isinstance(distribution, FloatDistribution) or distribution.log or distribution.step is not None:
                raise ValueError(f"search_space[{name!r}] must be a plain FloatDistribution, got {distribution}")
        n = len(search_space)
        if covariance is None:
            covariance = np.eye(n) / 36
        if covariance.shape != (n, n) or (n and np.linalg.eigvalsh(covariance).min() <= 0):
            raise ValueError(f"covariance must be positive definite of shape {(n, n)}, got shape {covariance.shape}")
        self._fixed_space = dict(search_space)
        self._seed = seed
        self._start = start
        self._covariance = covariance
        self._injected = injected
        self._inject_every = inject_every
        self._study: optuna.Study | None = None

    @property
    def population_size(self) -> int:
        """Trials in a generation."""
        n = sum(not distribution.single() for distribution in self._fixed_space.values())
        return self._popsize or population_size(n)

    def generation_of(self, trial: FrozenTrial) -> int | None:
        """The generation in which CMA-ES drew a trial; None if it did not."""
        generation: int | None = trial.system_attrs.get(self._attr_key_generation)
        return generation

    def reseed_rng(self) -> None:
        """Do nothing: there is no process-wide random state."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The given search space, whatever the study's trials look like."""
        return {
            name: self._fixed_space[name] for name in sorted(self._fixed_space) if not self._fixed_space[name].single()
        }

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw a point, from a random state of this trial's own."""
        if "fixed_params" in trial.system_attrs:
            return {}
        # HyperbandPruner shows each trial its bracket alone; what the others scored is worth as much
        study = whole_study(study)
        key = np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]
        self._cma_rng = LazyRandomState(int(key))
        self._study = study
        drawn = super().sample_relative(study, trial, search_space)
        if drawn and self._injected is not None and trial.number % self._inject_every == 0:
            point = self._injected.sample_relative(study, trial, search_space)
            if point.keys() == drawn.keys():
                return point
        return drawn

    def _init_optimizer(self, trans: _SearchSpaceTransform, direction: StudyDirection) -> cmaes.CMA:
        names = list(trans._search_space)
        order = [list(self._fixed_space).index(name) for name in names]
        covariance = self._covariance[np.ix_(order, order)]
        sigma = float(np.sqrt(np.diag(covariance).mean()))
        start = self._start(self._study) if callable(self._start) and self._study is not None else self._start
        mean = np.full(len(names), 0.5)
        if isinstance(start, Mapping):
            mean = trans.transform({name: start[name] for name in names})
        margin = np.minimum(_EDGE * np.sqrt(np.diag(covariance)), 0.5)
        return cmaes.CMA(
            mean=np.clip(mean, margin, 1 - margin),
            sigma=sigma,
            cov=covariance / sigma**2,
            bounds=trans.bounds,
            seed=self._cma_rng.rng.randint(1, 2**31 - 2),
            n_max_resampling=10 * len(names),
            population_size=self._popsize,
        )

    def _get_trials(self, study: optuna.Study) -> list[FrozenTrial]:
        trials = [_as_told(trial) for trial in known_trials(study)]
        return [trial for trial in trials if trial.state == TrialState.COMPLETE]


class StableRandomSampler(RandomSampler):
    """Uniform draws keyed by (seed, trial number, parameter name)."""

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed)
        self._seed = seed

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one value."""
        name_key = int.from_bytes(param_name.encode(), "little")
        key = np.random.SeedSequence([self._seed, trial.number, name_key]).generate_state(1)[0]
        self._rng = LazyRandomState(int(key))
        return super().sample_independent(study, trial, param_name, param_distribution)


def _as_told(trial: FrozenTrial) -> FrozenTrial:
    """A trial as samplers learn from it: one that was pruned counts with its paired estimate."""
    if trial.state != TrialState.PRUNED or PAIRED_ESTIMATE not in trial.user_attrs:
        return trial
    told = copy.copy(trial)
    told.state, told.value = TrialState.COMPLETE, trial.user_attrs[PAIRED_ESTIMATE]
    return told
