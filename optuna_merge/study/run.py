"""The life of a study: create or resume it, run its trials one by one, stop cleanly, keep the best merge on disk.

Knows Optuna and the objective; knows nothing of models and tensors, and prints nothing: a ``Watcher`` is told.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import OptunaMergeError, TrialTakenError
from optuna_merge.search.build import population_of
from optuna_merge.search.warm_start import record_warm_start
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep
from optuna_merge.storage.claims import Claim, Claims
from optuna_merge.storage.fingerprint import check_fingerprint, recorded_fingerprint
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import create_study, local_file, storage_error, storage_url
from optuna_merge.storage.outages import is_storage_error
from optuna_merge.storage.runners import running
from optuna_merge.storage.trials import best_merge, n_finished
from optuna_merge.study.folder import check_folder, claim_folder, write_best_config
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.watcher import Watcher

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


@dataclass(frozen=True)
class Outcome:
    """How a run of a study ended.

    Attributes:
        n_finished: Finished trials of the study, including those of earlier runs and other workers.
        interrupted: Whether it was asked to stop before it was done.
        timed_out: Whether its timeout ended it.
    """

    n_finished: int
    interrupted: bool = False
    timed_out: bool = False


def as_started(config: StudyConfig) -> StudyConfig:
    """The study file, with what the study was started with where the file leaves it open.

    Without ``study.n_chunks``, the number of chunks follows from the device's batch size: a study that resumes on
    another device must keep the number it has. A study that has begun does not change how it began, either.

    Raises:
        StudyError: If the storage cannot be opened.
    """
    url = storage_url(config.storage_path, config.study.storage)
    recorded = recorded_fingerprint(url, config.study.name)
    if config.study.n_chunks is None and attributes.CHUNKS in recorded:
        options = config.study.model_copy(update={"n_chunks": recorded[attributes.CHUNKS]})
        config = config.model_copy(update={"study": options})
    if config.search.start == "auto" and recorded:
        # studies from before there were ascents have no record of it
        search = config.search.model_copy(update={"start": recorded.get(attributes.SEARCH_START) or "uniform"})
        config = config.model_copy(update={"search": search})
    return config


def run_study(config: StudyConfig, objective: MergeObjective, watcher: Watcher | None = None) -> Outcome:
    """Create a study or resume it, and run it up to ``n_trials`` finished trials.

    Any number of processes may run one study at the same time, on one machine or on several; together they run
    ``n_trials``. SIGINT and SIGTERM stop this process after it has put its trial back; the next run resumes the trial
    at the chunk it had reached.

    Args:
        config: The study file.
        objective: Scores the trials.
        watcher: Is told what happens.

    Raises:
        StudyMismatchError: If the storage holds a study of this name whose scores mean something else.
        StudyError: If the storage fails, or the folder belongs to another study.
    """
    watcher = watcher or Watcher()
    name, url = config.study.name, storage_url(config.storage_path, config.study.storage)
    deadline = math.inf if config.study.timeout is None else time.monotonic() + config.study.timeout
    with _quiet_optuna(), terminable():
        try:
            if not recorded_fingerprint(url, name):
                check_folder(name, config.storage_path)
            study, storage = create_study(url, name, len(config.objectives))
            claims = Claims(study, storage, make_lock(storage.backend, name, local_file(url)))
            requeued: list[int] = []

            def requeue(alone: bool) -> None:
                with claims.lock():
                    requeued.extend(claims.requeue_lost(alone=alone))

            with running(url, name, requeue):
                with claims.lock():
                    _prepare(study, config, objective)
                    study.sampler = _sampler(study, objective)
                study.pruner = objective.pruner()
                watcher.study_opened(study, config.study.n_trials, requeued)
                outcome = _run_trials(claims, objective, watcher, deadline)
                watcher.study_closed(study)
                return outcome
        except Exception as exc:
            raise storage_error(url, exc) from exc


def _prepare(study: optuna.Study, config: StudyConfig, objective: MergeObjective) -> None:
    """Refuse a study whose scores mean something else; record what this run wants, and enqueue the baselines once."""
    check_fingerprint(study, objective.fingerprint())
    claim_folder(study, config.storage_path)
    if study.user_attrs.get(attributes.WANTED) != config.study.n_trials:
        study.set_user_attr(attributes.WANTED, config.study.n_trials)
    study.set_metric_names(list(config.objectives))
    record_warm_start(study, config, objective.space)
    if objective.begins_with_ascent:
        objective.ascend(study)
    objective.enqueue_baselines(study)
    _write_best_config(study, objective)


def _sampler(study: optuna.Study, objective: MergeObjective) -> optuna.samplers.BaseSampler:
    """The sampler, with the population size of the worker that began the study. The caller holds the lock."""
    sampler = objective.sampler(study.user_attrs.get(attributes.POPULATION))
    population = population_of(sampler)
    if attributes.POPULATION not in study.user_attrs and population is not None:
        study.set_user_attr(attributes.POPULATION, population)
    return sampler


def _run_trials(claims: Claims, objective: MergeObjective, watcher: Watcher, deadline: float) -> Outcome:
    n_trials, pause = objective.config.study.n_trials, _FIRST_PAUSE_S
    try:
        while True:
            if time.monotonic() >= deadline and n_finished(claims.study) < n_trials:
                return Outcome(n_finished(claims.study), timed_out=True)
            claim = claims.next(n_trials, objective.plan)
            if claim is not None:
                _run_trial(claims, claim, objective, watcher)
                pause = _FIRST_PAUSE_S
            elif n_finished(claims.study) >= n_trials:
                return Outcome(n_finished(claims.study))
            else:  # other workers run the rest; if one dies, its trial comes back
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
    except KeyboardInterrupt:
        return Outcome(n_finished(claims.study), interrupted=True)


def _run_trial(claims: Claims, claim: Claim, objective: MergeObjective, watcher: Watcher) -> None:
    def on_chunk(n_scored: int) -> None:
        watcher.chunk_scored(n_scored, objective.scorer.n_chunks)
        refuse_taken()

    def on_step(step: AscentStep, n_done: int, n_steps: int) -> None:
        watcher.ascent_stepped(step, n_done, n_steps)
        refuse_taken()

    def refuse_taken() -> None:
        if claim.is_taken:
            raise TrialTakenError(f"trial {claim.trial.number} has been taken over by another process")

    try:
        with claim:
            watcher.trial_started(claim.trial)
            try:
                value = objective.evaluate(claim.trial, on_chunk, on_step)
            except optuna.TrialPruned:
                watcher.trial_scored(claims.study, claim.trial)
                finished = claim.tell(None, TrialState.PRUNED)
            else:
                values = value if isinstance(value, tuple) else (value,)
                state = TrialState.COMPLETE if all(map(math.isfinite, values)) else TrialState.FAIL
                watcher.trial_scored(claims.study, claim.trial)
                finished = claim.tell(values if state == TrialState.COMPLETE else None, state)
    except (TrialTakenError, UpdateFinishedTrialError):
        claim.give_up()  # the other process finishes it
        return
    except BaseException:
        _put_back(claim)  # the storage keeps its parameters and the chunks that it reported
        raise
    is_best = False
    if finished.state == TrialState.COMPLETE:
        best = best_merge(claims.study)
        is_best = best is not None and best.number == finished.number
    if is_best:
        with claims.lock():  # another worker may have found a better one by now
            _write_best_config(claims.study, objective)
    watcher.trial_finished(claims.study, finished, is_best)


def _write_best_config(study: optuna.Study, objective: MergeObjective) -> None:
    def merge_file(trial: FrozenTrial, comment: Sequence[str]) -> str:
        return objective.merge_file(trial, comment, study)

    write_best_config(study, objective.config.storage_path, merge_file)


def _put_back(claim: Claim) -> None:
    try:
        claim.put_back()
    except Exception as exc:
        if not isinstance(exc, OptunaMergeError) and not is_storage_error(exc):
            raise
        # The storage itself failed. The next run sees that the trial's owner is gone, and takes it over.


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Silence Optuna's log lines and experimental warnings; the watcher is told the same."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM interrupt like Ctrl-C; job schedulers send it before they kill."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt  # raised here, because background processes of a shell ignore SIGINT

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
