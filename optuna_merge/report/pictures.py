"""What a study looks like: its pictures as plain data, drawn by ``svg.py`` for a page and by ``dashboard.py`` there.

Reads a study, running or not; knows neither how pictures are drawn nor where they are shown.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.sections import StudyConfig
from optuna_merge.report.summary import Row, SearchedTask, Summary
from optuna_merge.search.space import split_parameter
from optuna_merge.storage import attributes
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import FINISHED, best_merge, generation, score_of
from optuna_merge.study.holdout_file import TaskFigure

Role = Literal["source", "base", "uniform", "merge", "pruned", "best", "line"]
"""Which colour something has."""

N_COLUMNS = 40
"""Generations that a heat map shows at most, evenly chosen."""
_N_PAIRS = 3
_ROLES: dict[str, Role] = {"source": "source", "base": "base", "uniform": "uniform", "best": "best"}


@dataclass(frozen=True)
class Series:
    """Points or a line of a chart.

    Attributes:
        name: For the legend.
        role: Its colour.
        x: Of each point.
        y: Of each point.
        labels: What is said of each point; empty: nothing.
        is_line: Points are joined; ``is_step``: by steps.
        is_step: See above.
    """

    name: str
    role: Role
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    is_line: bool = False
    is_step: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over two axes; ``levels`` are horizontal lines: a name, a role and a height."""

    key: str
    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, Role, float]] = ()


@dataclass(frozen=True)
class Bars:
    """One bar a row: its name, its role, its length and its standard error, if that is known."""

    key: str
    title: str
    x_title: str
    rows: Sequence[tuple[str, Role, float, float | None]]


@dataclass(frozen=True)
class HeatMap:
    """Values in rows and columns; None where there is none. Colours go from ``low`` to ``high``."""

    key: str
    title: str
    x_title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float


Picture = Chart | Bars | HeatMap


def pictures(study: optuna.Study, summary: Summary, config: StudyConfig) -> list[Picture]:
    """Every picture that the study has data for, in the order in which they are read.

    Args:
        study: The study.
        summary: Its figures.
        config: Its study file.
    """
    trials = study.get_trials(deepcopy=False)
    labels = study.user_attrs.get(attributes.FINGERPRINT, {}).get("genome.models", [])
    best = best_merge(study)
    drawn: list[Picture | None] = [
        score_by_documents(trials, summary),
        score_by_model(summary, config),
        None if best is None else weights_of(best, labels, trials),
        weights_by_generation(trials, labels),
        *task_by_task(trials, summary),
    ]
    return [picture for picture in drawn if picture is not None]


def score_by_documents(trials: Sequence[FrozenTrial], summary: Summary) -> Chart | None:
    """Each trial's score, and the best so far, by the documents that were scored until then."""
    spent = 0.0
    points: dict[Role, list[tuple[float, float, str]]] = {"merge": [], "pruned": []}
    best: list[tuple[float, float]] = []
    for trial in trials:
        spent += trial.user_attrs.get(attributes.DOCUMENTS, 0)
        if attributes.BASELINE in trial.user_attrs and trial.user_attrs.get(attributes.BASELINE_KIND) != "uniform":
            continue
        score = score_of(trial)
        if trial.state == TrialState.COMPLETE and score is not None:
            points["merge"].append((spent, score, _name(trial)))
            if not best or score > best[-1][1]:
                best.append((spent, score))
        elif trial.state == TrialState.PRUNED and math.isfinite(trial.user_attrs.get(PAIRED_ESTIMATE, math.nan)):
            points["pruned"].append((spent, trial.user_attrs[PAIRED_ESTIMATE], f"{_name(trial)}, pruned: estimate"))
    if not best:
        return None
    best.append((spent, best[-1][1]))
    names: dict[Role, str] = {"merge": "merge, every document", "pruned": "pruned merge, its estimate"}
    series = [
        Series(names[role], role, [x for x, _, _ in found], [y for _, y, _ in found], [text for _, _, text in found])
        for role, found in points.items()
        if found
    ]
    series.append(Series("best so far", "best", [x for x, _ in best], [y for _, y in best], is_line=True, is_step=True))
    return Chart(
        "score-by-documents",
        "Score by documents spent",
        "documents scored",
        "score on the searched documents",
        series,
        [(row.name, _ROLES[row.kind], row.value) for row in _to_beat(summary)],
    )


def score_by_model(summary: Summary, config: StudyConfig) -> Bars | None:
    """The best merge and what it has to beat: on the holdout where that has been scored, else where it was searched."""
    rows = [row for row in summary.rows if row.kind != "runner-up"]
    if not rows:
        return None
    held = all(row.holdout for row in rows)
    weights = {task.name: task.weight for task in config.tasks}
    if held and config.holdout is not None:
        weights |= {task.name: task.weight for task in config.holdout.tasks}
    bars: list[tuple[str, Role, float, float | None]] = []
    for row in rows:
        figures: Mapping[str, TaskFigure | SearchedTask] = row.tasks
        value = row.value
        if held and row.holdout is not None:
            figures, value = row.holdout.tasks, row.holdout.value
        errors = [(weights.get(name.split(" (")[0], 1), figure.stderr) for name, figure in figures.items()]
        known = [weight * error for weight, error in errors if error is not None]
        stderr = math.hypot(*known) if len(known) == len(errors) else None

        bars.append((row.name, _ROLES[row.kind], value, stderr))
    where = "held-out" if held else "searched"
    return Bars("score-by-model", f"Against the baselines, on {where} documents", "score", bars)


