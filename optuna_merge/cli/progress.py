"""What ``run-study`` and ``status --watch`` show: a live view in a terminal, one line for each trial elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optuna_merge.internals.optuna import known_state
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import AscentStep, steps_of
from optuna_merge.storage.trials import best_merge, generation, n_finished, score_of, score_or_worst
from optuna_merge.study.watcher import Watcher

PAUSE_S = 2.0
"""Seconds between two looks at a study that runs elsewhere."""


class TerminalWatcher(Watcher):
    """Shows trials, the best merge, what it has to beat, and the time left.

    Args:
        worker: Number of the worker process, which prints lines with its number and no live view. None if one process
            runs the study.
    """

    def __init__(self, worker: int | None = None) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._by = "" if worker is None else f"  worker {worker}"
        self._is_live = worker is None and sys.stderr.isatty()
        self._study: optuna.Study | None = None
        self._standing: list[tuple[str, str]] = []
        self._chunks: list[tuple[float, float | None]] = []  # of the running trial; its score and the best merge's
        self._best_chunks: Mapping[int, float] = {}
        self._n_chunks = 0
        self._n_finished = 0
        self._n_documents = 0
        self._trial: optuna.Trial | None = None
        self._n_trials = 0
        self._n_before = 0
        self._since = time.monotonic()
        self._label = ""
        self._live = Live(console=self._console, transient=True, refresh_per_second=4, get_renderable=self._view)

    def __enter__(self) -> TerminalWatcher:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        """Show where the study stands."""
        self._n_trials, self._n_before = n_trials, n_finished(study)
        self._since = time.monotonic()
        if requeued:
            self._console.print(f"continuing trial {', '.join(map(str, requeued))}", markup=False)
        if self._n_before > n_trials:
            left = f"{self._n_before} trials were finished before, more than the {n_trials} wanted: none is left to run"
            self._console.print(left, markup=False)
        elif self._n_before:
            self._console.print(f"{self._n_before} of {n_trials} trials were finished before", markup=False)
        self._study, self._n_finished = study, self._n_before
        self._standing = _standing(study)

    def trial_started(self, trial: optuna.Trial) -> None:
        """Show the name of the trial."""
        self._label = trial.user_attrs.get(attributes.BASELINE, f"trial {trial.number}")
        self._trial, self._chunks = trial, []
        if self._is_live and self._study is not None:
            best = best_merge(self._study)
            self._best_chunks = {} if best is None else best.intermediate_values

    def ascent_stepped(self, step: AscentStep, n_done: int, n_steps: int) -> None:
        """Show the expected score that each step of the ascent starts from."""
        words = f"ascent {n_done}/{n_steps}  expected score {step.expected:.4f}"
        if self._is_live:
            self._label = words
        else:
            self._console.print(f"{words}  {step.n_documents} documents, {step.seconds:.2f} s{self._by}", markup=False)

    def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
        """Show each chunk's score against the best merge's."""
        self._n_chunks = n_chunks
        if not self._is_live or self._trial is None:
            return
        own = known_state(self._trial).intermediate_values  # reading the storage would flush delayed writes
        self._chunks = [(value, self._best_chunks.get(step)) for step, value in sorted(own.items())]

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        """Print one line for the trial."""
        n_done = n_finished(study)
        left = self._time_left(n_done)
        self._n_finished, self._trial, self._chunks = n_done, None, []
        self._n_documents += trial.user_attrs.get(attributes.DOCUMENTS, 0)
        if self._is_live:
            self._standing = _standing(study)
        label = trial.user_attrs.get(attributes.BASELINE, trial.user_attrs.get(attributes.METHOD))
        if attributes.ASCENT in trial.user_attrs:
            label = "end of the ascent"
        name = f"trial {trial.number}" + (f" ({label})" if label else "")
        mark = "  best so far" if is_best else ""
        self._console.print(
            f"[{n_done}/{self._n_trials}] {name}  {_result(study, trial)}  {_seconds(trial)}{self._by}  {left}{mark}",
            markup=False,
        )

    def _view(self) -> Group:
        return _layout(
            self._n_finished,
            self._n_trials,
            self._n_documents / max(time.monotonic() - self._since, 1e-9),
            self._time_left(self._n_finished),
            [*((name, Text(words)) for name, words in self._standing), ("now", self._now())],
        )

    def _now(self) -> Text:
        text = Text(self._label)
        if not self._chunks:
            return text
        text.append(f"  chunk {len(self._chunks)}/{self._n_chunks}  ")
        for value, best in self._chunks:
            style = "dim" if best is None or value == best else "green" if value > best else "red"
            text.append("▪" if style == "dim" else "▲" if style == "green" else "▼", style=style)
        ahead = [value - best for value, best in self._chunks if best is not None]
        if ahead:
            text.append(f"  {sum(ahead) / len(ahead):+.4f} against the best merge")
        return text

    def _time_left(self, n_finished: int) -> str:
        seconds = time.monotonic() - self._since
        return time_left(seconds, n_finished - self._n_before, self._n_trials - n_finished)


class StudyView:
    """A live view of a study that runs elsewhere, read from its storage.

    Attributes:
        is_done: Whether the study has as many finished trials as its latest run was asked for.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._since = time.monotonic()
        self._n_before = n_finished(study)
        self._documents_before = self._documents()
        self.is_done = False

    def render(self) -> Group:
        """The view as of now."""
        wanted, finished = self._study.user_attrs.get(attributes.WANTED, 0), n_finished(self._study)
        self.is_done = finished >= wanted
        seconds = max(time.monotonic() - self._since, 1e-9)
        rows = [(name, Text(words)) for name, words in _standing(self._study)]
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            name = trial.user_attrs.get(attributes.BASELINE, f"trial {trial.number}")
            done = f"{len(trial.intermediate_values)} chunks"
            if attributes.ASCENT in trial.user_attrs and not trial.intermediate_values:
                done = f"ascent, {len(steps_of(trial))} steps"
            rows.append(("now", Text(f"{name}  {done}")))
        return _layout(
            finished,
            wanted,
            (self._documents() - self._documents_before) / seconds,
            time_left(seconds, finished - self._n_before, wanted - finished),
            rows,
        )

    def _documents(self) -> int:
        return sum(trial.user_attrs.get(attributes.DOCUMENTS, 0) for trial in self._study.get_trials(deepcopy=False))


