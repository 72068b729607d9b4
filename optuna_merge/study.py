"""The life of a study: create or resume it, run its trials one by one, stop cleanly, keep the best recipe on disk.

Knows Optuna and the objective; prints nothing. Whoever watches passes a ``Watcher``.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from optuna_merge import store
from optuna_merge.config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.objective import MergeObjective
from optuna_merge.report import best_merge

BEST_CONFIG = "best_config.yaml"


class Watcher:
    """What somebody who watches a study is told. Does nothing; subclass what is of interest."""

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Before the first trial. ``requeued``: trials that an earlier process left unfinished."""

    def trial_started(self, trial: optuna.Trial) -> None:
        """Before a trial is merged."""

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """After each chunk of documents."""

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """After a trial is told. ``is_best``: it is the best merge so far, and ``best_config.yaml`` holds it."""


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended.

    Attributes:
        n_finished: Trials of the study that are finished, those of earlier runs included.
        interrupted: It was asked to stop before it was done.
        timed_out: Its timeout ended it.
    """

    n_finished: int
    interrupted: bool = False
    timed_out: bool = False


def as_started(config: StudyConfig) -> StudyConfig:
    """A study file that cuts the documents into as many chunks as its study was started with.

    Where the file does not say, their number follows the batches of the device; a study may go on on another one.

    Raises:
        StudyError: If the storage cannot be opened.
    """
    url = store.storage_url(config.storage_path, config.study.storage)
    recorded = store.recorded_fingerprint(url, config.study.name)
    if config.study.n_chunks is not None or store.CHUNKS not in recorded:
        return config
    options = config.study.model_copy(update={"n_chunks": recorded[store.CHUNKS]})
    return config.model_copy(update={"study": options})


def run_study(config: StudyConfig, objective: MergeObjective, watcher: Watcher | None = None) -> Outcome:
    """Run a study up to its ``n_trials``, whatever part of it is done.

    SIGINT and SIGTERM end it after putting the trial in flight back; the next run takes it up where it was.

    Args:
        config: The study file.
        objective: What scores a trial.
        watcher: Is told what happens.

    Raises:
        StudyLockedError: If another process runs it.
        StudyMismatchError: If the storage holds a study whose scores mean something else.
        StudyError: If the storage fails.
    """
    watcher = watcher or Watcher()
    url = store.storage_url(config.storage_path, config.study.storage)
    deadline = math.inf if config.study.timeout is None else time.monotonic() + config.study.timeout
    with store.run_lock(url, config.study.name), _quiet_optuna(), _terminable():
        try:
            study = store.open_study(url, config.study.name, create=True)
            study.sampler, study.pruner = objective.sampler(), objective.pruner()
            store.check_fingerprint(study, objective.fingerprint())
            study.set_user_attr(store.WANTED, config.study.n_trials)
            study.set_metric_names(["score"])
            requeued = store.requeue_lost(study, alone=store.local_file(url) is not None)
            objective.enqueue_baselines(study)
            write_best_config(study, objective)
            watcher.study_opened(study, config.study.n_trials, requeued)
            return _run_trials(study, objective, watcher, deadline)
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as exc:
            raise StudyError(
                f"storage {url} must stay writable, got {store.reason(exc)}; every finished trial is kept:"
                " mend it and run the same command again"
            ) from exc


def write_best_config(study: optuna.Study, objective: MergeObjective) -> Path | None:
    """Write the best merge so far as a mergekit file, atomically.

    Returns:
        The file; None if no merge has been scored yet.

    Raises:
        StudyError: If it cannot be written; the file of the best merge before is left as it was.
    """
    best = best_merge(study)
    if best is None:
        return None
    path = objective.config.storage_path / BEST_CONFIG
    partial = path.with_name(f"{path.name}.partial")
    comment = [f"study {study.study_name}, trial {best.number}, score {best.value}"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(objective.merge_file(best, comment), encoding="utf-8")
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise StudyError(
            f"{path}: best merge must be writable, got {store.reason(exc)}; make room and run the same command again"
        ) from exc
    return path


def _run_trials(study: optuna.Study, objective: MergeObjective, watcher: Watcher, deadline: float) -> Outcome:
    objective.on_chunk = lambda n: watcher.chunk_scored(n, objective.scorer.n_chunks)
    try:
        while store.n_finished(study) < objective.config.study.n_trials:
            if time.monotonic() >= deadline:
                return Outcome(store.n_finished(study), timed_out=True)
            _run_trial(study, objective, watcher)
        return Outcome(store.n_finished(study))
    except KeyboardInterrupt:
        return Outcome(store.n_finished(study), interrupted=True)
    finally:
        objective.on_chunk = lambda _: None


def _run_trial(study: optuna.Study, objective: MergeObjective, watcher: Watcher) -> None:
    trial = study.ask()
    try:
        store.claim(study, trial._trial_id)
        watcher.trial_started(trial)
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            finished = study.tell(trial, state=TrialState.PRUNED)
        else:
            state = TrialState.COMPLETE if math.isfinite(value) else TrialState.FAIL
            finished = study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)
    except BaseException:
        # Nothing of the trial is lost: its parameters and the chunks that it reported stay in the storage.
        _put_back(study, trial)
        raise
    best = best_merge(study)
    is_best = best is not None and best.number == trial.number
    if is_best:
        write_best_config(study, objective)
    watcher.trial_finished(study, finished, is_best)


def _put_back(study: optuna.Study, trial: optuna.Trial) -> None:
    try:
        frozen = study._storage.get_trial(trial._trial_id)
        if frozen.state == TrialState.RUNNING:
            store.requeue(study, frozen)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
        pass  # the storage itself failed: the next run finds the trial by its owner


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Optuna's log lines and experimental warnings say nothing here that the watcher is not told."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def _terminable() -> Iterator[None]:
    """Make SIGTERM end a study as Ctrl-C does; a scheduler sends it before it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