def weights_of(trial: FrozenTrial, labels: Sequence[str], trials: Sequence[FrozenTrial]) -> HeatMap | None:
    """A trial's values: layer groups from the first layer on, by model and parameter."""
    if not trial.params:
        return None
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in sorted(trial.params.items()):
        group, column = split_parameter(name)
        cells[group][column] = value
    columns = sorted({column for row in cells.values() for column in row}, key=lambda column: _rank(column, labels))
    low, high = _span([trial, *trials], trial.params)
    return HeatMap(
        "weights-best",
        f"Weights of the best merge (trial {trial.number}, score {score_of(trial):.4f})",
        "model",
        columns,
        list(cells),
        [[row.get(column) for column in columns] for row in cells.values()],
        low,
        high,
    )


def weights_by_generation(trials: Sequence[FrozenTrial], labels: Sequence[str]) -> HeatMap | None:
    """The population's mean of each parameter, by generation of CMA-ES; None before the second one."""
    by_generation = generations(trials)
    if len(by_generation) < 2:
        return None
    names = sorted(
        {name for found in by_generation.values() for trial in found for name in trial.params},
        key=lambda name: (split_parameter(name)[0], _rank(split_parameter(name)[1], labels)),
    )
    numbers = _evenly(sorted(by_generation), N_COLUMNS)
    columns = [by_generation[number] for number in numbers]
    low, high = _span([trial for found in columns for trial in found], names)
    return HeatMap(
        "weights-by-generation",
        "Mean weight of the population, by generation",
        "generation",
        [str(number) for number in numbers],
        [name.removesuffix(".weight") for name in names],
        [[_mean(t.params[name] for t in found if name in t.params) for found in columns] for name in names],
        low,
        high,
    )


def task_by_task(trials: Sequence[FrozenTrial], summary: Summary) -> list[Chart]:
    """For the first pairs of tasks, or objectives: every complete trial, and the front of those that none beats."""
    if not summary.rows:
        return []
    charts: list[Chart] = []
    objectives = list(summary.front[0].values) if summary.front else []
    for one, two in list(combinations(objectives or summary.rows[0].tasks, 2))[:_N_PAIRS]:
        points: dict[Role, list[tuple[float, float, str]]] = defaultdict(list)
        for trial in trials:
            x, y = (_figure(trial, name, objectives) for name in (one, two))
            if trial.state == TrialState.COMPLETE and x is not None and y is not None:
                role: Role = trial.user_attrs.get(attributes.BASELINE_KIND, "merge")
                points["best" if trial.number == summary.best_trial else role].append((x, y, _name(trial)))
        merges = [(x, y) for role in ("merge", "best", "uniform") for x, y, _ in points.get(role, [])]
        front = _front(merges)
        titles: dict[Role, str] = {"merge": "merge", "uniform": "uniform merge", "best": "best merge"}
        series = [
            Series("front", "line", [x for x, _ in front], [y for _, y in front], is_line=True),
            *(
                Series(
                    titles.get(role, role),
                    role,
                    [x for x, _, _ in points[role]],
                    [y for _, y, _ in points[role]],
                    [text for _, _, text in points[role]],
                )
                for role in ("merge", "uniform", "source", "base", "best")
                if role in points
            ),
        ]
        charts.append(Chart(f"tasks-{len(charts) + 1}", f"{one} against {two}", one, two, series))
    return charts


def _figure(trial: FrozenTrial, name: str, objectives: Sequence[str]) -> float | None:
    if not objectives:
        found: float | None = trial.user_attrs.get(f"{attributes.SCORE} {name}")
        return found
    return None if trial.values is None else trial.values[objectives.index(name)]


def generations(trials: Iterable[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Generation of CMA-ES, from 0 on, to its trials, unfinished ones left out."""
    found: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in trials:
        number = generation(trial)
        if number is not None and trial.params and trial.state in FINISHED:
            found[number].append(trial)
    return dict(found)


def _rank(column: str, labels: Sequence[str]) -> tuple[int, str]:
    found = [index for index, label in enumerate(labels) if column == label or column.startswith(f"{label}.")]
    return (found[0] if found else len(labels), column)


def _to_beat(summary: Summary) -> list[Row]:
    best: dict[str, Row] = {}
    for row in summary.rows:
        if row.kind in ("source", "uniform") and (row.kind not in best or row.value > best[row.kind].value):
            best[row.kind] = row
    return list(best.values())


def _span(trials: Sequence[FrozenTrial], names: Iterable[str]) -> tuple[float, float]:
    """Of the ranges of parameters; of their values where they have no range."""
    lows, highs = [], []
    for name in names:
        distribution = next((trial.distributions[name] for trial in trials if name in trial.distributions), None)
        assert isinstance(distribution, optuna.distributions.FloatDistribution)
        lows.append(distribution.low)
        highs.append(distribution.high)
    return min(lows), max(highs)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both directions, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _evenly(numbers: Sequence[int], n: int) -> list[int]:
    if len(numbers) <= n:
        return list(numbers)
    return [numbers[round(index * (len(numbers) - 1) / (n - 1))] for index in range(n)]


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else None


def _name(trial: FrozenTrial) -> str:
    baseline = trial.user_attrs.get(attributes.BASELINE)
    return f"trial {trial.number}" + (f" ({baseline})" if baseline else "")
