"""Our samplers: CMA-ES made repeatable, and repeatable random draws.

Knows float parameters, trials and their estimates; knows neither models nor study files. Other samplers are in
named.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cmaes
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.internals.optuna import OpenCmaEsSampler, ToUnit, has_fixed_params, known_trials, whole_study
from optuna_merge.storage.attributes import PAIRED_ESTIMATE

_EDGE = 1.5
"""The mean starts at least this many standard deviations inside the bounds. cmaes redraws what falls outside and then
clips it: with the mean at a bound, 45 % of the coordinates were drawn onto the bound."""

_TRIALS_PER_WORKER = 4
"""Least number of trials in a generation for each worker but one; CMA-ES then learns from 80 % of the trials."""

Start = Mapping[str, float] | Callable[[optuna.Study], Mapping[str, float]]
"""Where CMA-ES starts, or a function that says so when the first trial is drawn."""

Covariance = np.ndarray | Callable[[optuna.Study], np.ndarray]
"""The first covariance of CMA-ES, or a function that gives it when the first trial is drawn."""


def population_size(n_dimensions: int, n_workers: int = 1) -> int:
    """Trials in a generation: 4 + floor(3 ln n), or more if many workers run at the same time.

    Trials that other workers are running when a generation is complete end too late to teach CMA-ES anything: with a
    population of p and w workers it learns from p of p + w - 1 trials. The result is the least p for which that is at
    least 80 %.

    Args:
        n_dimensions: Number of searched parameters, at least 1.
        n_workers: At least 1.
    """
    usual = 4 + int(3 * np.log(max(1, n_dimensions)))
    return max(usual, _TRIALS_PER_WORKER * (n_workers - 1))


class StableCmaEsSampler(OpenCmaEsSampler):
    """CMA-ES whose draws depend only on the seed, the trial's number and the trials before it.

    Departures from ``optuna.samplers.CmaEsSampler``:

    - The search space is given, and used in the order of its names. So the first trial is drawn by CMA-ES too, and all
      workers use the same space.
    - The random state of a draw is keyed by (seed, trial number): a study that was killed and resumed draws what an
      uninterrupted one would have drawn. Threads (``study.optimize`` with ``n_jobs``) share no state of a draw; which
      trials have ended before a trial begins then depends on their timing.
    - A PRUNED trial counts with the value of its ``paired_estimate`` user attribute; without one it is ignored.
    - Enqueued trials keep their fixed parameters and belong to no generation.
    - The first covariance can be any positive definite matrix.
    - Every n-th trial is drawn by another sampler, and counts as if CMA-ES had drawn it (Hansen 2011, Injecting
      External Solutions Into CMA-ES, arXiv:1110.4181, without its bound on the step).

    Any study over float parameters can use it::

        space = {"x": FloatDistribution(-1, 1), "y": FloatDistribution(0, 10)}
        study = optuna.create_study(sampler=StableCmaEsSampler(space, seed=1))

    Args:
        search_space: Name and distribution of every parameter; neither log nor stepped.
        seed: In [0, 2**32).
        start: Where the mean starts, in the parameters' units, or a function of the study that is called when the first
            trial is drawn; None: in the middle. It is moved at least 1.5 standard deviations inside the bounds.
        covariance: First covariance with every range mapped to [0, 1], shape ``[n, n]`` in the order of
            ``search_space``, positive definite, or a function of the study that is called when the first trial is
            drawn; None: independent, with a sixth of each range as standard deviation.
        popsize: Trials in a generation, at least 3; None: 4 + floor(3 ln n).
        injected: Draws each trial whose number is a multiple of ``inject_every``. If it proposes no point, or not a
            whole one, the point of CMA-ES is used.
        inject_every: At least 1.
        injects: Whether the injected sampler draws points for a study; None: for every one.
        learns_from: Given all trials that CMA-ES could learn from, returns those that it learns from; None: all.

    Attributes:
        drawn_for: The study that a point is drawn for; None, except in the copy that draws it.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        search_space: Mapping[str, FloatDistribution],
        *,
        seed: int,
        start: Start | None = None,
        covariance: Covariance | None = None,
        popsize: int | None = None,
        injected: BaseSampler | None = None,
        inject_every: int = 5,
        injects: Callable[[optuna.Study], bool] | None = None,
        learns_from: Callable[[Sequence[FrozenTrial]], Sequence[FrozenTrial]] | None = None,
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
        if isinstance(covariance, np.ndarray):
            _refuse_covariance(covariance, n)
        self._fixed_space = dict(search_space)
        self._seed = seed
        self._population = popsize
        self._start = start
        self._covariance = covariance
        self._injected = injected
        self._inject_every = inject_every
        self._injects = injects
        self._learns_from = learns_from
        self.drawn_for: optuna.Study | None = None

    @property
    def population_size(self) -> int:
        """Number of trials in a generation."""
        n = sum(not distribution.single() for distribution in self._fixed_space.values())
        return self._population or population_size(n)

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
        """Draw a point, with a random state for this trial alone."""
        if has_fixed_params(trial):
            return {}
        # HyperbandPruner shows the trials of one bracket only; those of the others teach just as much.
        study = whole_study(study)
        own = self.for_a_draw(int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]))
        own.drawn_for = study
        drawn = super(StableCmaEsSampler, own).sample_relative(study, trial, search_space)
        if drawn and self._injected is not None and self._is_injected(study, trial.number):
            point = self._injected.sample_relative(study, trial, search_space)
            if point.keys() == drawn.keys():
                return point
        return drawn

    def _is_injected(self, study: optuna.Study, number: int) -> bool:
        return number % self._inject_every == 0 and (self._injects is None or self._injects(study))

    def make_optimizer(self, names: Sequence[str], bounds: np.ndarray, to_unit: ToUnit, seed: int) -> cmaes.CMA:
        """The optimizer of the first generation, with the given start and covariance."""
        order = [list(self._fixed_space).index(name) for name in names]
        whole = self._covariance
        if callable(whole):
            assert self.drawn_for is not None
            whole = whole(self.drawn_for)
            _refuse_covariance(whole, len(self._fixed_space))
        covariance = whole[np.ix_(order, order)]
        sigma = float(np.sqrt(np.diag(covariance).mean()))
        start = self._start(self.drawn_for) if callable(self._start) and self.drawn_for is not None else self._start
        mean = np.full(len(names), 0.5)
        if isinstance(start, Mapping):
            mean = to_unit({name: start[name] for name in names})
        margin = np.minimum(_EDGE * np.sqrt(np.diag(covariance)), 0.5)
        return cmaes.CMA(
            mean=np.clip(mean, margin, 1 - margin),
            sigma=sigma,
            cov=covariance / sigma**2,
            bounds=bounds,
            seed=seed,
            n_max_resampling=10 * len(names),
            population_size=self._population,
        )

    def trials_to_learn_from(self, study: optuna.Study) -> list[FrozenTrial]:
        """Complete trials with every parameter of the search space, and such pruned ones with an estimate."""
        known = known_trials(study)
        trials = map(with_estimate, known if self._learns_from is None else self._learns_from(known))
        names = self._fixed_space.keys()
        return [trial for trial in trials if trial.state == TrialState.COMPLETE and names <= trial.params.keys()]


