"""What a study found, read from its storage: the figures behind ``status`` and ``report``. Loads no torch.

Its rows are the sources, the base, the uniform merges and the best merges, each with the score on the searched
documents and, once ``holdout.py`` has scored it, on the holdout. The best merge is the one that the searched documents
say is best; the holdout chooses nothing, so that its figure is not biased upward as a maximum over many trials is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.sections import StudyConfig
from optuna_merge.storage import attributes
from optuna_merge.storage.trials import best_merges, front_of, score_of
from optuna_merge.study.holdout_file import HOLDOUT_FILE, HoldoutRow, _read_holdout


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
        _row(trial, trial.user_attrs[attributes.BASELINE], trial.user_attrs[attributes.BASELINE_KIND], holdout, order)
        for kind in ("source", "base", "uniform")
        for trial in trials
        if trial.state == TrialState.COMPLETE and trial.user_attrs.get(attributes.BASELINE_KIND) == kind
    ]
    for rank, trial in reversed(list(enumerate(merges[1:], start=2))):
        rows.append(_row(trial, f"best merge, rank {rank}", "runner-up", holdout, order))
    if best is not None:
        rows.append(_row(best, "best merge", "best", holdout, order))
    return Summary(
        study=study.study_name,
        n_trials=study.user_attrs.get(attributes.WANTED, config.study.n_trials),
        states=dict(Counter(trial.state.name.lower() for trial in trials)),
        rows=rows,
        best_trial=None if best is None else best.number,
        best_value=None if best is None else score_of(best),
        failures={
            trial.number: trial.user_attrs.get(attributes.FAILURE, "no reason recorded")
            for trial in trials
            if trial.state == TrialState.FAIL
        },
        n_documents=sum(trial.user_attrs.get(attributes.DOCUMENTS, 0) for trial in trials),
        seconds=sum(
            trial.user_attrs.get(key, 0.0)
            for trial in trials
            for key in (attributes.MERGE_SECONDS, attributes.EVALUATION_SECONDS)
        ),
        front=_front(study, config),
    )


def _front(study: optuna.Study, config: StudyConfig) -> list[Point]:
    names = study.metric_names or config.objectives
    points = [
        Point(
            trial.user_attrs.get(attributes.BASELINE, "merge"),
            trial.number,
            dict(zip(names, trial.values, strict=True)),
            math.fsum(trial.values),
        )
        for trial in front_of(study)
    ]
    return sorted(points, key=lambda point: ([-value for value in point.values.values()], point.trial))


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
    value = score_of(trial)
    assert value is not None
    prefix = f"{attributes.SCORE} "
    scored = [key.removeprefix(prefix) for key in trial.user_attrs if key.startswith(prefix)]
    # A storage does not keep the order of attributes. A task that counts twice is called "name (metric)".
    scored.sort(key=lambda task: (order.index(task.split(" (")[0]) if task.split(" (")[0] in order else 0, task))
    tasks = {
        task: SearchedTask(trial.user_attrs[f"{prefix}{task}"], trial.user_attrs.get(f"{attributes.STDERR} {task}"))
        for task in scored
    }
    return Row(name, kind, trial.number, value, tasks, holdout.get(trial.number))


def standing(summary: Summary) -> str:
    """One sentence: the best merge so far, and what it beats or has to beat."""
    rivals = [row for row in summary.rows if row.kind in ("source", "uniform") and row.trial != summary.best_trial]
    if summary.best_value is None:
        return "No merge has been scored yet."
    text = f"Best merge: trial {summary.best_trial}, {summary.best_value:.4f} on the searched documents"
    if not rivals:
        return f"{text}."
    rival = max(rivals, key=lambda row: row.value)
    ahead = summary.best_value - rival.value
    return f"{text}, {abs(ahead):.4f} {'above' if ahead >= 0 else 'below'} {rival.name} ({rival.value:.4f})."
