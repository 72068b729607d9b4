"""Small studies whose processes are killed at any point, and what must be true of them afterwards."""

from __future__ import annotations

import multiprocessing.connection
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
from optuna.trial import TrialState

from optuna_merge.cli.options import open_started
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep
from optuna_merge.storage.open import open_study
from optuna_merge.storage.trials import FINISHED
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.study.watcher import Watcher
from tests import processes
from tests.study.test_objective import fake_objective


def table(url: str) -> list[tuple]:
    """The parts of a study's trials that must not depend on interruptions."""
    trials = open_study(url, "tiny").trials
    return [
        (t.number, t.state, t.value, t.params, t.intermediate_values, t.user_attrs.get(attributes.BASELINE))
        for t in trials
    ]


class Doomed(Watcher):
    """Kills its process by SIGKILL a few milliseconds after a chunk, whatever the process is doing then."""

    def __init__(self, n_chunks: int, delay_s: float) -> None:
        self.left = n_chunks
        self.delay_s = delay_s

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        self.left -= 1
        if self.left == 0:
            threading.Timer(self.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()


def small(write: Callable[..., Path], folder: Path, url: str | None = None, n_trials: int = 60) -> MergeObjective:
    pruner = {"name": "wilcoxon", "p_threshold": 0.3, "n_startup_steps": 3}
    options = {"name": "tiny", "n_trials": n_trials, "seed": 3, "n_chunks": 10, "pruner": pruner}
    path = write(30, "0", study=options, holdout=None)
    return fake_objective(path, **{"storage_path": folder, **({"study.storage": url} if url else {})})


class Logged(Doomed):
    """Notes when its process starts and finishes a trial; kills it too unless ``n_chunks`` is 0."""

    def __init__(self, log: Path, n_chunks: int = 0, delay_s: float = 0.0) -> None:
        super().__init__(n_chunks, delay_s)
        self.log = log

    def trial_started(self, trial: optuna.Trial) -> None:
        self.note("start", trial.number)

    def trial_finished(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, is_best: bool) -> None:
        self.note("finish", trial.number)

    def note(self, what: str, number: int) -> None:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {what} {number}\n")


def refuse_what_was_done_twice(log: Path) -> None:
    """No trial may be finished twice, and none may be started while the process that started it before is alive."""
    events = [line.split() for line in log.read_text().splitlines()]
    finished = [number for _, what, number in events if what == "finish"]
    assert len(finished) == len(set(finished))
    last: dict[str, str] = {}
    for index, (pid, what, number) in enumerate(events):
        if what == "start":
            before = last.get(number, pid)
            assert before == pid or before not in [later for later, _, _ in events[index:]], f"{number}: {events}"
            last[number] = pid


def share_and_kill(objectives: Sequence[MergeObjective], n_kills: int) -> list[int]:
    """Let a worker run each objective of one study; kill ``n_kills`` workers at any point, and replace each.

    Returns:
        The numbers of the finished trials.
    """
    chance = random.Random(7)
    log = objectives[0].config.storage_path.with_name("log")
    objective_of: dict[BaseProcess, MergeObjective] = {}

    def start(objective: MergeObjective) -> BaseProcess:
        nonlocal n_kills
        n_kills -= 1
        end = (chance.randint(1, 20), chance.uniform(0, 0.03)) if n_kills >= 0 else ()
        worker = processes.start(partial(run_study, objective.config, objective, Logged(log, *end)))
        objective_of[worker] = objective
        return worker

    workers = [start(objective) for objective in objectives]
    try:
        deadline = time.monotonic() + 300
        while workers:
            assert time.monotonic() < deadline
            multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
            for worker in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(worker)
                if worker.exitcode:
                    assert worker.exitcode == -signal.SIGKILL
                    workers.append(start(objective_of[worker]))
        assert n_kills < 0
    finally:
        for worker in workers:
            processes.kill(worker)
    refuse_what_was_done_twice(log)
    trials = open_started(objectives[0].config).trials
    assert all(len(t.intermediate_values) == 10 for t in trials if t.state == TrialState.COMPLETE)
    return [trial.number for trial in trials if trial.state in FINISHED]


class Killed(Watcher):
    """Ends the process at the n-th event of a kind, as a kill would."""

    def __init__(self, event: str, number: int) -> None:
        self._left = {event: number}

    def _count(self, event: str) -> None:
        self._left[event] = self._left.get(event, 0) - 1
        if self._left[event] == 0:
            os._exit(9)

    def trial_started(self, trial: optuna.Trial) -> None:
        self._count("start")

    def ascent_stepped(self, step: AscentStep, n_done: int, n_steps: int) -> None:
        self._count("step")

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        self._count("chunk")

    def trial_finished(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, is_best: bool) -> None:
        self._count("trial")
