"""The life of a study: create or resume it, run its trials one by one, stop cleanly, keep the best recipe on disk.

Knows Optuna and the objective; prints nothing. Whoever watches passes a ``Watcher``.
"""

from __future__ import annotations

import math
import re
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
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from optuna_merge.config.sections import StudyConfig
from optuna_merge.errors import OptunaMergeError, StudyError, TrialTakenError
from optuna_merge.search.samplers import StableCmaEsSampler
from optuna_merge.search.warm_start import record_warm_start
from optuna_merge.storage import attributes
from optuna_merge.storage.claims import Claim, Claims, running
from optuna_merge.storage.fingerprint import check_fingerprint, recorded_fingerprint
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import create_study, local_file, storage_error, storage_url
from optuna_merge.storage.outages import is_storage_error, reason
from optuna_merge.storage.trials import best_merge, n_finished, score_of
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.watcher import Watcher

BEST_CONFIG = "best_config.yaml"

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


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
    url = storage_url(config.storage_path, config.study.storage)
    recorded = recorded_fingerprint(url, config.study.name)
    if config.study.n_chunks is not None or attributes.CHUNKS not in recorded:
        return config
    options = config.study.model_copy(update={"n_chunks": recorded[attributes.CHUNKS]})
    return config.model_copy(update={"study": options})


def run_study(config: StudyConfig, objective: MergeObjective, watcher: Watcher | None = None) -> Outcome:
    """Run a study up to its ``n_trials``, whatever part of it is done.

    Any number of processes may run one study at the same time, on one machine or on several; together they run
    ``n_trials``. SIGINT and SIGTERM end this one after putting its trial back; the next run takes it up where it was.

    Args:
        config: The study file.
        objective: What scores a trial.
        watcher: Is told what happens.

    Raises:
        StudyMismatchError: If the storage holds a study whose scores mean something else.
        StudyError: If the storage fails.
    """
    watcher = watcher or Watcher()
    name, url = config.study.name, storage_url(config.storage_path, config.study.storage)
    deadline = math.inf if config.study.timeout is None else time.monotonic() + config.study.timeout
    with _quiet_optuna(), terminable():
        try:
            study, storage = create_study(url, name, len(config.objectives))
            claims = Claims(study, storage, make_lock(storage.backend, name, local_file(url)))
            requeued: list[int] = []

            def requeue(alone: bool) -> None:
                with claims.lock():
                    requeued.extend(claims.requeue_lost(alone=alone))

            with running(url, name, requeue):
                with claims.lock():
                    check_fingerprint(study, objective.fingerprint())
                    if study.user_attrs.get(attributes.WANTED) != config.study.n_trials:
                        study.set_user_attr(attributes.WANTED, config.study.n_trials)
                    study.set_metric_names(list(config.objectives))
                    record_warm_start(study, config, objective.space)
                    objective.enqueue_baselines(study)
                    write_best_config(study, objective)
                study.sampler, study.pruner = _sampler(study, objective), objective.pruner()
                watcher.study_opened(study, config.study.n_trials, requeued)
                outcome = _run_trials(claims, objective, watcher, deadline)
                watcher.study_closed(study)
                return outcome
        except Exception as exc:
            raise storage_error(url, exc) from exc


def write_best_config(study: optuna.Study, objective: MergeObjective) -> Path | None:
    """Write the best merge so far as a mergekit file, atomically.

    Returns:
        The file; None if no merge has been scored yet.

    Raises:
        StudyError: If it cannot be written, or is of another study; the file that is there is left as it was.
    """
    path = objective.config.storage_path / BEST_CONFIG
    _refuse_another(path, study.study_name)
    best = best_merge(study)
    if best is None:
        return None
    partial = path.with_name(f"{path.name}.partial")
    comment = [f"study {study.study_name}, trial {best.number}, score {score_of(best):.6g}"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(objective.merge_file(best, comment), encoding="utf-8")
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True)
        raise StudyError(
            f"{path}: best merge must be writable, got {reason(exc)}; make room and run the same command again"
        ) from exc
    return path


def _refuse_another(path: Path, study_name: str) -> None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            found = re.match(r"# study (.*), trial \d+, score ", file.readline())
    except OSError:
        return
    if found and found[1] != study_name:
        raise StudyError(
            f"{path}: must be of study {study_name!r}, got that of study {found[1]!r}; choose another storage_path"
        )


def _sampler(study: optuna.Study, objective: MergeObjective) -> optuna.samplers.BaseSampler:
    """The sampler, with the population that the study was begun with."""
    sampler = objective.sampler(study.user_attrs.get(attributes.POPULATION))
    if attributes.POPULATION not in study.user_attrs and isinstance(sampler, StableCmaEsSampler):
        study.set_user_attr(attributes.POPULATION, sampler.population_size)
    return sampler


def _run_trials(claims: Claims, objective: MergeObjective, watcher: Watcher, deadline: float) -> Outcome:
    n_trials, pause = objective.config.study.n_trials, _FIRST_PAUSE_S
    try:
        while True:
            if time.monotonic() >= deadline and n_finished(claims.study) < n_trials:
                return Outcome(n_finished(claims.study), timed_out=True)
            claim = claims.next(n_trials)
            if claim is not None:
                _run_trial(claims, claim, objective, watcher)
                pause = _FIRST_PAUSE_S
            elif n_finished(claims.study) >= n_trials:
                return Outcome(n_finished(claims.study))
            else:  # the rest is run by others; it comes back if they die
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
    except KeyboardInterrupt:
        return Outcome(n_finished(claims.study), interrupted=True)


def _run_trial(claims: Claims, claim: Claim, objective: MergeObjective, watcher: Watcher) -> None:
    def on_chunk(n_scored: int) -> None:
        watcher.chunk_scored(n_scored, objective.scorer.n_chunks)
        if claim.is_taken:
            raise TrialTakenError(f"trial {claim.trial.number} is run by another process by now")

    objective.on_chunk = on_chunk
    try:
        with claim:
            watcher.trial_started(claim.trial)
            try:
                value = objective(claim.trial)
            except optuna.TrialPruned:
                watcher.trial_scored(claims.study, claim.trial)
                finished = claim.tell(None, TrialState.PRUNED)
            else:
                values = value if isinstance(value, tuple) else (value,)
                state = TrialState.COMPLETE if all(map(math.isfinite, values)) else TrialState.FAIL
                watcher.trial_scored(claims.study, claim.trial)
                finished = claim.tell(values if state == TrialState.COMPLETE else None, state)
    except (TrialTakenError, UpdateFinishedTrialError):
        return  # it is not lost: the other one finishes it
    except BaseException:
        # Nothing of the trial is lost: its parameters and the chunks that it reported stay in the storage.
        _put_back(claim)
        raise
    finally:
        objective.on_chunk = lambda _: None
    is_best = False
    if finished.state == TrialState.COMPLETE:
        best = best_merge(claims.study)
        is_best = best is not None and best.number == finished.number
    if is_best:
        with claims.lock():  # another worker may have found a better one by now
            write_best_config(claims.study, objective)
    watcher.trial_finished(claims.study, finished, is_best)


def _put_back(claim: Claim) -> None:
    try:
        claim.put_back()
    except Exception as exc:
        if not isinstance(exc, OptunaMergeError) and not is_storage_error(exc):
            raise
        # the storage itself failed: the next run finds the trial by its owner


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
def terminable() -> Iterator[None]:
    """Make SIGTERM end what runs as Ctrl-C does; a scheduler sends it before it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt  # itself, not by SIGINT: a shell's background processes ignore that

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
