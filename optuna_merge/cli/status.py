"""``status``: shows the progress of a study without disturbing it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli import options, output

if TYPE_CHECKING:
    import optuna

    from optuna_merge.report.summary import Summary


@options.takes_study(shown=("storage_path", "storage", "as_json"))
def status(
    given: options.StudyArguments,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show a live view, refreshed every two seconds, until the study is done.")
    ] = False,
) -> None:
    """Show the progress of a study and what leads, while it runs or afterwards. Loads no model.

    Example: optuna-merge status studies/quickstart.yaml --watch
    """
    from optuna_merge.report.summary import summarize

    config, study = given.open()
    if watch:
        _watch(study)
    summary = summarize(study, config)
    if given.as_json:
        output.print_json(summary.as_dict())
    else:
        _print(summary)


def _print(summary: Summary) -> None:
    from optuna_merge.report.summary import ascent_line

    typer.echo(f"study {summary.study}: {summary.progress} ({summary.state_counts})")
    if line := ascent_line(summary):
        typer.echo(line)
    baselines = [row for row in summary.rows if row.kind != "best"]
    if baselines:
        leader = max(baselines, key=lambda row: row.value)
        typer.echo(f"to beat: {leader.name} {leader.value:.4f}")
    if summary.best_trial is not None:
        typer.echo(f"best merge: trial {summary.best_trial} {summary.best_value:.4f}")
    for number, reason in summary.failures.items():
        typer.echo(f"trial {number} failed: {reason}")


def _watch(study: optuna.Study) -> None:
    from rich.console import Console
    from rich.live import Live

    from optuna_merge.cli.progress import PAUSE_S, StudyView

    view = StudyView(study)
    with Live(view.render(), console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        while not view.is_done:
            time.sleep(PAUSE_S)
            live.update(view.render(), refresh=True)
