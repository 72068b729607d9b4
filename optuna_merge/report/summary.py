"""What a study found, read from its storage: the figures behind ``status`` and ``report``. Loads no torch.

Its rows are the sources, the base, the uniform merges and the best merges, each with the score on the searched
documents and, once ``holdout.py`` has scored it, on the holdout. The best merge is the one that the searched documents
say is best; the holdout chooses nothing, so that its figure is not biased upward as a maximum over many trials is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.sections import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.storage import open as store

HOLDOUT_FILE = "holdout.json"
N_BEST = 5
"""Merges that a report scores on the holdout, best first on the searched documents."""


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one model on one task; ``stderr`` is None where lm-eval estimates none."""

    metric: str
    value: float
    stderr: float | None
    n_documents: int


@dataclass(frozen=True)
class HoldoutRow:
    """One trial on the holdout.

    Attributes:
        trial: Its number.
        value: Sum of weight x metric.
        tasks: Eval task to its figure.
        difference: The best merge's value minus this one's.
        difference_stderr: Its standard error, paired by document.
        p_value: Of a difference at least as large in either direction if there were none (paired z test).
    """

    trial: int
    value: float
    tasks: dict[str, TaskFigure]
    difference: float
    difference_stderr: float
    p_value: float


@dataclass(frozen=True)
class SearchedTask:
    """A task's metric on the searched documents."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Row:
    """One model of the report: ``kind`` is ``source``, ``base``, ``uniform``, ``runner-up`` or ``best``."""

    name: str
    kind: str
    trial: int
    value: float
    tasks: dict[str, SearchedTask]
    holdout: HoldoutRow | None


@dataclass(frozen=True)
class Point:
    """A trial of the front: none is better in one objective without being worse in another.

    Attributes:
        name: Of the baseline, or ``merge``.
        trial: Its number.
        values: Objective to its value, on the searched documents.
        value: Their sum.
    """

    name: str
    trial: int
    values: dict[str, float]
    value: float


@dataclass(frozen=True)
class Summary:
    """A study at a glance.

    Attributes:
        study: Its name.
        n_trials: How many trials its latest run was asked for.
        states: Trial state to number of trials.
        rows: Sources, base, uniform merges, runners-up, best merge.
        best_trial: Number of the best merge; None if none is scored yet.
        best_value: Its score on the searched documents.
        failures: Number and reason of each failed trial.
        n_documents: Documents scored in all trials.
        seconds: Spent on merging and scoring, in all trials.
        front: With ``goal: pareto``, from the best in the first objective on; else empty.
    """

    study: str
    n_trials: int
    states: dict[str, int]
    rows: list[Row]
    best_trial: int | None
    best_value: float | None
    failures: dict[int, str]
    n_documents: int
    seconds: float
    front: list[Point]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def best_merge(study: optuna.Study) -> FrozenTrial | None:
    """The best trial that is a merge and was scored on every document; a source as it stands is none."""
    return next(iter(best_merges(study, 1)), None)


def best_merges(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """The best merge, which may be a uniform one, and the next best trials that the search drew.

    With several objectives the best has their largest sum, and the next are those on the front before all others.

    Args:
        study: The study.
        n: How many at most.
    """
    merges = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get(store.BASELINE_KIND) not in ("source", "base")
    ]
    merges.sort(key=lambda trial: (_score_or_worst(trial), -trial.number), reverse=True)
    front = {trial.number for trial in front_of(study)}
    drawn = [trial for trial in merges[1:] if store.BASELINE not in trial.user_attrs]
    drawn.sort(key=lambda trial: trial.number not in front)
    return merges[:1] + drawn[: n - 1]


def _score_or_worst(trial: FrozenTrial) -> float:
    score = store.score_of(trial)
    return -math.inf if score is None else score


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials that no other beats in every objective; empty if there is one objective only."""
    return study.best_trials if len(study.directions) > 1 else []


def summarize(study: optuna.Study, config: StudyConfig, n_best: int = 1) -> Summary:
    """Read a study, running or not.

    Args:
        study: The study.
        config: Its study file, for the order of the tasks and the folder of the holdout's figures.
        n_best: How many of the best merges get a row.
    """
    trials = study.get_trials(deepcopy=False)
    merges = best_merges(study, n_best)
    best = merges[0] if merges else None
    holdout = _read_holdout(config.storage_path / HOLDOUT_FILE, study, best)
    order = [task.name for task in config.tasks]
    rows = [
        _row(trial, trial.user_attrs[store.BASELINE], trial.user_attrs[store.BASELINE_KIND], holdout, order)
        for kind in ("source", "base", "uniform")
        for trial in trials
        if trial.state == TrialState.COMPLETE and trial.user_attrs.get(store.BASELINE_KIND) == kind
    ]
    for rank, trial in reversed(list(enumerate(merges[1:], start=2))):
        rows.append(_row(trial, f"best merge, rank {rank}", "runner-up", holdout, order))
    if best is not None:
        rows.append(_row(best, "best merge", "best", holdout, order))
    return Summary(
        study=study.study_name,
        n_trials=study.user_attrs.get(store.WANTED, config.study.n_trials),
        states=dict(Counter(trial.state.name.lower() for trial in trials)),
        rows=rows,
        best_trial=None if best is None else best.number,
        best_value=None if best is None else store.score_of(best),
        failures={
            trial.number: trial.user_attrs.get(store.FAILURE, "no reason recorded")
            for trial in trials
            if trial.state == TrialState.FAIL
        },
        n_documents=sum(trial.user_attrs.get(store.DOCUMENTS, 0) for trial in trials),
        seconds=sum(
            trial.user_attrs.get(key, 0.0)
            for trial in trials
            for key in (store.MERGE_SECONDS, store.EVALUATION_SECONDS)
        ),
        front=_front(study, config),
    )


