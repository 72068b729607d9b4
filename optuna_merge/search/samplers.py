"""Which point of the search space a trial tries: Optuna's CMA-ES made repeatable, and the other samplers by name."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
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

from optuna_merge.errors import StudyError

NAMED = {"gp": "GPSampler", "nsga2": "NSGAIISampler", "tpe": "TPESampler"}
"""Optuna's samplers that have a short name here, and what they are called in ``optuna.samplers``."""

PAIRED_ESTIMATE = "paired_estimate"
"""User attribute of a pruned trial: the value that it would probably have had. The sampler learns from it."""

_EDGE = 1.5
"""The mean starts at least this many standard deviations inside the bounds: cmaes redraws what falls outside and then
clips it, and started at a bound 45 % of the coordinates sat on it."""

_OTHERS = 4
"""Trials of a generation for each other worker: then CMA-ES learns from 4 of 5 trials."""

GP_EVERY = 5
"""Of so many trials one is drawn by a Gaussian process, by default."""

_GP_TRIALS = 250
"""That many trials it learns from: a draw of 100 weights takes 2 s then, and 10 s after 500."""

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
        study = getattr(study, "_study", study)
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
        trials = [_as_told(trial) for trial in study._get_trials(deepcopy=False, use_cache=True)]
        return [trial for trial in trials if trial.state == TrialState.COMPLETE]


def make_gp(names: Sequence[str], seed: int) -> BaseSampler:
    """Optuna's ``GPSampler``, to be injected into CMA-ES: it learns from the latest 250 trials.

    Args:
        names: The parameters of the search space.
        seed: In [0, 2**32).
    """
    return make_named_sampler("gp", {}, names, seed, n_latest=_GP_TRIALS)


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


class RepeatableSampler(BaseSampler):
    """Any Optuna sampler, with draws that depend on the seed, the trial's number and the trials before it.

    - It is shown the trials that have a value for every parameter of the search space, and no others: samplers that
      draw from what all trials have in common would draw at random once a source has been scored as it is.
    - A PRUNED trial with a ``paired_estimate`` user attribute is shown as COMPLETE with that value.
    - Its random states are keyed by (seed, trial number, parameter), so that a study which was killed goes on as it
      would have, if the sampler remembers nothing by itself.
    - Enqueued trials keep their fixed parameters, and it is not asked.

    Args:
        make: Makes the sampler.
        names: The parameters of the search space.
        seed: In [0, 2**32).
        is_renewed: Make it again for each trial, so that nothing it remembers outlives one.
        n_latest: Trials that it is shown at most, the latest ones; None: all.
    """

    def __init__(
        self,
        make: Callable[[], BaseSampler],
        names: Sequence[str],
        *,
        seed: int,
        is_renewed: bool = False,
        n_latest: int | None = None,
    ) -> None:
        self._make = make
        self._names = frozenset(names)
        self._seed = seed
        self._is_renewed = is_renewed
        self._n_latest = n_latest
        self._inner = make()
        self._number: int | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the sampler draws together, by the trials that it is shown."""
        if "fixed_params" in trial.system_attrs:
            return {}
        return self._of(trial).infer_relative_search_space(self._shown(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw a point."""
        return self._of(trial).sample_relative(self._shown(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one value."""
        inner = self._of(trial, param_name)
        return inner.sample_independent(self._shown(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler."""
        self._of(trial).before_trial(self._shown(study), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler."""
        self._of(trial).after_trial(self._shown(study), trial, state, values)

    def reseed_rng(self) -> None:
        """Do nothing: there is no process-wide random state."""

    def _of(self, trial: FrozenTrial, name: str = "") -> BaseSampler:
        if self._is_renewed and trial.number != self._number:
            self._inner, self._number = self._make(), trial.number
        key = [self._seed, trial.number, int.from_bytes(name.encode(), "little")]
        _reseed(self._inner, int(np.random.SeedSequence(key).generate_state(1)[0]))
        return self._inner

    def _shown(self, study: optuna.Study) -> optuna.Study:
        # HyperbandPruner shows each trial its bracket alone; what the others scored is worth as much
        return _Shown(getattr(study, "_study", study), self._names, self._n_latest)


class _Shown(optuna.Study):
    """A study as its sampler sees it; see :class:`RepeatableSampler`."""

    def __init__(self, study: optuna.Study, names: frozenset[str], n_latest: int | None) -> None:
        self.__dict__.update(study.__dict__)
        self._names = names
        self._n_latest = n_latest

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = [_as_told(trial) for trial in super()._get_trials(deepcopy, None, use_cache)]
        shown = [t for t in trials if (states is None or t.state in states) and self._names <= t.params.keys()]
        return shown if self._n_latest is None else shown[-self._n_latest :]


def make_named_sampler(
    name: str, options: Mapping[str, Any], names: Sequence[str], seed: int, n_latest: int | None = None
) -> BaseSampler:
    """One of Optuna's samplers, or of one's own.

    Args:
        name: A key of ``NAMED``, or the import path of a sampler class such as ``optuna.samplers.QMCSampler``. One with
            a short name is made again for each trial; one of one's own lives as long as the process.
        options: Arguments of the class; ``seed`` is given by us if it takes one.
        names: The parameters of the search space.
        seed: In [0, 2**32).
        n_latest: Trials that it is shown at most, the latest ones; None: all.

    Raises:
        StudyError: If there is none, or it does not take the options.
    """
    path = f"optuna.samplers.{NAMED[name]}" if name in NAMED else name
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise StudyError(
            f"study.sampler.name must be cmaes, random, {', '.join(NAMED)} or the import path of a sampler class, got"
            f" {name!r}: {exc}; is its folder on PYTHONPATH?"
        ) from exc
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise StudyError(f"study.sampler.name must be a class derived from optuna's BaseSampler, got {name!r}")
    known = inspect.signature(found).parameters
    seeded = {"seed": seed, **options} if "seed" in known else dict(options)

    def make() -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return found(**seeded)

    try:
        return RepeatableSampler(make, names, seed=seed, is_renewed=name in NAMED, n_latest=n_latest)
    except (TypeError, ValueError) as exc:
        raise StudyError(
            f"study.sampler: {name} must be made with {', '.join(known) or 'no options'}, got {dict(options)}: {exc};"
            " correct the options"
        ) from exc


def _as_told(trial: FrozenTrial) -> FrozenTrial:
    """A trial as samplers learn from it: one that was pruned counts with its paired estimate."""
    if trial.state != TrialState.PRUNED or PAIRED_ESTIMATE not in trial.user_attrs:
        return trial
    told = copy.copy(trial)
    told.state, told.value = TrialState.COMPLETE, trial.user_attrs[PAIRED_ESTIMATE]
    return told


def _reseed(holder: object, key: int, depth: int = 3) -> None:
    """Set every random state of a sampler, and of what it holds, to one of its own."""
    for value in vars(holder).values():
        if isinstance(value, LazyRandomState):
            value.rng.seed(key)
        elif depth and type(value).__module__.startswith("optuna.") and hasattr(value, "__dict__"):
            _reseed(value, key, depth - 1)