def time_left(seconds: float, n_done: int, n_left: int) -> str:
    """The expected time left, such as ``1:02:03 left``; empty before the first trial.

    Args:
        seconds: Time since the start.
        n_done: Trials finished in that time.
        n_left: Trials left, which are assumed to be as fast.
    """
    if n_done <= 0:
        return ""
    minutes, rest = divmod(round(seconds / n_done * max(0, n_left)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left"


def _layout(n_done: int, n_trials: int, documents_per_s: float, left: str, rows: Sequence[tuple[str, Text]]) -> Group:
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        ProgressBar(total=max(n_trials, 1), completed=n_done, width=30),
        Text(f"{n_done}/{n_trials} trials"),
        Text(f"{documents_per_s:,.0f} documents/s"),
        Text(left),
    )
    table = Table.grid(padding=(0, 2))
    for name, words in rows:
        table.add_row(Text(name, style="bold"), words)
    return Group(bar, table)


def _standing(study: optuna.Study) -> list[tuple[str, str]]:
    """Rows of the view: the best merge, the baseline to beat, and the trials by state."""
    trials = study.get_trials(deepcopy=False)
    rows: list[tuple[str, str]] = []
    best = best_merge(study)
    rivals = [
        trial
        for trial in trials
        if trial.user_attrs.get(attributes.BASELINE_KIND) in ("source", "uniform")
        and trial.state == TrialState.COMPLETE
        and (best is None or trial.number != best.number)
    ]
    rival = max(rivals, key=score_or_worst, default=None)
    ahead = None if best is None else score_of(best)
    behind = None if rival is None else score_of(rival)
    if best is not None:
        rows.append(("best", f"{ahead:.4f}  trial {best.number}"))
    if rival is not None:
        words = f"{behind:.4f}  {rival.user_attrs[attributes.BASELINE]}"
        if ahead is not None and behind is not None:
            words += f"  ({ahead - behind:+.4f})"
        rows.append(("to beat", words))
    generations = [found for trial in trials if (found := generation(trial)) is not None]
    states = Counter(trial.state for trial in trials)
    words = (
        f"{states[TrialState.PRUNED]} pruned, {states[TrialState.FAIL]} failed, {states[TrialState.RUNNING]} running"
    )
    rows.append(("trials", words + (f"; generation {max(generations)}" if generations else "")))
    return rows


def _result(study: optuna.Study, trial: FrozenTrial) -> str:
    if trial.state == TrialState.PRUNED and attributes.RACE_CHUNKS in trial.user_attrs:
        estimate = trial.user_attrs.get(attributes.PAIRED_ESTIMATE, math.nan)
        return f"race: estimate {estimate:.4f} after {len(trial.intermediate_values)} chunks"
    if trial.state == TrialState.PRUNED:
        return f"pruned after {len(trial.intermediate_values)} chunks"
    if trial.state != TrialState.COMPLETE:
        return f"failed: {trial.user_attrs.get(attributes.FAILURE, '')}"
    values = trial.values or []
    result = f"score {math.fsum(values):.4f}"
    if len(values) > 1:
        parts = [f"{name} {value:.4f}" for name, value in zip(study.metric_names or [], values, strict=False)]
        result += f" ({', '.join(parts)})"
    return result


def _seconds(trial: FrozenTrial) -> str:
    merge = trial.user_attrs.get(attributes.MERGE_SECONDS, 0.0)
    return f"merge {merge:.2f} s, scoring {trial.user_attrs.get(attributes.EVALUATION_SECONDS, 0.0):.2f} s"
