"""A storage that is written to in batches and that waits for outages.

A trial of a merge has up to hundreds of parameters, and Optuna writes each in a transaction of its own. Here they are
kept back and written together; intermediate values are written once a second. When a database restarts, calls are
repeated until it answers. This file knows when a trial is written, not how; it knows nothing of merges.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Container, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import with_cache
from optuna_merge.storage.outages import is_outage, reason
from optuna_merge.storage.wrapper import Result, StorageWrapper
from optuna_merge.storage.writes import Kind, Write, read_state, write_trial

PATIENCE_S = 300.0
"""How long to wait for a storage that does not answer."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_REPORTS_S = 1.0
"""Least time between two writes of a trial's intermediate values: a database syncs its disk for each."""


class BatchedStorage(StorageWrapper):
    """Writes trials in batches, and waits for a database that is away.

    What is set on a trial is kept in memory and written together

    - before the trial's state changes,
    - before anything is read, and by :meth:`flush`,
    - with an intermediate value that comes a second or more after the last one that was written. A trial's first
      intermediate value is written at once.

    Errors of the storage, other than outages, are raised as they are.

    Args:
        storage: Any Optuna storage.
        shown: What messages call it.
        patience_s: How long to wait for a database that does not answer, in seconds.
        batched: False: write everything at once, as a server must that writes for others.

    Attributes:
        n_outages: Calls that found the storage away, so far.
    """

    def __init__(
        self, storage: BaseStorage, shown: str, patience_s: float = PATIENCE_S, *, batched: bool = True
    ) -> None:
        super().__init__(with_cache(storage))
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

    def forget(self, trial_id: int) -> None:
        """Drop what is kept for a trial: another process runs it, or has finished it."""
        with self._lock:
            self._pending.pop(trial_id, None)
            self._reported.pop(trial_id, None)

    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None:
        """Write to a trial at once, whatever is kept; see :func:`optuna_merge.storage.writes.write_trial`."""
        self.patiently(write_trial, self.backend, trial_id, writes)

    def read_state(self, trial_id: int) -> tuple[TrialState, dict[str, Any]]:
        """Write what is kept, then read a trial's state and system attributes, and nothing else of it."""
        self.flush()
        return self.patiently(read_state, self.backend, trial_id)

    def patiently(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make a call to the storage, and repeat it while the storage is away.

        Raises:
            StudyError: If it stays away.
        """
        pause, since = _FIRST_PAUSE_S, None
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

    # --- Optuna's calls that differ

    def pass_on(self, call: Callable[..., Result], *args: Any) -> Result:
        """Make a call, and repeat it while the storage is away."""
        return self.patiently(call, *args)

    def delete_study(self, study_id: int) -> None:
        """Write what is kept, then delete."""
        self.flush()
        super().delete_study(study_id)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Keep a parameter. Unless it is kept, Optuna checks that its distribution suits the study's other trials.

        What is kept needs no check: a study of ours has one search space, and its fingerprint holds it.
        """
        if not self._batched:
            super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
            return
        self._keep(trial_id, "param", param_name, [float(param_value_internal), distribution_to_json(distribution)])

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep a user attribute."""
        self._keep(trial_id, "user_attr", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep a system attribute."""
        self._keep(trial_id, "system_attr", key, value)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Keep an intermediate value, or write it with all that is kept if the last was written a second ago."""
        with self._lock:
            self._keep(trial_id, "step", step, float(intermediate_value))
            now = time.monotonic()
            if now - self._reported.get(trial_id, -math.inf) >= _REPORTS_S:
                self._write_pending(trial_id)
                self._reported[trial_id] = now

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Write what is kept, then set the state."""
        with self._lock:
            self._write_pending(trial_id)
            self._reported.pop(trial_id, None)
        n_before = self.n_outages
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            # After an outage: the database wrote the state, and went away before it could say so.
            if self.n_outages > n_before and self.backend.get_trial(trial_id).state == state:
                return True
            raise

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Write what is kept, then read."""
        self.flush()
        return super().get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Write what is kept, then read."""
        self.flush()
        return super().get_all_trials(study_id, deepcopy, states)

    # --- what is kept

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
                del self._pending[trial_id]  # another process has finished the trial
                raise
            del self._pending[trial_id]
