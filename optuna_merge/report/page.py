"""A study's report as one HTML page: pictures, tables, recipe. It has no script and needs no network.

Light or dark as the reader's system is, and black on white on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from optuna_merge.config.sections import StudyConfig
from optuna_merge.report import svg
from optuna_merge.report.pictures import Picture
from optuna_merge.report.summary import Row, Summary, standing, verdict

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .5rem 0; } .quiet, .lead span { color: var(--quiet); } .lead { font-size: 1.1rem; }
figure { margin: 2rem 0 0; break-inside: avoid; } figcaption { font-weight: 600; margin-bottom: .5rem; }
.spent { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.spent div { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .5rem .9rem; }
.spent b { display: block; font-size: 1.25rem; } .spent span { color: var(--quiet); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .82rem; }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; } th:first-child, td:first-child { text-align: left; }
th { color: var(--quiet); font-weight: 500; } tr.best td { font-weight: 650; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
@media print { main { max-width: none; padding: 0; } pre { white-space: pre-wrap; } }
"""


def page(summary: Summary, config: StudyConfig, drawn: Sequence[Picture], recipe: str = "") -> str:
    """The report as a page.

    Args:
        summary: The study's figures.
        config: Its study file.
        drawn: Its pictures.
        recipe: The best merge as a mergekit file; empty: left out.
    """
    title = config.question or f"Study {summary.study}"
    models = ", ".join(f"<code>{escape(model)}</code>" for model in config.sources)
    if config.genome.base_model:
        models += f"; base <code>{escape(config.genome.base_model)}</code>"
    tasks = ", ".join(f"{task.weight:g} × {escape(task.name)} ({escape(task.metric)})" for task in config.tasks)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(standing(summary))}</p>',
        f"<p>{escape(verdict(summary))}</p>" if verdict(summary) else "",
        _spent(summary),
        f"<p><span class=quiet>Merged by {escape(config.genome.merge_method)}:</span> {models}</p>",
        f"<p><span class=quiet>Score:</span> {tasks}</p>",
        *_tables(summary),
        *map(_figure_of, drawn),
    ]
    if recipe:
        parts.append(f"<h2>The best merge, as a mergekit file</h2><pre>{escape(recipe)}</pre>")
    if summary.front:
        parts += ["<h2>The front</h2>", _front_table(summary)]
    if summary.failures:
        failures = "".join(f"<li>trial {number}: {escape(why)}</li>" for number, why in summary.failures.items())
        parts.append(f"<h2>Failed trials</h2><ul>{failures}</ul>")
    return _document(title, parts)


def pictures_page(title: str, drawn: Sequence[Picture]) -> str:
    """Pictures alone, as a page."""
    return _document(title, [f"<h1>{escape(title)}</h1>", *map(_figure_of, drawn)])


def _figure_of(picture: Picture) -> str:
    return f"<figure><figcaption>{escape(picture.title)}</figcaption>{svg.draw(picture)}</figure>"


def _document(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{svg.STYLE}{_STYLE}</style></head>\n<body><main>\n{body}\n"
        '<p class="quiet">Made by optuna-merge.</p></main></body></html>\n'
    )


def _spent(summary: Summary) -> str:
    states = summary.states
    figures = [
        (f"{sum(states.values())}", "trials"),
        (f"{states.get('pruned', 0)}", "of them pruned"),
        (f"{states.get('fail', 0)}", "failed"),
        (f"{summary.n_documents:,}", "documents scored"),
        (f"{summary.seconds / 3600:.2f} h", "merging and scoring"),
    ]
    return (
        '<div class="spent">' + "".join(f"<div><b>{n}</b><span>{what}</span></div>" for n, what in figures) + "</div>"
    )


def _tables(summary: Summary) -> list[str]:
    if not summary.rows:
        return ["<p>No trial is complete yet.</p>"]
    tasks = list(summary.rows[0].tasks)
    searched = [_searched(row, tasks) for row in summary.rows]
    parts = ["<h2>On the searched documents</h2>", _table(["model", "trial", "score", *tasks], searched, summary.rows)]
    held = [row for row in summary.rows if row.holdout]
    if held:
        assert held[0].holdout is not None
        tasks = list(held[0].holdout.tasks)
        header = ["model", "trial", "score", "best merge − this", "p", *tasks]
        parts += [
            "<h2>On documents that the search never saw</h2>",
            _table(header, [_held_out(row, tasks) for row in held], held),
            "<p class=quiet>± is one standard error. Differences and their z tests (two-sided) pair documents.</p>",
        ]
    return parts


def _front_table(summary: Summary) -> str:
    names = list(summary.front[0].values)
    head = "".join(f"<th>{escape(name)}</th>" for name in ["trial of the front", "number", *names, "sum"])
    lines = []
    for point in summary.front:
        figures = [f"{value:.4f}" for value in (*point.values.values(), point.value)]
        kind = "best" if point.trial == summary.best_trial else "other"
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in [point.name, str(point.trial), *figures])
        lines.append(f'<tr class="{kind}">{cells}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        "<p class=quiet>No other trial is better than one of these in every objective. Bold: of the largest sum.</p>"
    )


def _searched(row: Row, tasks: Sequence[str]) -> list[str]:
    found = [row.tasks.get(task) for task in tasks]
    return [
        row.name,
        str(row.trial),
        f"{row.value:.4f}",
        *("" if task is None else _figure(task.value, task.stderr) for task in found),
    ]


def _held_out(row: Row, tasks: Sequence[str]) -> list[str]:
    held = row.holdout
    assert held is not None
    figures = [_figure(held.tasks[task].value, held.tasks[task].stderr) for task in tasks]
    last = ["", ""]
    if row.kind != "best":
        shown = f"{held.p_value:.4f}" if held.p_value >= 1e-4 else "< 0.0001"
        last = [f"{held.difference:+.4f} ± {held.difference_stderr:.4f}", shown]
    return [row.name, str(row.trial), f"{held.value:.4f}", *last, *figures]


def _figure(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], models: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        f'<tr class="{"best" if model.kind == "best" else "other"}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for model, row in zip(models, rows, strict=True)
    ]
    body = "".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
