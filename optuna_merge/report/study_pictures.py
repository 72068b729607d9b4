"""The pictures of a study, running or not: which there are and what they show.

Reads trials and figures; does not know how a picture is drawn or where it is shown.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.report.pictures import Bars, Chart, HeatMap, Picture, Role, Series
from optuna_merge.report.race import race_picture
from optuna_merge.report.summary import Kind, Row, SearchedTask, Summary
from optuna_merge.search.ascent import N_PASSES
from optuna_merge.search.profile import Profile, TensorPlace
from optuna_merge.search.race import trials_of_winner
from optuna_merge.search.space import split_parameter
from optuna_merge.storage import attributes
from optuna_merge.storage.ascent import end_of_ascent
from optuna_merge.storage.attributes import PAIRED_ESTIMATE
from optuna_merge.storage.trials import FINISHED, best_merge, documents_spent, generation, score_of
from optuna_merge.study.holdout_file import TaskFigure

_N_COLUMNS = 40
"""Generations that a heat map shows at most, evenly spaced."""
_N_PAIRS = 3
"""Pairs of tasks that are compared at most."""
_ROLES: dict[Kind, Role] = {
    "source": "source",
    "base": "base",
    "uniform": "uniform",
    "ascent": "merge",
    "runner-up": "merge",
    "best": "best",
}

_Points = list[tuple[float, float, str]]
"""x, y and label of each point."""


def pictures_of_study(study: optuna.Study, summary: Summary, config: StudyConfig) -> list[Picture]:
    """Every picture that the study has data for, in reading order.

    Args:
        study: The study.
        summary: Its figures.
        config: Its study file.
    """
    trials = study.get_trials(deepcopy=False)
    labels = study.user_attrs.get(attributes.FINGERPRINT, {}).get("genome.models", [])
    best = best_merge(study)
    drawn: list[Picture | None] = [
        _score_by_documents(trials, summary),
        _expected_by_step(summary),
        None if summary.race is None else race_picture(trials, summary.race),
        _score_by_model(summary, config),
        None if best is None else _weights_of(best, labels, trials),
        *_profile(trials, labels),
        _weights_by_generation(trials_of_winner(trials), labels),
        *_task_by_task(trials, summary),
    ]
    return [picture for picture in drawn if picture is not None]


def _score_by_documents(trials: Sequence[FrozenTrial], summary: Summary) -> Chart | None:
    """Each merge's score, and the best so far, by the number of documents scored until then."""
    spent = 0.0
    points: dict[Role, _Points] = {"merge": [], "pruned": []}
    best: list[tuple[float, float]] = []
    for trial in trials:
        spent += documents_spent(trial)
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
    series = [_marks(names[role], role, found) for role, found in points.items() if found]
    series.append(Series("best so far", "best", [x for x, _ in best], [y for _, y in best], is_line=True, is_step=True))
    return Chart(
        "score-by-documents",
        "Score by documents spent",
        "documents scored",
        "score on the searched documents",
        series,
        [(row.name, _ROLES[row.kind], row.value) for row in _to_beat(summary)],
    )


