"""Any Optuna storage, seen through few and patient calls.

A trial of a merge has up to hundreds of parameters, and Optuna writes each in a transaction of its own. Here what is
written about a trial waits until it is reported, told or read, and goes in one; reports go in once a second. A database
that restarts is waited for. Knows how Optuna's storages lay out a trial; knows nothing of studies of merges.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages._rdb import models
from optuna.storages.journal._storage import JournalOperation
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

from optuna_merge.errors import StudyError

Kind = Literal["param", "user_attr", "system_attr", "step"]
Write = tuple[Kind, str | int, Any]
"""One thing written about a trial: a parameter (name, [internal value, distribution as JSON]), an attribute (key, JSON
value) or an intermediate value (step, value)."""

PATIENCE_S = 300.0
"""How long a storage that does not answer is waited for."""

_LONGEST_PAUSE_S = 10.0
_REPORTS_S = 1.0
"""Least time between two writes of a trial's intermediate values: a database syncs its disk for each."""

Result = TypeVar("Result")


class BatchedStorage(BaseStorage):
    """A storage whose trials are written in batches, and which waits for a database that is away.

    What is written about a trial is kept until its next change of state or :meth:`flush`, until anything is read, or
    until an intermediate value comes a second after the last one that was written; then it is written together. The
    first intermediate value never waits. What a storage refuses is raised as it raises it.

    Args:
        storage: Any Optuna storage.
        shown: What messages call it.
        patience_s: How long a database that does not answer is waited for, in seconds.
        batched: False: keep nothing back, for a server that writes for others.

    Attributes:
        n_outages: How often it did not answer so far.
    """

    def __init__(
        self, storage: BaseStorage, shown: str, patience_s: float = PATIENCE_S, *, batched: bool = True
    ) -> None:
        self.backend = optuna.storages.get_storage(storage)
        self.n_outages = 0
        self._shown = shown
        self._patience_s = patience_s
        self._batched = batched
        self._pending: dict[int, dict[tuple[Kind, str | int], Any]] = {}
        self._reported: dict[int, float] = {}
        self._lock = threading.RLock()

    def flush(self) -> None:
        """Write what is kept."""
        with self._lock:
            for trial_id in list(self._pending):
                self._write_pending(trial_id)

    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None:
        """As :func:`write_trial`, at once and past what is kept."""
        self.patiently(write_trial, self.backend, trial_id, writes)

    def read_state(self, trial_id: int) -> tuple[TrialState, dict[str, Any]]:
        """A trial's state and system attributes, without what else makes reading it slow; writes what is kept."""
        self.flush()
        return self.patiently(read_state, self.backend, trial_id)

    # --- studies

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:  # noqa: D102
        return self.patiently(self.backend.create_new_study, directions, study_name)

    def delete_study(self, study_id: int) -> None:  # noqa: D102
        self.flush()
        self.patiently(self.backend.delete_study, study_id)

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.patiently(self.backend.set_study_user_attr, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:  # noqa: D102
        self.patiently(self.backend.set_study_system_attr, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:  # noqa: D102
        return self.patiently(self.backend.get_study_id_from_name, study_name)

    def get_study_name_from_id(self, study_id: int) -> str:  # noqa: D102
        return self.patiently(self.backend.get_study_name_from_id, study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:  # noqa: D102
        return self.patiently(self.backend.get_study_directions, study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:  # noqa: D102
        return self.patiently(self.backend.get_study_user_attrs, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:  # noqa: D102
        return self.patiently(self.backend.get_study_system_attrs, study_id)

    def get_all_studies(self) -> list[FrozenStudy]:  # noqa: D102
        return self.patiently(self.backend.get_all_studies)

    # --- trials: written

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:  # noqa: D102
        return self.patiently(self.backend.create_new_trial, study_id, template_trial)

    def set_trial_param(  # noqa: D102
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self._keep(trial_id, "param", param_name, [float(param_value_internal), distribution_to_json(distribution)])

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: D102
        self._keep(trial_id, "user_attr", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:  # noqa: D102
        self._keep(trial_id, "system_attr", key, value)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:  # noqa: D102
        with self._lock:
            self._keep(trial_id, "step", step, float(intermediate_value))
            now = time.monotonic()
            if now - self._reported.get(trial_id, -math.inf) >= _REPORTS_S:
                self._write_pending(trial_id)
                self._reported[trial_id] = now

    def set_trial_state_values(  # noqa: D102
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        with self._lock:
            self._write_pending(trial_id)
            self._reported.pop(trial_id, None)
        n_before = self.n_outages
        try:
            return self.patiently(self.backend.set_trial_state_values, trial_id, state, values)
        except UpdateFinishedTrialError:
            # the database went away after it had written the state and before it could say so
            if self.n_outages > n_before and self.backend.get_trial(trial_id).state == state:
                return True
            raise

    # --- trials: read

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:  # noqa: D102
        return self.patiently(self.backend.get_trial_id_from_study_id_trial_number, study_id, trial_number)

    def get_trial(self, trial_id: int) -> FrozenTrial:  # noqa: D102
        self.flush()
        return self.patiently(self.backend.get_trial, trial_id)

    def get_all_trials(  # noqa: D102
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        self.flush()
        return self.patiently(self.backend.get_all_trials, study_id, deepcopy, states)

    def remove_session(self) -> None:  # noqa: D102
        self.backend.remove_session()

    # ---

    def _keep(self, trial_id: int, kind: Kind, key: str | int, value: Any) -> None:
        with self._lock:
            self._pending.setdefault(trial_id, {})[kind, key] = value
            if not self._batched:
                self._write_pending(trial_id)

    def _write_pending(self, trial_id: int) -> None:
        kept = self._pending.get(trial_id)
        if kept:
            writes: list[Write] = [(kind, key, value) for (kind, key), value in kept.items()]
            try:
                self.write_trial(trial_id, writes)
            except (KeyError, UpdateFinishedTrialError):
                del self._pending[trial_id]  # it is somebody else's by now
                raise
            del self._pending[trial_id]

    def patiently(self, call: Callable[..., Result], *args: Any) -> Result:
        """What a call to the storage returns, asked again while the storage is away.

        Raises:
            StudyError: If it stays away.
        """
        pause, since = 0.1, None
        while True:
            try:
                return call(*args)
            except Exception as exc:
                if not is_outage(exc):
                    raise
                self.n_outages += 1
                since = since or time.monotonic()
                away = time.monotonic() - since
                if away >= self._patience_s:
                    raise StudyError(
                        f"storage {self._shown} must answer, it has not for {away:.0f} s ({reason(exc)}); every"
                        " finished trial is kept: bring it back and run the same command again"
                    ) from exc
                time.sleep(min(pause, max(0.01, self._patience_s - away)))
                pause = min(2 * pause, _LONGEST_PAUSE_S)


@runtime_checkable
class _WritesTrials(Protocol):
    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None: ...


def write_trial(storage: BaseStorage, trial_id: int, writes: Iterable[Write]) -> None:
    """Write parameters, attributes and intermediate values of a trial together: in one transaction where there are any.

    Args:
        storage: Any; those that have neither transactions nor batches are written one by one.
        trial_id: A trial that is not finished.
        writes: Of one kind and key, one.

    Raises:
        KeyError: If there is no such trial.
        UpdateFinishedTrialError: If it is finished.
    """
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    if isinstance(backend, RDBStorage) and backend.engine.name in {*_ON_CONFLICT, *_ON_DUPLICATE_KEY}:
        _write_rows(backend, trial_id, list(writes))
    elif isinstance(backend, JournalStorage):
        _write_lines(backend, trial_id, writes)
    elif isinstance(backend, _WritesTrials):
        backend.write_trial(trial_id, list(writes))
    else:
        for kind, key, value in writes:
            _write_one(backend, trial_id, kind, key, value)


def read_state(storage: BaseStorage, trial_id: int) -> tuple[TrialState, dict[str, Any]]:
    """A trial's state and system attributes; from a database without its parameters, values and reports.

    Raises:
        KeyError: If there is no such trial.
    """
    backend = storage._backend if isinstance(storage, _CachedStorage) else storage
    if not isinstance(backend, RDBStorage):
        trial = backend.get_trial(trial_id)
        return trial.state, trial.system_attrs
    with backend.engine.connect() as connection:
        rows = connection.execute(_STATE_AND_ATTRIBUTES, {"trial": trial_id}).all()
    if not rows:
        raise KeyError(f"no trial has the id {trial_id}")
    return rows[0][0], {key: json.loads(value) for _, key, value in rows if key is not None}


def is_outage(exc: BaseException) -> bool:
    """Whether an error says that the storage is away or busy for now, not that it cannot do what it was asked."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, sqlalchemy.exc.DBAPIError):
            if "sqlite3" in type(seen.orig).__module__:
                return "locked" in str(seen.orig)
            return seen.connection_invalidated or isinstance(
                seen, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
            )
        code = getattr(seen, "code", None)
        if callable(code) and getattr(code(), "name", None) in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):  # grpc's
            return True
        seen = seen.__cause__
    return False


def is_storage_error(exc: BaseException) -> bool:
    """Whether an error comes from a storage: its database, its file or its server."""
    kinds = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
    return isinstance(exc, kinds) or any(kind.__module__.split(".")[0] == "grpc" for kind in type(exc).__mro__)


def reason(exc: BaseException) -> str:
    """The words of a storage's or the system's error, on one line."""
    cause = exc.__cause__ or exc
    cause = getattr(cause, "orig", None) or cause
    details = getattr(cause, "details", None)
    return " ".join(str(details() if callable(details) else cause).split()) or type(cause).__name__


def _write_rows(storage: RDBStorage, trial_id: int, writes: Sequence[Write]) -> None:
    upserts = _upserts(storage.engine.name)
    with storage.engine.begin() as connection:
        state = connection.execute(_STATE, {"trial": trial_id}).scalar_one_or_none()
        if state is None:
            raise KeyError(f"no trial has the id {trial_id}")
        storage.check_trial_is_updatable(trial_id, state)
        for kind, upsert in upserts.items():
            rows = [_ROWS[kind](trial_id, key, value) for k, key, value in writes if k == kind]
            if rows:
                connection.execute(upsert, rows)


def _param_row(trial_id: int, key: str | int, value: Any) -> dict[str, Any]:
    return {"trial_id": trial_id, "param_name": key, "param_value": value[0], "distribution_json": value[1]}


def _attribute_row(trial_id: int, key: str | int, value: Any) -> dict[str, Any]:
    return {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}


def _step_row(trial_id: int, key: str | int, value: Any) -> dict[str, Any]:
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
    return {"trial_id": trial_id, "step": key, "intermediate_value": stored, "intermediate_value_type": kind}


_ROWS: dict[Kind, Callable[[int, str | int, Any], dict[str, Any]]] = {
    "param": _param_row,
    "user_attr": _attribute_row,
    "system_attr": _attribute_row,
    "step": _step_row,
}
_TABLES: dict[Kind, tuple[Any, tuple[str, str], tuple[str, ...]]] = {
    "param": (models.TrialParamModel, ("trial_id", "param_name"), ("param_value", "distribution_json")),
    "user_attr": (models.TrialUserAttributeModel, ("trial_id", "key"), ("value_json",)),
    "system_attr": (models.TrialSystemAttributeModel, ("trial_id", "key"), ("value_json",)),
    "step": (
        models.TrialIntermediateValueModel,
        ("trial_id", "step"),
        ("intermediate_value", "intermediate_value_type"),
    ),
}
_STATE = sqlalchemy.select(models.TrialModel.__table__.c.state).where(
    models.TrialModel.__table__.c.trial_id == sqlalchemy.bindparam("trial")
)
_ATTRIBUTES = models.TrialSystemAttributeModel.__table__
_STATE_AND_ATTRIBUTES = (
    sqlalchemy.select(models.TrialModel.__table__.c.state, _ATTRIBUTES.c.key, _ATTRIBUTES.c.value_json)
    .select_from(models.TrialModel.__table__.outerjoin(_ATTRIBUTES))
    .where(models.TrialModel.__table__.c.trial_id == sqlalchemy.bindparam("trial"))
)
_ON_CONFLICT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_ON_DUPLICATE_KEY = {"mysql": mysql.insert, "mariadb": mysql.insert}


@cache
def _upserts(engine: str) -> dict[Kind, Any]:
    """For each kind the statement that adds its rows, or replaces those that are there."""
    statements: dict[Kind, Any] = {}
    for kind, (model, unique, values) in _TABLES.items():
        if engine in _ON_CONFLICT:
            statement: Any = _ON_CONFLICT[engine](model.__table__)
            new = {name: statement.excluded[name] for name in values}
            statements[kind] = statement.on_conflict_do_update(index_elements=list(unique), set_=new)
        else:
            statement = _ON_DUPLICATE_KEY[engine](model.__table__)
            new = {name: statement.inserted[name] for name in values}
            statements[kind] = statement.on_duplicate_key_update(new)
    return statements


def _write_lines(storage: JournalStorage, trial_id: int, writes: Iterable[Write]) -> None:
    with storage._thread_lock:
        storage._sync_with_backend()
        trial = storage._replay_result.get_trial(trial_id)
        storage.check_trial_is_updatable(trial_id, trial.state)
        head = {"worker_id": storage._replay_result.worker_id, "trial_id": trial_id}
        storage._backend.append_logs([{**head, **line} for line in _lines(writes)])
        storage._sync_with_backend()


def _lines(writes: Iterable[Write]) -> Iterator[dict[str, Any]]:
    for kind, key, value in writes:
        if kind == "param":
            named = {"param_name": key, "param_value_internal": value[0], "distribution": value[1]}
            yield {"op_code": JournalOperation.SET_TRIAL_PARAM, **named}
        elif kind == "step":
            line = {"step": key, "intermediate_value": value}
            yield {"op_code": JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE, **line}
        elif kind == "user_attr":
            yield {"op_code": JournalOperation.SET_TRIAL_USER_ATTR, "user_attr": {key: value}}
        else:
            yield {"op_code": JournalOperation.SET_TRIAL_SYSTEM_ATTR, "system_attr": {key: value}}


def _write_one(storage: BaseStorage, trial_id: int, kind: Kind, key: Any, value: Any) -> None:
    if kind == "param":
        storage.set_trial_param(trial_id, key, value[0], json_to_distribution(value[1]))
    elif kind == "step":
        storage.set_trial_intermediate_value(trial_id, key, value)
    elif kind == "user_attr":
        storage.set_trial_user_attr(trial_id, key, value)
    else:
        storage.set_trial_system_attr(trial_id, key, value)
