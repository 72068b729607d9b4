"""Any Optuna sampler by name, made repeatable."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import whole_study
from optuna_merge.search.samplers import _as_told

NAMED = {"gp": "GPSampler", "nsga2": "NSGAIISampler", "tpe": "TPESampler"}
"""Optuna's samplers that have a short name here, and what they are called in ``optuna.samplers``."""

GP_EVERY = 5
"""Of so many trials one is drawn by a Gaussian process, by default."""

_GP_TRIALS = 250
"""That many trials it learns from: a draw of 100 weights takes 2 s then, and 10 s after 500."""


def make_gp(names: Sequence[str], seed: int) -> BaseSampler:
    """Optuna's ``GPSampler``, to be injected into CMA-ES: it learns from the latest 250 trials.

    Args:
        names: The parameters of the search space.
        seed: In [0, 2**32).
    """
    return make_named_sampler("gp", {}, names, seed, n_latest=_GP_TRIALS)


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
        return _Shown(whole_study(study), self._names, self._n_latest)


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


def _reseed(holder: object, key: int, depth: int = 3) -> None:
    """Set every random state of a sampler, and of what it holds, to one of its own."""
    for value in vars(holder).values():
        if isinstance(value, LazyRandomState):
            value.rng.seed(key)
        elif depth and type(value).__module__.startswith("optuna.") and hasattr(value, "__dict__"):
            _reseed(value, key, depth - 1)
