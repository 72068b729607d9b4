"""What is told to those who watch a study while it runs: the terminal, the dashboard, trackers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


class Watcher:
    """What somebody who watches a study is told. Does nothing; subclass what is of interest."""

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Before the first trial. ``requeued``: trials that an earlier process left unfinished."""

    def trial_started(self, trial: optuna.Trial) -> None:
        """Before a trial is merged."""

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """After each chunk of documents."""

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """After a trial is scored, pruned or failed, and before it is told: its attributes can still be set."""

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """After a trial is told. ``is_best``: it is the best merge so far, and ``best_config.yaml`` holds it."""

    def study_closed(self, study: optuna.Study) -> None:
        """After the last trial of this run, also when it was interrupted."""


class Watchers(Watcher):
    """Several, told in order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.study_opened(study, n_trials, requeued)

    def trial_started(self, trial: optuna.Trial) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.trial_started(trial)

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.chunk_scored(n_scored, n_chunks)

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.trial_scored(study, trial)

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.trial_finished(study, trial, is_best)

    def study_closed(self, study: optuna.Study) -> None:
        """Tell each."""
        for watcher in self._watchers:
            watcher.study_closed(study)
