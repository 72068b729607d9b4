"""Several writes about one trial in one transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import sqlalchemy
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

from optuna_merge.internals.optuna import backend_of

Kind = Literal["param", "user_attr", "system_attr", "step"]
Write = tuple[Kind, str | int, Any]
"""One thing written about a trial: a parameter (name, [internal value, distribution as JSON]), an attribute (key, JSON
value) or an intermediate value (step, value)."""


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
    backend = backend_of(storage)
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
    backend = backend_of(storage)
    if not isinstance(backend, RDBStorage):
        trial = backend.get_trial(trial_id)
        return trial.state, trial.system_attrs
    with backend.engine.connect() as connection:
        rows = connection.execute(_STATE_AND_ATTRIBUTES, {"trial": trial_id}).all()
    if not rows:
        raise KeyError(f"no trial has the id {trial_id}")
    return rows[0][0], {key: json.loads(value) for _, key, value in rows if key is not None}


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