def _front(study: optuna.Study, config: StudyConfig) -> list[Point]:
    names = study.metric_names or config.objectives
    points = [
        Point(
            trial.user_attrs.get(store.BASELINE, "merge"),
            trial.number,
            dict(zip(names, trial.values, strict=True)),
            math.fsum(trial.values),
        )
        for trial in front_of(study)
    ]
    return sorted(points, key=lambda point: ([-value for value in point.values.values()], point.trial))


def needs_holdout(study: optuna.Study, storage_path: Path, n_best: int) -> bool:
    """Whether the figures on the holdout of one of the best merges are not there yet."""
    best = best_merges(study, n_best)
    scored = _read_holdout(storage_path / HOLDOUT_FILE, study, next(iter(best), None))
    return any(trial.number not in scored for trial in best)


def verdict(summary: Summary) -> str:
    """One sentence: the best merge on the holdout against the best source and the best uniform merge.

    Which source and which uniform merge that is, the searched documents say, as they do for the best merge.

    Returns:
        Empty if none of them has been scored on the holdout.
    """
    parts = []
    for kind, title in (("source", "source"), ("uniform", "uniform merge")):
        rows = [row for row in summary.rows if row.kind == kind and row.holdout and row.trial != summary.best_trial]
        if rows:
            row = max(rows, key=lambda row: row.value)
            assert row.holdout is not None
            ahead, stderr, p_value = row.holdout.difference, row.holdout.difference_stderr, row.holdout.p_value
            how = "better" if ahead >= 0 else "worse"
            shown = f"p = {p_value:.4f}" if p_value >= 1e-4 else "p < 0.0001"
            parts.append(f"{abs(ahead):.4f} ± {stderr:.4f} {how} than the best {title} ({row.name}; {shown})")
    if not parts:
        return ""
    return (
        f"On the holdout the best merge, chosen on the searched documents, is {' and '.join(parts)}: two-sided z tests,"
        " paired by document."
    )


def markdown_table(summary: Summary) -> str:
    """The report's figures as markdown, for a model card; empty before the first complete trial."""
    if not summary.rows:
        return ""
    held = any(row.holdout for row in summary.rows)
    header = ["model", "searched documents", *(["holdout documents", "best merge − this"] if held else [])]
    lines = [f"## Results of study {summary.study}", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(header) - 1))}|"]
    for row in summary.rows:
        cells = [row.name, f"{row.value:.4f}"]
        if held and row.holdout is None:
            cells += ["", ""]
        elif row.holdout is not None:
            ahead = f"{row.holdout.difference:+.4f} ± {row.holdout.difference_stderr:.4f}"
            cells += [f"{row.holdout.value:.4f}", "" if row.kind == "best" else ahead]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "± is one standard error, paired by document."]
    if summary.front:
        names = list(summary.front[0].values)
        lines += ["", f"| front | trial | {' | '.join(names)} | sum |", f"| --- |{' ---: |' * (len(names) + 2)}"]
        for point in summary.front:
            figures = [f"{value:.4f}" for value in (*point.values.values(), point.value)]
            lines.append(f"| {point.name} | {point.trial} | {' | '.join(figures)} |")
    if sentence := verdict(summary):
        lines += ["", sentence]
    return "\n".join(lines)


def _row(trial: FrozenTrial, name: str, kind: str, holdout: dict[int, HoldoutRow], order: list[str]) -> Row:
    value = store.score_of(trial)
    assert value is not None
    prefix = f"{store.SCORE} "
    scored = [key.removeprefix(prefix) for key in trial.user_attrs if key.startswith(prefix)]
    # A storage does not keep the order of attributes. A task that counts twice is called "name (metric)".
    scored.sort(key=lambda task: (order.index(task.split(" (")[0]) if task.split(" (")[0] in order else 0, task))
    tasks = {
        task: SearchedTask(trial.user_attrs[f"{prefix}{task}"], trial.user_attrs.get(f"{store.STDERR} {task}"))
        for task in scored
    }
    return Row(name, kind, trial.number, value, tasks, holdout.get(trial.number))


def _read_holdout(file: Path, study: optuna.Study, best: FrozenTrial | None) -> dict[int, HoldoutRow]:
    """The rows by trial number; empty if there are none, or if they were made for another best merge."""
    if best is None or not file.exists():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        made_for = (data["study"], data["best_trial"], data["recipe"])
        if made_for != (study.study_name, best.number, best.user_attrs.get(store.RECIPE_DIGEST)):
            return {}  # another study may have written there, even one of that name
        rows = [
            HoldoutRow(**{**row, "tasks": {name: TaskFigure(**task) for name, task in row["tasks"].items()}})
            for row in data["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StudyError(f"{file}: must hold the holdout's figures, got {exc!r}; delete it: report writes it") from exc
    return {row.trial: row for row in rows}
