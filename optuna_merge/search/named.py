"""Any Optuna sampler by name, made repeatable.

Knows how samplers are made, seeded and shown a study; knows nothing of merges.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GridSampler, QMCSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import has_fixed_params, known_trials, storage_of, study_id, whole_study
from optuna_merge.search.samplers import StableRandomSampler, draw_seed, with_estimate
from optuna_merge.storage.wrapper import StorageWrapper

NAMED = {"gp": "GPSampler", "nsga2": "NSGAIISampler", "tpe": "TPESampler"}
"""Short names of Optuna's samplers, and their classes in ``optuna.samplers``."""

GP_EVERY = 5
"""By default, draw every 5th trial with a Gaussian process."""

_GP_TRIALS = 250
"""The Gaussian process learns from this many trials at most: drawing 100 weights takes 2 s then, 10 s with 500."""

_ONE_SEQUENCE = (GridSampler, QMCSampler)
"""The seed of these fixes one sequence of points for the whole study, so it must be the same in every trial."""

_FILTERING = threading.Lock()
"""Held while warnings are filtered: the filters are the process's, and another thread would restore the wrong ones."""


class RepeatableSampler(BaseSampler):
    """Any Optuna sampler, with draws that depend only on the seed, the trial's number and the trials before it.

    - The sampler is made anew for each trial, and for each parameter that it draws by itself, with a seed of its own
      from (seed, trial number, parameter). So a study that was killed and resumed draws what it would have drawn.
    - It sees only trials with a value for every parameter of the search space. Samplers that draw what all trials have
      in common would otherwise draw at random as soon as a source has been scored by itself.
    - It sees a PRUNED trial with a ``paired_estimate`` user attribute as COMPLETE with that value.
    - It sees the trials as of the start of the running trial. Threads (``study.optimize`` with ``n_jobs``) share no
      sampler that takes a seed; which trials have ended before a trial begins then depends on their timing.
    - It is not asked about enqueued trials, which keep their fixed parameters.

    Any study can use it::

        sampler = RepeatableSampler(lambda seed: TPESampler(seed=seed), ["x", "y"], seed=1)

    Args:
        make: Makes the sampler from a seed in [0, 2**32). If it always returns the same object, that sampler may
            remember something, and its draws are repeatable only if it sees to that itself.
        names: The parameters of the search space.
        seed: In [0, 2**32).
        n_latest: Show only this many trials, the latest; None: all.
    """

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        names: Sequence[str],
        *,
        seed: int,
        n_latest: int | None = None,
    ) -> None:
        self._make = make
        self._names = frozenset(names)
        self._seed = seed
        self._n_latest = n_latest
        make(seed)  # refuses wrong arguments now
        self._kept = _Kept()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What the sampler draws together."""
        if has_fixed_params(trial):
            return {}
        return self._sampler_of(trial).infer_relative_search_space(self._shown(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw several parameters together."""
        return self._sampler_of(trial).sample_relative(self._shown(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter."""
        sampler = self._sampler_of(trial, param_name)
        return sampler.sample_independent(self._shown(study), trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Tell the sampler that a trial begins."""
        self._sampler_of(trial).before_trial(self._shown(study), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the sampler that a trial has ended."""
        self._sampler_of(trial).after_trial(self._shown(study), trial, state, values)

    def reseed_rng(self) -> None:
        """Do nothing: there is no process-wide random state."""

    def _sampler_of(self, trial: FrozenTrial, param_name: str = "") -> BaseSampler:
        """The sampler of a trial, or of one parameter of it; kept until the same thread asks for another."""
        key = (trial.number, param_name)
        if key != self._kept.key:
            self._kept.sampler = self._make(draw_seed(self._seed, trial.number, param_name))
            self._kept.key = key
        return self._kept.sampler

    def _shown(self, study: optuna.Study) -> optuna.Study:
        # HyperbandPruner shows the trials of one bracket only; those of the others teach just as much.
        whole = whole_study(study)
        storage = _ShownTrials(whole, self._names, self._n_latest)
        return optuna.Study(whole.study_name, storage, whole.sampler, whole.pruner)


class _Kept(threading.local):
    """The sampler that a thread asked for last, and what for: a trial's number and a parameter's name."""

    key: tuple[int, str] | None = None
    sampler: BaseSampler


class _ShownTrials(StorageWrapper):
    """A study's storage as :class:`RepeatableSampler` shows it: with some of the trials, which are not read again."""

    def __init__(self, study: optuna.Study, names: frozenset[str], n_latest: int | None) -> None:
        super().__init__(storage_of(study))
        self._study = study
        self._names = names
        self._n_latest = n_latest

    def get_study_id_from_name(self, study_name: str) -> int:
        return study_id(self._study)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._study.directions

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = map(with_estimate, known_trials(self._study))
        shown = [t for t in trials if (states is None or t.state in states) and self._names <= t.params.keys()]
        shown = shown if self._n_latest is None else shown[-self._n_latest :]
        return copy.deepcopy(shown) if deepcopy else shown


def make_gp(names: Sequence[str], seed: int) -> BaseSampler:
    """Optuna's ``GPSampler`` for CMA-ES to inject; it learns from the latest 250 trials.

    Args:
        names: The parameters of the search space.
        seed: In [0, 2**32).
    """
    return make_named_sampler("gp", {}, names, seed, n_latest=_GP_TRIALS)


def make_named_sampler(
    name: str, options: Mapping[str, Any], names: Sequence[str], seed: int, n_latest: int | None = None
) -> BaseSampler:
    """Make one of Optuna's samplers, or one of the user's own.

    A class that takes a ``seed`` is made anew for each trial, with a seed of its own. Any other lives as long as the
    process, and is itself responsible for repeatable draws.

    Args:
        name: A key of ``NAMED``, or the import path of a sampler class such as ``optuna.samplers.QMCSampler``.
        options: Arguments of the class.
        names: The parameters of the search space.
        seed: In [0, 2**32).
        n_latest: Show only this many trials to the sampler, the latest; None: all.

    Raises:
        StudyError: If there is no such class, it does not take the options, or a seed is among them.
    """
    found = _find_class(name)
    known = inspect.signature(found).parameters
    if "seed" in options and "seed" in known and not issubclass(found, _ONE_SEQUENCE):
        raise StudyError(
            f"study.sampler.seed must be absent for {name}, got {options['seed']}: each trial has a seed of its own;"
            " use study.seed"
        )

    def make(draw_seed: int) -> BaseSampler:
        given = dict(options)
        if issubclass(found, _ONE_SEQUENCE):
            given = {"seed": seed, **given}
        elif "seed" in known:
            given["seed"] = draw_seed
        if issubclass(found, QMCSampler):  # its first trial is drawn by another sampler
            given.setdefault("independent_sampler", StableRandomSampler(seed=seed))
        with _FILTERING, warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return found(**given)

    try:
        only = None if "seed" in known else make(seed)
        return RepeatableSampler(make if only is None else lambda _: only, names, seed=seed, n_latest=n_latest)
    except (TypeError, ValueError) as exc:
        raise StudyError(
            f"study.sampler: {name} must be made with {', '.join(known) or 'no options'}, got {dict(options)}: {exc};"
            " correct the options"
        ) from exc


def _find_class(name: str) -> type[BaseSampler]:
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
    return found
