"""Writing many things about one trial in one transaction.

Optuna writes each parameter and attribute in a transaction of its own. With a PostgreSQL server 1 ms away, a trial of
100 parameters then spends 1.5 s on its storage, and 0.2 s with the writes here: 13 % of a trial of ten seconds
(``python -m benchmarks.storage_speed --direct-writes``). For a journal file the same would save less than 1 %. This
file knows how Optuna's databases lay out a trial. It does not know when to write; batched.py does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import sqlalchemy
from optuna.distributions import json_to_distribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy.dialects import mysql, postgresql, sqlite

from optuna_merge.internals.optuna import backend_of, intermediate_value_columns, trial_tables

Kind = Literal["param", "user_attr", "system_attr", "step"]
Write = tuple[Kind, str | int, Any]
"""One thing to write about a trial: a parameter (name, [internal value, distribution as JSON]), an attribute (key, JSON
value) or an intermediate value (step, value)."""


@runtime_checkable
class _WritesTrials(Protocol):
    """A storage with batches of its own, such as the client of our gRPC proxy."""

    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None: ...


def write_trial(storage: BaseStorage, trial_id: int, writes: Iterable[Write]) -> None:
    """Write parameters, attributes and intermediate values of a trial.

    A database gets them in one transaction, our gRPC proxy in one call, any other storage one by one.

    Args:
        storage: Any Optuna storage.
        trial_id: A trial that is not finished.
        writes: At most one for each kind and key.

    Raises:
        KeyError: If there is no such trial.
        UpdateFinishedTrialError: If it is finished.
    """
    backend = backend_of(storage)
    if isinstance(backend, RDBStorage) and backend.engine.name in {*_ON_CONFLICT, *_ON_DUPLICATE_KEY}:
        _write_rows(backend, trial_id, list(writes))
    elif isinstance(backend, _WritesTrials):
        backend.write_trial(trial_id, list(writes))
    else:
        write_one_by_one(backend, trial_id, writes)


def write_one_by_one(storage: BaseStorage, trial_id: int, writes: Iterable[Write]) -> None:
    """Write as :func:`write_trial` does, through Optuna's public calls: one transaction for each write."""
    for kind, key, value in writes:
        name: Any = key
        if kind == "param":
            storage.set_trial_param(trial_id, name, value[0], json_to_distribution(value[1]))
        elif kind == "step":
            storage.set_trial_intermediate_value(trial_id, name, value)
        elif kind == "user_attr":
            storage.set_trial_user_attr(trial_id, name, value)
        else:
            storage.set_trial_system_attr(trial_id, name, value)


def read_state(storage: BaseStorage, trial_id: int) -> tuple[TrialState, dict[str, Any]]:
    """Read a trial's state and system attributes; a database is not asked for its parameters and values.

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


# --- databases


def _write_rows(storage: RDBStorage, trial_id: int, writes: Sequence[Write]) -> None:
    upserts = _upserts(storage.engine.name)
    with storage.engine.begin() as connection:
        state = connection.execute(_STATE, {"trial": trial_id}).scalar_one_or_none()
        if state is None:
            raise KeyError(f"no trial has the id {trial_id}")
        storage.check_trial_is_updatable(trial_id, state)
        for kind, upsert in upserts.items():
            rows = [_COLUMNS[kind](key, value) | {"trial_id": trial_id} for k, key, value in writes if k == kind]
            if rows:
                connection.execute(upsert, rows)


def _param_columns(key: str | int, value: Any) -> dict[str, Any]:
    return {"param_name": key, "param_value": value[0], "distribution_json": value[1]}


def _attribute_columns(key: str | int, value: Any) -> dict[str, Any]:
    return {"key": key, "value_json": json.dumps(value)}


def _step_columns(key: str | int, value: Any) -> dict[str, Any]:
    return {"step": key, **intermediate_value_columns(value)}


_COLUMNS: dict[Kind, Callable[[str | int, Any], dict[str, Any]]] = {
    "param": _param_columns,
    "user_attr": _attribute_columns,
    "system_attr": _attribute_columns,
    "step": _step_columns,
}
_TABLES = trial_tables()
_UNIQUE_AND_VALUES: dict[Kind, tuple[sqlalchemy.Table, tuple[str, str], tuple[str, ...]]] = {
    "param": (_TABLES.params, ("trial_id", "param_name"), ("param_value", "distribution_json")),
    "user_attr": (_TABLES.user_attrs, ("trial_id", "key"), ("value_json",)),
    "system_attr": (_TABLES.system_attrs, ("trial_id", "key"), ("value_json",)),
    "step": (
        _TABLES.intermediate_values,
        ("trial_id", "step"),
        ("intermediate_value", "intermediate_value_type"),
    ),
}
_THIS_TRIAL = _TABLES.trials.c.trial_id == sqlalchemy.bindparam("trial")
_STATE = sqlalchemy.select(_TABLES.trials.c.state).where(_THIS_TRIAL)
_STATE_AND_ATTRIBUTES = (
    sqlalchemy.select(_TABLES.trials.c.state, _TABLES.system_attrs.c.key, _TABLES.system_attrs.c.value_json)
    .select_from(_TABLES.trials.outerjoin(_TABLES.system_attrs))
    .where(_THIS_TRIAL)
)
_ON_CONFLICT = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_ON_DUPLICATE_KEY = {"mysql": mysql.insert, "mariadb": mysql.insert}


@cache
def _upserts(engine: str) -> dict[Kind, Any]:
    """For each kind the statement that adds rows, or replaces those that are there."""
    statements: dict[Kind, Any] = {}
    for kind, (table, unique, values) in _UNIQUE_AND_VALUES.items():
        if engine in _ON_CONFLICT:
            statement: Any = _ON_CONFLICT[engine](table)
            new = {name: statement.excluded[name] for name in values}
            statements[kind] = statement.on_conflict_do_update(index_elements=list(unique), set_=new)
        else:
            statement = _ON_DUPLICATE_KEY[engine](table)
            new = {name: statement.inserted[name] for name in values}
            statements[kind] = statement.on_duplicate_key_update(new)
    return statements