def _refuse_covariance(covariance: np.ndarray, n: int) -> None:
    if covariance.shape != (n, n) or (n and np.linalg.eigvalsh(covariance).min() <= 0):
        raise ValueError(f"covariance must be positive definite of shape {(n, n)}, got shape {covariance.shape}")


class StableRandomSampler(RandomSampler):
    """Uniform draws keyed by (seed, trial number, parameter name).

    Args:
        seed: In [0, 2**32).
    """

    def __init__(self, *, seed: int) -> None:
        super().__init__(seed=seed)
        self._seed = seed

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one value."""
        sampler = RandomSampler(seed=draw_seed(self._seed, trial.number, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def draw_seed(seed: int, trial_number: int, param_name: str = "") -> int:
    """The seed of one draw, in [0, 2**32).

    Args:
        seed: The study's, in [0, 2**32).
        trial_number: Number of the trial.
        param_name: The parameter that is drawn; "": several parameters together.
    """
    key = [seed, trial_number, int.from_bytes(param_name.encode(), "little")]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def with_estimate(trial: FrozenTrial) -> FrozenTrial:
    """A trial as samplers learn from it: a pruned one with a paired estimate looks complete, with that value."""
    if trial.state != TrialState.PRUNED or PAIRED_ESTIMATE not in trial.user_attrs:
        return trial
    estimated = copy.copy(trial)
    estimated.state, estimated.value = TrialState.COMPLETE, trial.user_attrs[PAIRED_ESTIMATE]
    return estimated
