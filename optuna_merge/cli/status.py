"""``status``: shows the progress of a study without disturbing it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli import options, output
from optuna_merge.errors import OptunaMergeError, first_line

if TYPE_CHECKING:
    import optuna

    from optuna_merge.report.summary import Row, Summary


_File = Annotated[Path, typer.Argument(metavar="FILE", help="Study file (YAML), or a folder of study files.")]


@options.takes_study(shown=("storage_path", "storage", "as_json"), file=_File)
def status(
    given: options.StudyArguments,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show a live view, refreshed every two seconds, until the study is done.")
    ] = False,
) -> None:
    """Show the progress of a study and what leads, while it runs or afterwards. Loads no model.

    Example: optuna-merge status studies/quickstart.yaml --watch

    Where FILE is a folder, every study in it that has been started gets a row.
    """
    from optuna_merge.report.summary import summarize

    if given.file.is_dir():
        _show_folder(given, watch)
        return
    config, study = given.open()
    if watch:
        _watch(study)
    summary = summarize(study, config)
    if given.as_json:
        output.print_json(summary.as_dict())
    else:
        _print(summary)


def _show_folder(given: options.StudyArguments, watch: bool) -> None:
    """Print a row for each study file in a folder, and on stderr why a file has none."""
    from optuna_merge.report.summary import summarize

    for option, is_given in (("--watch", watch), ("--storage-path", given.storage_path is not None)):
        if is_given:
            raise OptunaMergeError(
                f"{option} must be given with one study file, got the folder {given.file}; name a file"
            )
    files = sorted(path for path in given.file.iterdir() if path.suffix in (".yaml", ".yml"))
    if not files:
        raise OptunaMergeError(f"{given.file}: folder must hold study files, got none that ends in .yaml; name another")
    found: dict[Path, Summary] = {}
    for file in files:
        try:
            config, study = replace(given, file=file).open()
            found[file] = summarize(study, config)
        except OptunaMergeError as exc:
            output.note(f"no row: {first_line(exc)}")
    if given.as_json:
        output.print_json({str(file): summary.as_dict() for file, summary in found.items()})
    elif found:
        output.print_table(["study", "progress", "to beat", "best merge", "states"], [*map(_row, found.values())])


def _row(summary: Summary) -> list[str]:
    leader, best = _leader(summary), summary.best_value
    return [
        summary.study,
        summary.progress,
        "" if leader is None else f"{leader.name} {leader.value:.4f}",
        "" if best is None else f"{best:.4f}",
        summary.state_counts,
    ]


def _leader(summary: Summary) -> Row | None:
    """The baseline with the highest score."""
    return max((row for row in summary.rows if row.kind != "best"), key=lambda row: row.value, default=None)


def _print(summary: Summary) -> None:
    from optuna_merge.report.summary import ascent_line

    states = f" ({summary.state_counts})" if summary.state_counts else ""
    typer.echo(f"study {summary.study}: {summary.progress}{states}")
    if line := ascent_line(summary):
        typer.echo(line)
    if summary.race is not None:
        typer.echo(summary.race.line)
    if leader := _leader(summary):
        typer.echo(f"to beat: {leader.name} {leader.value:.4f}")
    if summary.best_trial is not None:
        typer.echo(f"best merge: trial {summary.best_trial} {summary.best_value:.4f}")
    if summary.judge_line:
        typer.echo(summary.judge_line)
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
