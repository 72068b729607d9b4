"""The figures of a study as tables of text, and as markdown. Knows neither the terminal nor HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass

from optuna_merge.report.race import RaceStanding
from optuna_merge.report.summary import Row, Summary, verdict
from optuna_merge.search.space import split_parameter
from optuna_merge.study.holdout_file import HoldoutRow

_N_STEPS = 10
"""Steps of an ascent that a table shows at most, evenly spaced."""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: The columns' names.
        rows: The cells of each row.
        best: Index of the best merge's row; None if it has none.
    """

    header: list[str]
    rows: list[list[str]]
    best: int | None


def searched_table(summary: Summary, first: str) -> Table:
    """The score and the metrics of every model on the searched documents.

    Args:
        summary: With at least one row.
        first: Header of the first column.
    """
    tasks = list(summary.rows[0].tasks)
    rows = []
    for row in summary.rows:
        found = [row.tasks.get(task) for task in tasks]
        figures = ["" if task is None else figure_text(task.value, task.stderr) for task in found]
        rows.append([row.name, str(row.trial), f"{row.value:.4f}", *figures])
    best = next((index for index, row in enumerate(summary.rows) if row.kind == "best"), None)
    return Table([first, "trial", "score", *tasks], rows, best)


def front_table(summary: Summary, first: str, second: str) -> Table:
    """The value of each objective, and their sum, of every trial of the front.

    Args:
        summary: With a front.
        first: Header of the column of names.
        second: Header of the column of trial numbers.
    """
    rows = [
        [point.name, str(point.trial), *(f"{value:.4f}" for value in (*point.values.values(), point.value))]
        for point in summary.front
    ]
    best = next((index for index, point in enumerate(summary.front) if point.trial == summary.best_trial), None)
    return Table([first, second, *summary.front[0].values, "sum"], rows, best)


def race_table(race: RaceStanding, first: str) -> Table:
    """What became of each method in the race.

    Args:
        race: The race.
        first: Header of the first column.
    """
    header = [first, "last round", "merges", "documents", "best trial", f"score, {race.n_chunks} chunks", "difference"]
    rows = []
    for row in race.rows:
        figures = ["", "", ""]
        if row.value is not None:
            ahead = "" if row.difference is None or row.stderr is None else f"{row.difference:+.4f} ± {row.stderr:.4f}"
            figures = [str(row.trial), f"{row.value:.4f}", ahead]
        rows.append([row.method, str(row.last_round), str(row.n_merges), str(row.n_documents), *figures])
    return Table(header, rows, None if race.winner is None else 0)


def ascent_table(summary: Summary) -> Table:
    """Expected score and weights by step of the ascent: means over layer groups, at most :data:`_N_STEPS` steps.

    Args:
        summary: Of a study that began with an ascent.
    """
    steps = summary.ascent
    columns: dict[str, list[str]] = {}
    for name in sorted(steps[0].params):
        columns.setdefault(split_parameter(name)[1].removesuffix(".weight"), []).append(name)
    n_shown = min(_N_STEPS, len(steps))
    shown = sorted({round(index * (len(steps) - 1) / max(1, n_shown - 1)) for index in range(n_shown)})
    rows = []
    for index in shown:
        params = steps[index].params
        means = [math.fsum(params[name] for name in names) / len(names) for names in columns.values()]
        rows.append([f"{index + 1}", f"{steps[index].expected:.4f}", *(f"{mean:.3f}" for mean in means)])
    return Table(["step of the ascent", "expected score before it", *columns], rows, None)


def markdown_table(summary: Summary) -> str:
    """The figures of the report as markdown, for a model card; empty before the first complete trial."""
    if not summary.rows:
        return ""
    held = bool(held_rows(summary))
    header = ["model", "searched documents", *(["holdout documents", "best merge − this"] if held else [])]
    lines = [f"## Results of study {summary.study}", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'|'.join([' --- '] + [' ---: '] * (len(header) - 1))}|"]
    for row in summary.rows:
        cells = [row.name, f"{row.value:.4f}"]
        if held and row.holdout is None:
            cells += ["", ""]
        elif row.holdout is not None:
            cells += [f"{row.holdout.value:.4f}", "" if row.kind == "best" else lead_text(row.holdout)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "± is one standard error, paired by document."]
    others = [front_table(summary, "front", "trial")] if summary.front else []
    others += [race_table(summary.race, "race")] if summary.race is not None else []
    others += [ascent_table(summary)] if summary.ascent else []
    for table in others:
        lines += ["", f"| {' | '.join(table.header)} |", f"| --- |{' ---: |' * (len(table.header) - 1)}"]
        lines += [f"| {' | '.join(cells)} |" for cells in table.rows]
    if sentence := verdict(summary):
        lines += ["", sentence]
    return "\n".join(lines)


def held_rows(summary: Summary) -> list[tuple[Row, HoldoutRow]]:
    """The models that were scored on the holdout, with their figures there."""
    return [(row, row.holdout) for row in summary.rows if row.holdout is not None]


def figure_text(value: float, stderr: float | None) -> str:
    """A figure and its standard error, if that is known."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def lead_text(figures: HoldoutRow) -> str:
    """By how much the best merge is ahead on the holdout, and the standard error of that."""
    return f"{figures.difference:+.4f} ± {figures.difference_stderr:.4f}"
