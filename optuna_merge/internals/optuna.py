"""Optuna's internals that we use; no other file touches an underscored name of Optuna.

Each function or class here is one such use. ``tests/internals/test_optuna.py`` holds a contract for each: when a new
version of Optuna breaks one, the failing test says what is gone and which of our files needs it. This file knows
nothing of merging and imports grpc only when a server is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import optuna
from optuna.samplers import CmaEsSampler
from optuna.samplers._lazy_random_state import LazyRandomState
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    import cmaes
    import grpc
    import sqlalchemy
    from optuna._transform import _SearchSpaceTransform
    from optuna.study import StudyDirection


# --- studies and trials


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study reads and writes."""
    return study._storage


def study_id(study: optuna.Study) -> int:
    """The number by which the storage knows a study."""
    return study._study_id


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """The number by which the storage knows a trial."""
    return trial._trial_id


def known_state(trial: optuna.Trial) -> FrozenTrial:
    """A running trial as this process knows it, without reading the storage; changing it changes what is known."""
    return trial._cached_frozen_trial


def known_trials(study: optuna.Study, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
    """A study's trials as of the start of the running trial, read once for each trial; not to be changed.

    So nobody changes them while a sampler looks at them: ``InMemoryStorage`` returns the very objects in which other
    threads keep the parameters of their running trials.
    """
    if study._thread_local.cached_all_trials is None:
        trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
        set_known_trials(study, [_as_it_is(trial) if trial.state == TrialState.RUNNING else trial for trial in trials])
    return study._get_trials(deepcopy=False, states=states, use_cache=True)


def set_known_trials(study: optuna.Study, trials: Sequence[FrozenTrial] | None) -> None:
    """Replace what :func:`known_trials` returns in this thread; None: read the storage at the next call."""
    study._thread_local.cached_all_trials = None if trials is None else list(trials)


def _as_it_is(trial: FrozenTrial) -> FrozenTrial:
    copied = copy.copy(trial)
    copied.params, copied.distributions = dict(trial.params), dict(trial.distributions)
    copied.user_attrs, copied.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
    copied.intermediate_values = dict(trial.intermediate_values)
    return copied


def whole_study(study: optuna.Study) -> optuna.Study:
    """The study behind the part that ``HyperbandPruner`` shows to a sampler: the trials of one bracket."""
    return getattr(study, "_study", study)


def has_fixed_params(trial: FrozenTrial) -> bool:
    """Whether ``study.enqueue_trial`` has fixed parameters of a trial."""
    return "fixed_params" in trial.system_attrs


def fix_params(trial: optuna.Trial, params: Mapping[str, float]) -> None:
    """Let a running trial suggest the given values from now on, as if they had been enqueued."""
    trial._fixed_params = dict(params)


# --- samplers


ToUnit = Callable[[dict[str, Any]], np.ndarray]
"""Maps parameters to coordinates, shape ``[n]``, each range to [0, 1]."""


class OpenCmaEsSampler(CmaEsSampler):
    """Optuna's CMA-ES with public names for the three hooks that a subclass needs."""

    def for_a_draw(self, seed: int) -> Self:
        """A copy with a random state of its own, for one draw: other threads may draw at the same time."""
        copied = copy.copy(self)
        copied._cma_rng = LazyRandomState(seed)
        return copied

    def make_optimizer(self, names: Sequence[str], bounds: np.ndarray, to_unit: ToUnit, seed: int) -> cmaes.CMA:
        """Make the optimizer of the first generation.

        Args:
            names: The parameters in the order of the optimizer's coordinates.
            bounds: Lower and upper bound of each coordinate, shape ``[n, 2]``.
            to_unit: Maps parameters to coordinates.
            seed: The optimizer's.
        """
        raise NotImplementedError

    def trials_to_learn_from(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials that CMA-ES learns from, each with a value."""
        raise NotImplementedError

    def _init_optimizer(self, trans: _SearchSpaceTransform, direction: StudyDirection) -> cmaes.CMA:
        seed = self._cma_rng.rng.randint(1, 2**31 - 2)
        return self.make_optimizer(list(trans._search_space), trans.bounds, trans.transform, seed)

    def _get_trials(self, study: optuna.Study) -> list[FrozenTrial]:
        return self.trials_to_learn_from(study)


# --- storages


def with_cache(storage: BaseStorage) -> BaseStorage:
    """A storage as Optuna uses it: a database with a cache of finished trials in front of it."""
    return optuna.storages.get_storage(storage)


def backend_of(storage: BaseStorage) -> BaseStorage:
    """The storage behind the cache that Optuna puts in front of a database."""
    return storage._backend if isinstance(storage, _CachedStorage) else storage


class TrialTables(NamedTuple):
    """The tables of an ``RDBStorage`` that hold what is known of a trial."""

    trials: sqlalchemy.Table
    params: sqlalchemy.Table
    user_attrs: sqlalchemy.Table
    system_attrs: sqlalchemy.Table
    intermediate_values: sqlalchemy.Table


def trial_tables() -> TrialTables:
    """The tables of an ``RDBStorage``, as it has made them."""
    classes: tuple[Any, ...] = (
        models.TrialModel,
        models.TrialParamModel,
        models.TrialUserAttributeModel,
        models.TrialSystemAttributeModel,
        models.TrialIntermediateValueModel,
    )
    return TrialTables(*(one.__table__ for one in classes))


def intermediate_value_columns(value: float) -> dict[str, Any]:
    """The columns in which an ``RDBStorage`` keeps an intermediate value, which may be infinite or NaN."""
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return {"intermediate_value": stored, "intermediate_value_type": kind}


class SymlinkLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal file, a symbolic link beside it, with a target of our choice.

    Args:
        file: The journal file.
        target: What the link points to. Processes that wait for the lock look at its age.
    """

    def __init__(self, file: Path, target: Path) -> None:
        super().__init__(str(file))
        self._lock_target_file = str(target)

    @property
    def link(self) -> Path:
        """The link; it is there as long as somebody holds the lock."""
        return Path(self._lock_file)


# --- the gRPC proxy


def channel_of(storage: GrpcStorageProxy) -> grpc.Channel:
    """The connection of a proxy's client."""
    return storage._channel


def address_of(storage: GrpcStorageProxy) -> str:
    """``HOST:PORT`` of the proxy that a client talks to."""
    return f"{storage._host}:{storage._port}"


def add_storage_service(server: grpc.Server, storage: BaseStorage) -> None:
    """Let a gRPC server answer the calls of ``GrpcStorageProxy``.

    Args:
        server: Not started yet.
        storage: What the calls read and write.

    Raises:
        ImportError: If grpcio or protobuf is not installed.
    """
    from optuna.storages._grpc.auto_generated import api_pb2_grpc
    from optuna.storages._grpc.servicer import OptunaStorageProxyService

    add: Any = api_pb2_grpc.add_StorageServiceServicer_to_server
    add(OptunaStorageProxyService(storage), server)
