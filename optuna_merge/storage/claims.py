"""Claims: each trial is run by one process at a time, and the trials of dead processes are taken up again.

A process asks for a trial while it holds the study's lock, and records itself in the trial as its owner. When the owner
dies, its trial goes from RUNNING back to WAITING. The next process that asks continues it, with its parameters and the
intermediate values that it has.

A process on this machine is dead when the kernel says so. A process on another machine is presumed dead when its trial
has not changed for a lease (60 s) on the observer's clock. Clocks of different machines are never compared.

This file knows owners, locks and the states of trials; it knows nothing of merges.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import OptunaMergeError, TrialTakenError
from optuna_merge.internals.optuna import backend_of, known_state, set_known_trials, study_id, trial_id
from optuna_merge.storage.ascent import is_ascending
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.lock import Lock
from optuna_merge.storage.outages import is_storage_error
from optuna_merge.storage.owner import OPEN_CLAIMS, Owner

OWNER = "optuna_merge:owner"
"""System attribute of a trial: the :class:`Owner` that runs it, or ran it last."""
BEAT = "optuna_merge:beat"
"""System attribute of a trial: its heartbeat, a number that its owner increases."""

LEASE_S = 60.0
"""How long a trial of another machine may stay unchanged before its owner is presumed dead."""
_BEATS_PER_LEASE = 4


@dataclass(frozen=True)
class Planned:
    """A trial that a study wants next.

    Attributes:
        params: Its parameters; None: the sampler draws them when the trial starts.
        user_attrs: Its user attributes.
    """

    params: Mapping[str, float] | None = None
    user_attrs: Mapping[str, Any] = field(default_factory=dict)


Plan = Callable[[Sequence[FrozenTrial]], Sequence[Planned] | None]
"""What to do, given all trials, when none waits: enqueue some; none: wait for those that run; None: draw a new one."""


def enqueue(study: optuna.Study, planned: Sequence[Planned]) -> None:
    """Let trials wait for whoever asks next. If it is interrupted, the first ones are enqueued."""
    for one in planned:
        if one.params is None:
            study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, user_attrs=dict(one.user_attrs)))
        else:
            study.enqueue_trial(dict(one.params), user_attrs=dict(one.user_attrs))


class Claims:
    """Hands out the trials of a study, to this process and to others on any machine.

    Args:
        study: The study.
        storage: Its storage.
        lock: The study's lock; one process holds it at a time.
        lease_s: How long a trial of another machine may stay unchanged, in seconds.
    """

    def __init__(self, study: optuna.Study, storage: BatchedStorage, lock: Lock, lease_s: float = LEASE_S) -> None:
        self.study = study
        self.storage = storage
        self.lease_s = lease_s
        self._lock = lock
        self._seen: dict[int, tuple[str, float]] = {}  # trial id -> signs of life, and when they were first seen
        self._n_outages = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study's lock; waits for it, and for a storage that is away."""
        with ExitStack() as stack:
            self.storage.patiently(lambda: stack.enter_context(self._lock()))
            yield

    def next(self, n_trials: int, plan: Plan = lambda _: None) -> Claim | None:
        """Claim a trial: one whose process died, one that waits, or a new one.

        Args:
            n_trials: Trials that the study shall have in all.
            plan: Is asked for the new ones.

        Returns:
            None if that many trials are finished or running, or if only new ones are left while the ascent, which says
            where they are drawn, is under way, or the plan wants to wait.
        """
        with self.lock():
            trials = self.study.get_trials(deepcopy=False)
            lost = self._requeue_lost(trials)
            if sum(trial.state != TrialState.WAITING for trial in trials) - len(lost) >= n_trials:
                return None
            if not lost and all(trial.state != TrialState.WAITING for trial in trials):
                planned = [] if is_ascending(trials) else plan(trials)
                if planned is not None:
                    enqueue(self.study, planned)
                    trials = self.study.get_trials(deepcopy=False)
                    if not planned:
                        return None
            owner = Owner.me(direct=not isinstance(backend_of(self.storage.backend), GrpcStorageProxy))
            started = self._start(trials, lost, {OWNER: asdict(owner)})
            trial = optuna.Trial(self.study, started)
            # Without this the sampler and the pruner would read the whole study again.
            others = [other for other in trials if trial_id(other) != started and other.number not in lost]
            own = known_state(trial)
            set_known_trials(self.study, sorted([*others, own], key=lambda one: one.number))
            return Claim(self, trial, owner)

    def requeue_lost(self, *, alone: bool = False) -> list[int]:
        """Put back the running trials whose process is dead. The caller holds the lock.

        Args:
            alone: Whether no other process runs the study; then every running trial is put back, except those of
                processes that came through ``serve-storage``: one that waits for its server to come back looks absent.

        Returns:
            Numbers of the trials that were put back.
        """
        return self._requeue_lost(self.study.get_trials(deepcopy=False), alone=alone)

    def _requeue_lost(self, trials: Sequence[FrozenTrial], *, alone: bool = False) -> list[int]:
        if self.storage.n_outages != self._n_outages:  # no process could give a sign of life in the meantime
            self._n_outages = self.storage.n_outages
            self._seen.clear()
        lost = []
        for trial in trials:
            if trial.state == TrialState.RUNNING and self._is_lost(trial, alone=alone):
                self.put_back(trial_id(trial))
                lost.append(trial.number)
        return lost

    def _is_lost(self, trial: FrozenTrial, *, alone: bool) -> bool:
        owner = trial.system_attrs.get(OWNER)
        if owner is None:
            return True  # its process died between asking and recording itself, all under the lock that we hold now
        if alone and Owner(**owner).direct:
            return True
        if Owner(**owner).is_here:
            return Owner(**owner).is_gone
        signs = json.dumps([owner, trial.system_attrs.get(BEAT), len(trial.intermediate_values)])
        before, since = self._seen.get(trial_id(trial), ("", 0.0))
        if signs != before:
            self._seen[trial_id(trial)] = (signs, time.monotonic())
            return False
        return time.monotonic() - since > self.lease_s

    def _start(self, trials: Sequence[FrozenTrial], lost: Sequence[int], system_attrs: dict[str, Any]) -> int:
        """Start the first trial that waits, or a new one: as ``study.ask`` does, without reading all trials again.

        Returns:
            The trial's id.
        """
        for trial in trials:
            if trial.state != TrialState.WAITING and trial.number not in lost:
                continue
            with suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(trial_id(trial), TrialState.RUNNING):
                    self.storage.write_trial(trial_id(trial), [("system_attr", *item) for item in system_attrs.items()])
                    return trial_id(trial)
        new = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=system_attrs)
        return self.storage.create_new_trial(study_id(self.study), new)

    def put_back(self, trial_id: int) -> None:
        """Let a running trial wait for the next process that asks. The caller holds the lock."""
        self.storage.set_trial_state_values(trial_id, TrialState.WAITING)


