"""Optuna's internals that we use; no other file touches an underscored name of Optuna.

``tests/internals/test_optuna.py`` names what broke when Optuna changes. Knows nothing of merging.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.storages import BaseStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study reads and writes."""
    return study._storage


def study_id(study: optuna.Study) -> int:
    """The number by which the storage knows a study."""
    return study._study_id


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """The number by which the storage knows a trial."""
    return trial._trial_id


def backend_of(storage: BaseStorage) -> BaseStorage:
    """The storage behind the cache that Optuna puts in front of a database."""
    return storage._backend if isinstance(storage, _CachedStorage) else storage


def known_state(trial: optuna.Trial) -> FrozenTrial:
    """A running trial as this process knows it, without reading the storage; changing it changes what is known."""
    return trial._cached_frozen_trial


def known_trials(study: optuna.Study, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
    """A study's trials as of the start of the running trial, read once for each trial; not to be changed."""
    return study._get_trials(deepcopy=False, states=states, use_cache=True)


def set_known_trials(study: optuna.Study, trials: Sequence[FrozenTrial] | None) -> None:
    """Replace what :func:`known_trials` returns in this thread; None: read the storage at the next call."""
    study._thread_local.cached_all_trials = None if trials is None else list(trials)


def whole_study(study: optuna.Study) -> optuna.Study:
    """The study behind the part that ``HyperbandPruner`` shows to a sampler: the trials of one bracket."""
    return getattr(study, "_study", study)
