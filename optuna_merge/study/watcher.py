"""The seam between a running study and those who show it: the terminal, the dashboard, trackers.

Knows which events there are; knows nothing of who listens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from optuna_merge.storage.ascent import AscentStep


class Watcher:
    """Is told of each event of a running study. Does nothing itself: override the events of interest."""

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Before the first trial. ``requeued`` are the trials that earlier processes left unfinished."""

    def trial_started(self, trial: optuna.Trial) -> None:
        """Before a trial is merged."""

    def ascent_stepped(self, step: AscentStep, n_done: int, n_steps: int) -> None:
        """After each step of the ascent, with which a study may begin, that is taken and recorded."""

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """After each chunk of documents that is scored and reported."""

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """After a trial is scored, pruned or failed, but before it is finished: its attributes can still be set."""

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """After a trial is finished. ``is_best``: it is the best merge so far, and ``best_config.yaml`` holds it."""

    def study_closed(self, study: optuna.Study) -> None:
        """After the last trial of this run, even if the run was interrupted."""


class Watchers(Watcher):
    """Several watchers as one; each event is passed on in their order."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.study_opened(study, n_trials, requeued)

    def trial_started(self, trial: optuna.Trial) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.trial_started(trial)

    def ascent_stepped(self, step: AscentStep, n_done: int, n_steps: int) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.ascent_stepped(step, n_done, n_steps)

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.chunk_scored(n_scored, n_chunks)

    def trial_scored(self, study: optuna.Study, trial: optuna.Trial) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.trial_scored(study, trial)

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.trial_finished(study, trial, is_best)

    def study_closed(self, study: optuna.Study) -> None:
        """Pass it on."""
        for watcher in self._watchers:
            watcher.study_closed(study)
