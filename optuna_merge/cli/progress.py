"""What ``run-study`` shows on stderr: a bar in a terminal, a line for each trial elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from optuna_merge import store
from optuna_merge.report import best_merge
from optuna_merge.watcher import Watcher


class TerminalWatcher(Watcher):
    """Shows trials, the best merge and what it has to beat, and the time left."""

    def __init__(self, *, bar: bool = True) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.fields[what]}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not (bar and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("", total=None, what="", best="", left="")
        self._n_trials = 0
        self._n_before = 0
        self._since = time.monotonic()
        self._label = ""

    def __enter__(self) -> TerminalWatcher:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Say where the study stands."""
        self._n_trials, self._n_before = n_trials, store.n_finished(study)
        self._since = time.monotonic()
        if requeued:
            self._console.print(f"taken up again: trial {', '.join(map(str, requeued))}", markup=False)
        if self._n_before:
            self._console.print(f"{self._n_before} of {n_trials} trials were finished before", markup=False)
        self._bar.update(self._task, total=n_trials, completed=self._n_before, best=_best(study))

    def trial_started(self, trial: optuna.Trial) -> None:
        """Name the trial."""
        self._label = trial.user_attrs.get(store.BASELINE, f"trial {trial.number}")
        self._bar.update(self._task, what=self._label)

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """Show how far the trial is."""
        self._bar.update(self._task, what=f"{self._label} {n_scored}/{n_chunks}")

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """One line for the trial."""
        n_finished = store.n_finished(study)
        left = self._left(n_finished)
        self._bar.update(self._task, completed=n_finished, best=_best(study), left=left)
        baseline = trial.user_attrs.get(store.BASELINE)
        name = f"trial {trial.number}" + (f" ({baseline})" if baseline else "")
        if trial.state == TrialState.COMPLETE:
            result = f"score {trial.value:.4f}"
        elif trial.state == TrialState.PRUNED:
            result = f"pruned after {len(trial.intermediate_values)} chunks"
        else:
            result = f"failed: {trial.user_attrs.get(store.FAILURE, '')}"
        mark = "  best so far" if is_best else ""
        self._console.print(
            f"[{n_finished}/{self._n_trials}] {name}  {result}  {_seconds(trial)}  {left}{mark}", markup=False
        )

    def _left(self, n_finished: int) -> str:
        done = n_finished - self._n_before
        if done <= 0:
            return ""
        seconds = (time.monotonic() - self._since) / done * max(0, self._n_trials - n_finished)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d} left"


def _seconds(trial: FrozenTrial) -> str:
    merge = trial.user_attrs.get(store.MERGE_SECONDS, 0.0)
    return f"merge {merge:.2f} s, scoring {trial.user_attrs.get(store.EVALUATION_SECONDS, 0.0):.2f} s"


def _best(study: optuna.Study) -> str:
    best = best_merge(study)
    return "" if best is None else f"best {best.value:.4f} (trial {best.number})"
