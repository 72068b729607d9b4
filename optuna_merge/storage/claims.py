"""Who runs a trial: one process at a time, none forgotten.

A process asks for trials under the study's lock and writes its name into them. What a dead process was running is put
back in place (RUNNING -> WAITING): the next ``ask`` continues it, with its parameters and what it reported. A process
of the same machine is dead when the kernel says so. One of another machine is when its trial has not changed for the
length of a lease, by the clock of who looks: clocks are never compared.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.errors import OptunaMergeError, TrialTakenError
from optuna_merge.internals.optuna import known_state, set_known_trials, study_id, trial_id
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.lock import Lock, file_lock
from optuna_merge.storage.open import local_file
from optuna_merge.storage.outages import is_storage_error

OWNER = "optuna_merge:owner"
"""Trial, system attribute: the process that runs it."""
BEAT = "optuna_merge:beat"
"""Trial, system attribute: counts up while its process lives."""

LEASE_S = 60.0
"""How long a trial of another machine may stay as it is before its process counts as dead."""


_claims_here: set[str] = set()
"""Claims of this process that have not ended."""


@dataclass(frozen=True)
class Owner:
    """A process that runs a trial.

    Attributes:
        host: Its machine's name.
        machine: What tells its machine from others of that name, and its container from others on it; "" where the
            kernel does not say.
        pid: Its number there.
        started: When it started, in the kernel's clock ticks after boot: tells it from a later process with its
            number.
        claim: Of this one claim.
    """

    host: str
    machine: str
    pid: int
    started: int
    claim: str

    @classmethod
    def me(cls) -> Owner:
        """This process, with a new claim."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_ticks(os.getpid()) or 0, uuid.uuid4().hex)

    @property
    def is_here(self) -> bool:
        """Whether this machine knows if it runs."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def is_gone(self) -> bool:
        """Whether it surely runs the trial no more; a process of another machine is never sure to."""
        if self.is_here and self.pid == os.getpid() and self.claim not in _claims_here:
            return True
        return self.is_here and _start_ticks(self.pid) != self.started


class Claim:
    """A trial that this process runs, until it is told or put back.

    As a context it says every now and then that the process is alive.

    Attributes:
        trial: The trial.
        is_taken: Whether another process is known to have taken it over.
    """

    def __init__(self, claims: Claims, trial: optuna.Trial, owner: Owner) -> None:
        self.trial = trial
        self.is_taken = False
        self._claims = claims
        self._owner = owner
        self._ended = threading.Event()
        _claims_here.add(owner.claim)

    def __enter__(self) -> Claim:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        _claims_here.discard(self._owner.claim)

    def tell(self, value: float | Sequence[float] | None, state: TrialState) -> FrozenTrial:
        """Finish the trial, as ``study.tell`` does, if it is still this process that runs it.

        Args:
            value: One for each direction of the study; None unless complete.
            state: ``COMPLETE``, ``PRUNED`` or ``FAIL``.

        Raises:
            TrialTakenError: If another process has taken it over.
        """
        claims = self._claims
        with claims.lock():
            system_attrs = self._refuse_if_taken()
            # what this process has set is known; reading hundreds of parameters back takes longer than all the rest
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
        """Let another process, or a later one, go on with the trial; does nothing if it is finished or taken over."""
        with self._claims.lock():
            try:
                self._refuse_if_taken()
            except TrialTakenError:
                return
            _requeue(self._claims.storage, trial_id(self.trial))

    def _refuse_if_taken(self) -> dict[str, Any]:
        state, system_attrs = TrialState.FAIL, dict[str, Any]()
        with suppress(UpdateFinishedTrialError):  # what was kept of it came too late
            state, system_attrs = self._claims.storage.read_state(trial_id(self.trial))
        if state != TrialState.RUNNING or system_attrs.get(OWNER) != asdict(self._owner):
            self.is_taken = True
            raise TrialTakenError(
                f"trial {self.trial.number} must be run by one process, another one has taken it over: this one was"
                f" not heard of for {self._claims.lease_s:.0f} s"
            )
        return system_attrs

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(self._claims.lease_s / 4):
            count += 1
            try:
                self._refuse_if_taken()
                self._claims.storage.write_trial(trial_id(self.trial), [("system_attr", BEAT, count)])
            except (OptunaMergeError, UpdateFinishedTrialError):
                return
            except Exception as exc:
                if not is_storage_error(exc):
                    raise
                return  # whoever runs the trial will see it too


class Claims:
    """Hands out the trials of a study to this process and to others, on this machine and elsewhere.

    Args:
        study: The study.
        storage: Its storage.
        lock: Held by one process of the study at a time.
        lease_s: How long a trial of another machine may stay unchanged.
    """

    def __init__(self, study: optuna.Study, storage: BatchedStorage, lock: Lock, lease_s: float = LEASE_S) -> None:
        self.study = study
        self.storage = storage
        self._lock = lock
        self.lease_s = lease_s
        self._seen: dict[int, tuple[str, float]] = {}  # trial -> what was seen of it, and when first
        self._n_outages = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study's lock; waits for it, and for a storage that is away."""
        with ExitStack() as stack:
            self.storage.patiently(lambda: stack.enter_context(self._lock()))
            yield

    def next(self, n_trials: int) -> Claim | None:
        """A trial to run: one that was lost, one that waits, or a new one.

        Args:
            n_trials: Trials of the study in all.

        Returns:
            None if as many trials are finished or being run.
        """
        with self.lock():
            trials = self.study.get_trials(deepcopy=False)
            lost = self._requeue_lost(trials)
            if sum(trial.state != TrialState.WAITING for trial in trials) - len(lost) >= n_trials:
                return None
            owner = Owner.me()
            started = self._start(trials, lost, {OWNER: asdict(owner)})
            trial = optuna.Trial(self.study, started)
            # The sampler and the pruner would read the whole study once more.
            others = [other for other in trials if trial_id(other) != started and other.number not in lost]
            own = known_state(trial)
            set_known_trials(self.study, sorted([*others, own], key=lambda one: one.number))
            return Claim(self, trial, owner)

    def _start(self, trials: Sequence[FrozenTrial], lost: Sequence[int], system_attrs: dict[str, Any]) -> int:
        """As ``study.ask`` does, without another look at all trials: the first that waits, or a new one."""
        for trial in trials:
            if trial.state != TrialState.WAITING and trial.number not in lost:
                continue
            with suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(trial_id(trial), TrialState.RUNNING):
                    self.storage.write_trial(trial_id(trial), [("system_attr", *item) for item in system_attrs.items()])
                    return trial_id(trial)
        new = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=system_attrs)
        return self.storage.create_new_trial(study_id(self.study), new)

    def requeue_lost(self, *, alone: bool = False) -> list[int]:
        """Put back the running trials whose process is gone; to be called with the lock held.

        Args:
            alone: Whether nobody else runs the study: then every running trial is lost.

        Returns:
            Their numbers.
        """
        return self._requeue_lost(self.study.get_trials(deepcopy=False), alone=alone)

    def _requeue_lost(self, trials: Sequence[FrozenTrial], *, alone: bool = False) -> list[int]:
        if self.storage.n_outages != self._n_outages:  # nobody could be heard of for a while
            self._n_outages = self.storage.n_outages
            self._seen.clear()
        lost = []
        for trial in trials:
            if trial.state == TrialState.RUNNING and (alone or self._is_lost(trial)):
                _requeue(self.storage, trial_id(trial))
                lost.append(trial.number)
        return lost

    def _is_lost(self, trial: FrozenTrial) -> bool:
        owner = trial.system_attrs.get(OWNER)
        if owner is None:
            return True  # its process ended between asking and claiming, both of which the lock covers
        if Owner(**owner).is_here:
            return Owner(**owner).is_gone
        signs = json.dumps([owner, trial.system_attrs.get(BEAT), len(trial.intermediate_values)])
        before, since = self._seen.get(trial_id(trial), ("", 0.0))
        if signs != before:
            self._seen[trial_id(trial)] = (signs, time.monotonic())
            return False
        return time.monotonic() - since > self.lease_s


def _requeue(storage: BatchedStorage, trial_id: int) -> None:
    storage.set_trial_state_values(trial_id, TrialState.WAITING)


@cache
def _machine() -> str:
    """This start of this machine, and this container on it: process numbers mean something in there alone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started; None if there is none, 0 where the kernel does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self").exists() or not _answers(pid) else 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as exc:
        return isinstance(exc, PermissionError)
    return True


@contextmanager
def running(url: str, study_name: str, requeue: Callable[[bool], None]) -> Iterator[None]:
    """Note, for as long as the context lasts, that this process runs a study of a file.

    Args:
        url: As in :func:`open_storage`.
        study_name: The study.
        requeue: Called once, with whether no other process runs the study; until it returns, none can begin to. Of a
            database server nobody knows.
    """
    file = local_file(url)
    if file is None:
        requeue(False)
        yield
        return
    path = file.with_name(f"{file.name}.{study_name}.runners")
    try:
        with file_lock(path, wait=False):
            requeue(True)
    except BlockingIOError:
        requeue(False)
    with file_lock(path, shared=True):
        yield