class Claim:
    """A trial that this process runs, until it finishes the trial or puts it back.

    Used as a context, it updates the trial's heartbeat.

    Attributes:
        trial: The trial.
        is_taken: Whether another process is known to have taken the trial over.
    """

    def __init__(self, claims: Claims, trial: optuna.Trial, owner: Owner) -> None:
        self.trial = trial
        self.is_taken = False
        self._claims = claims
        self._owner = owner
        self._ended = threading.Event()
        OPEN_CLAIMS.add(owner.claim)

    def __enter__(self) -> Claim:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        OPEN_CLAIMS.discard(self._owner.claim)

    def tell(self, value: float | Sequence[float] | None, state: TrialState) -> FrozenTrial:
        """Finish the trial as ``study.tell`` does, but only if this process still owns it.

        Args:
            value: One value for each direction of the study if the trial is complete; None otherwise.
            state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.

        Returns:
            The finished trial.

        Raises:
            TrialTakenError: If another process has taken the trial over.
        """
        claims = self._claims
        with claims.lock():
            system_attrs = self._refuse_if_taken()
            # Reading hundreds of parameters back takes longer than all the rest; this process knows what it has set.
            trial = copy.copy(known_state(self.trial))
            trial.system_attrs = system_attrs
            if state == TrialState.PRUNED and trial.last_step is not None:
                value = trial.intermediate_values[trial.last_step]
            values = None if value is None else list(value) if isinstance(value, Sequence) else [value]
            try:
                claims.study.sampler.after_trial(claims.study, trial, state, values)
            finally:
                claims.storage.set_trial_state_values(trial_id(trial), state, values)
            set_known_trials(claims.study, None)
            trial.state, trial.values = state, values
            return trial

    def put_back(self) -> None:
        """Let the next process that asks continue the trial. Does nothing if it is finished or was taken over."""
        with self._claims.lock():
            try:
                self._refuse_if_taken()
            except TrialTakenError:
                return
            self._claims.put_back(trial_id(self.trial))

    def give_up(self) -> None:
        """Leave the trial to the process that has taken it over; what was not written yet is dropped."""
        self._claims.storage.forget(trial_id(self.trial))

    def _refuse_if_taken(self) -> dict[str, Any]:
        """Check that this process still owns the trial; returns the trial's system attributes."""
        state, system_attrs = TrialState.FAIL, dict[str, Any]()
        with suppress(UpdateFinishedTrialError):  # another process finished the trial; what we kept of it is dropped
            state, system_attrs = self._claims.storage.read_state(trial_id(self.trial))
        if state != TrialState.RUNNING or system_attrs.get(OWNER) != asdict(self._owner):
            self.is_taken = True
            raise TrialTakenError(
                f"trial {self.trial.number} must be run by one process, another one has taken it over: this one gave no"
                f" sign of life for {self._claims.lease_s:.0f} s"
            )
        return system_attrs

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._claims.lease_s / _BEATS_PER_LEASE):
            count += 1
            try:
                self._refuse_if_taken()
                self._claims.storage.write_trial(trial_id(self.trial), [("system_attr", BEAT, count)])
            except (OptunaMergeError, UpdateFinishedTrialError):
                return
            except Exception as exc:
                if not is_storage_error(exc):
                    raise
                return  # the thread that runs the trial will meet the same error
