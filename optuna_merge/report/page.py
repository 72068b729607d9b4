"""The report of a study as one HTML page, without scripts or network; ``page.html.j2`` is its template.

Light or dark as the reader's system is, and black on white on paper. Knows neither Optuna nor where the page goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.report import palette, svg
from optuna_merge.report.answers import ShownDocument
from optuna_merge.report.lengths import answers_split, answers_table, length_warnings
from optuna_merge.report.pictures import Picture
from optuna_merge.report.summary import Summary, standing, verdict
from optuna_merge.report.tables import Table, figure_text, front_table, held_rows, lead_text, race_table, searched_table

_N_EXAMPLES = 8
"""Documents whose answers are on the page."""


def page(
    summary: Summary,
    config: StudyConfig,
    pictures: Sequence[Picture],
    recipe: str = "",
    examples: Sequence[ShownDocument] = (),
    longer: Summary | None = None,
) -> str:
    """The report as a page.

    Args:
        summary: The figures of the study.
        config: Its study file.
        pictures: Its pictures.
        recipe: The best merge as a mergekit file; empty to leave it out.
        examples: Documents with the models' answers; the first of them are shown.
        longer: The figures with another limit of the answers' length on the holdout.
    """
    return _render(
        config.question or f"Study {summary.study}",
        pictures,
        summary=summary,
        config=config,
        standing=standing(summary),
        verdict=verdict(summary),
        spent=_spent(summary),
        searched=searched_table(summary, "model") if summary.rows else None,
        held_out=_holdout_table(summary) if held_rows(summary) else None,
        answers=answers_table(summary, "task"),
        answers_split=answers_split(summary),
        warnings=length_warnings(summary),
        race=race_table(summary.race, "method") if summary.race else None,
        front=front_table(summary, "trial of the front", "number") if summary.front else None,
        recipe=recipe,
        examples=examples[:_N_EXAMPLES],
        longer=None if longer is None or not held_rows(longer) else _holdout_table(longer),
        longer_answers=None if longer is None else answers_table(longer, "task"),
        longer_warnings=[] if longer is None else length_warnings(longer),
        longer_verdict="" if longer is None else verdict(longer),
        max_gen_toks=None if longer is None else longer.max_gen_toks,
    )


def pictures_page(title: str, pictures: Sequence[Picture]) -> str:
    """Pictures alone, as a page."""
    return _render(title, pictures, summary=None, race=None, front=None, recipe="", examples=())


def _render(title: str, pictures: Sequence[Picture], **content: object) -> str:
    return _template().render(
        title=title,
        drawings=[(picture, Markup(svg.draw(picture))) for picture in pictures],
        palette_css=Markup(palette.css()),
        svg_css=Markup(svg.STYLE),
        **content,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("optuna_merge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2")


def _spent(summary: Summary) -> list[tuple[str, str]]:
    states = summary.states
    return [
        (f"{sum(states.values())}", "trials"),
        (f"{states.get('pruned', 0)}", "of them pruned"),
        (f"{states.get('fail', 0)}", "failed"),
        (f"{summary.n_documents:,}", "documents scored"),
        (f"{summary.seconds / 3600:.2f} h", "merging and scoring"),
    ]


def _holdout_table(summary: Summary) -> Table:
    held = held_rows(summary)
    tasks = list(held[0][1].tasks)
    rows = []
    for row, figures in held:
        lead = ["", ""]
        if row.kind != "best":
            lead = [lead_text(figures), f"{figures.p_value:.4f}" if figures.p_value >= 1e-4 else "< 0.0001"]
        metrics = [figure_text(figures.tasks[task].value, figures.tasks[task].stderr) for task in tasks]
        rows.append([row.name, str(row.trial), f"{figures.value:.4f}", *lead, *metrics])
    best = next((index for index, (row, _) in enumerate(held) if row.kind == "best"), None)
    return Table(["model", "trial", "score", "best merge − this", "p", *tasks], rows, best)