def _expected_by_step(summary: Summary) -> Chart | None:
    """The expected score on each step's documents, and its mean over a pass of the ascent."""
    values = [step.expected for step in summary.ascent]
    if not values:
        return None
    width = max(1, len(values) // N_PASSES)
    passes = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    numbers = [float(number) for number in range(1, len(values) + 1)]
    points = [(x, y, f"step {x:.0f}") for x, y in zip(numbers, values, strict=True)]
    mean = Series("mean of a pass", "best", numbers, [math.fsum(part) / len(part) for part in passes], is_line=True)
    return Chart(
        "expected-by-step",
        "Expected score by step of the ascent",
        "step",
        "expected score",
        [_marks("a step's documents", "merge", points), mean],
    )


def _score_by_model(summary: Summary, config: StudyConfig) -> Bars | None:
    """The best merge beside what it has to beat: on the holdout if all of them were scored there."""
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
        bars.append((row.name, _ROLES[row.kind], value, _stderr(figures, weights)))
    where = "held-out" if held else "searched"
    return Bars("score-by-model", f"Against the baselines, on {where} documents", "score", bars)


def _weights_of(trial: FrozenTrial, labels: Sequence[str], trials: Sequence[FrozenTrial]) -> HeatMap | None:
    """The parameters of one trial: a row for each layer group, a column for each model and method parameter."""
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


def _profile(trials: Sequence[FrozenTrial], labels: Sequence[str]) -> list[HeatMap]:
    """How far each tensor's weight is from its layer group's: a map for each model, layers by kinds of tensors."""
    end = end_of_ascent(trials)
    if end is None or not end.profile:
        return []
    found: dict[str, dict[tuple[str, str], list[float]]] = {label: defaultdict(list) for label in labels}
    for place, by_parameter in Profile.from_json(end.profile).deviations.items():
        column = str(place.layer) if place.role == "layer" else place.role
        for label, deviation in zip(labels, by_parameter.get("weight", ()), strict=False):
            found[label][_kind(place), column].append(deviation)
    cells = {label: {key: math.fsum(own) / len(own) for key, own in by.items()} for label, by in found.items() if by}
    keys = list(dict.fromkeys(key for by in cells.values() for key in by))
    layers = sorted({column for _, column in keys if column.isdigit()}, key=int)
    columns = [role for role in ("embedding", *layers, "head") if any(column == role for _, column in keys)]
    rows = list(dict.fromkeys(kind for kind, _ in keys))
    most = max((abs(value) for by in cells.values() for value in by.values()), default=0.0)
    return [
        HeatMap(
            f"profile-{number}",
            f"Weights of {label}'s tensors, relative to their layer group's",
            "layer",
            columns,
            rows,
            [[by.get((kind, column)) for column in columns] for kind in rows],
            -most,
            most,
        )
        for number, (label, by) in enumerate(cells.items(), start=1)
    ]


def _kind(place: TensorPlace) -> str:
    """The part of a tensor's name that is the same in all layers; experts share one."""
    parts = place.name.removesuffix(".weight").split(".")
    if place.role == "layer":
        parts = parts[parts.index(str(place.layer)) + 1 :] if str(place.layer) in parts else parts
    return ".".join("*" if part.isdigit() else part for part in parts)


def _weights_by_generation(trials: Sequence[FrozenTrial], labels: Sequence[str]) -> HeatMap | None:
    """The population's mean of each parameter, by generation of CMA-ES; None before the second one."""
    by_generation = _generations(trials)
    if len(by_generation) < 2:
        return None
    names = sorted(
        {name for found in by_generation.values() for trial in found for name in trial.params},
        key=lambda name: (split_parameter(name)[0], _rank(split_parameter(name)[1], labels)),
    )
    numbers = _evenly(sorted(by_generation), _N_COLUMNS)
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


def _task_by_task(trials: Sequence[FrozenTrial], summary: Summary) -> list[Chart]:
    """One chart for each of the first pairs of tasks (or of objectives, if there are several)."""
    if not summary.rows:
        return []
    objectives = list(summary.front[0].values) if summary.front else []
    pairs = list(combinations(objectives or summary.rows[0].tasks, 2))[:_N_PAIRS]
    charts = []
    for number, (one, two) in enumerate(pairs, start=1):
        series = _pair_series(trials, summary.best_trial, (one, two), objectives)
        charts.append(Chart(f"tasks-{number}", f"{one} against {two}", one, two, series))
    return charts


def _pair_series(
    trials: Sequence[FrozenTrial], best_trial: int | None, pair: tuple[str, str], objectives: Sequence[str]
) -> list[Series]:
    """Every complete trial by its figures in two tasks, and the front of the merges."""
    points: dict[Role, _Points] = defaultdict(list)
    for trial in trials:
        x, y = (_figure(trial, name, objectives) for name in pair)
        if trial.state == TrialState.COMPLETE and x is not None and y is not None:
            role: Role = trial.user_attrs.get(attributes.BASELINE_KIND, "merge")
            points["best" if trial.number == best_trial else role].append((x, y, _name(trial)))
    front = _front([(x, y) for role in ("merge", "best", "uniform") for x, y, _ in points.get(role, [])])
    names: dict[Role, str] = {"merge": "merge", "uniform": "uniform merge", "best": "best merge"}
    shown: tuple[Role, ...] = ("merge", "uniform", "source", "base", "best")
    return [
        Series("front", "line", [x for x, _ in front], [y for _, y in front], is_line=True),
        *(_marks(names.get(role, role), role, points[role]) for role in shown if role in points),
    ]


def _marks(name: str, role: Role, points: _Points) -> Series:
    return Series(name, role, [x for x, _, _ in points], [y for _, y, _ in points], [label for _, _, label in points])


def _figure(trial: FrozenTrial, name: str, objectives: Sequence[str]) -> float | None:
    if not objectives:
        found: float | None = trial.user_attrs.get(f"{attributes.SCORE} {name}")
        return found
    return None if trial.values is None else trial.values[objectives.index(name)]


def _stderr(figures: Mapping[str, TaskFigure | SearchedTask], weights: Mapping[str, float]) -> float | None:
    """Standard error of a weighted sum of independent metrics; None if that of one metric is unknown."""
    errors = [(weights.get(name.split(" (")[0], 1), figure.stderr) for name, figure in figures.items()]
    known = [weight * error for weight, error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


def _to_beat(summary: Summary) -> list[Row]:
    """The best source and the best uniform merge."""
    best: dict[str, Row] = {}
    for row in summary.rows:
        if row.kind in ("source", "uniform") and (row.kind not in best or row.value > best[row.kind].value):
            best[row.kind] = row
    return list(best.values())


def _generations(trials: Iterable[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Generation of CMA-ES, from 0, to its finished trials."""
    found: dict[int, list[FrozenTrial]] = defaultdict(list)
    for trial in trials:
        number = generation(trial)
        if number is not None and trial.params and trial.state in FINISHED:
            found[number].append(trial)
    return dict(found)


def _rank(column: str, labels: Sequence[str]) -> tuple[int, str]:
    """Sorts columns by model, in the order of the study file."""
    found = [index for index, label in enumerate(labels) if column == label or column.startswith(f"{label}.")]
    return (found[0] if found else len(labels), column)


def _span(trials: Sequence[FrozenTrial], names: Iterable[str]) -> tuple[float, float]:
    """The lowest and the highest bound of the parameters' ranges."""
    lows, highs = [], []
    for name in names:
        distribution = next((trial.distributions[name] for trial in trials if name in trial.distributions), None)
        assert isinstance(distribution, optuna.distributions.FloatDistribution)
        lows.append(distribution.low)
        highs.append(distribution.high)
    return min(lows), max(highs)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both directions, from left to right."""
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
