"""Any Optuna storage, seen through few and patient calls.

A trial of a merge has up to hundreds of parameters, and Optuna writes each in a transaction of its own. Here what is
written about a trial waits until it is reported, told or read, and goes in one; reports go in once a second. A database
that restarts is waited for. Knows how Optuna's storages lay out a trial; knows nothing of studies of merges.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.storage.outages import is_outage, reason
from optuna_merge.storage.writes import Kind, Write, read_state, write_trial

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
