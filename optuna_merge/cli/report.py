"""``report``: what the study found, on the searched documents and on the holdout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli.options import (
    Json,
    Seed,
    StoragePath,
    StorageUrl,
    StudyFile,
    TaskSearchPath,
    note,
    open_started,
    overrides_of,
    print_json,
    print_table,
)
from optuna_merge.errors import StudyError

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config.sections import StudyConfig
    from optuna_merge.report.summary import Row, Summary
    from optuna_merge.study.holdout_file import HoldoutRow


def report(
    file: StudyFile,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    best: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="How many of the best merges; 5 by default.")
    ] = None,
    task_search_path: TaskSearchPath = None,
    seed: Seed = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Write a page with pictures, too.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print markdown, for a model card.")] = False,
    as_json: Json = False,
) -> None:
    """Print sources, base, uniform merges and best merges on searched and held-out documents, and a paired test.

    Example: optuna-merge report studies/quickstart.yaml --html report.html

    Where one of the best merges has not been scored on the holdout yet, this loads the models and does it.
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.report.summary import markdown_table, summarize
    from optuna_merge.study.holdout_file import N_BEST, needs_holdout

    best = best or N_BEST
    config = load_study(file, overrides_of(storage_path, storage, task_search_path, seed))
    study = open_started(config)
    if config.holdout is not None and needs_holdout(study, config.storage_path, best):
        from optuna_merge.storage.fingerprint import check_fingerprint
        from optuna_merge.study.holdout import score_holdout
        from optuna_merge.study.objective import MergeObjective
        from optuna_merge.study.run import as_started

        objective = MergeObjective.from_config(as_started(config))
        check_fingerprint(study, objective.fingerprint())
        score_holdout(study, objective, note, best)
        objective.close()
    summary = summarize(study, config, best)
    if html is not None:
        _write_page(html, study, summary, config)
    if as_json:
        print_json(summary.as_dict())
    elif markdown:
        typer.echo(markdown_table(summary))
    else:
        print_summary(summary)


def _write_page(out: Path, study: optuna.Study, summary: Summary, config: StudyConfig) -> None:
    from optuna_merge.report.page import page
    from optuna_merge.report.pictures import pictures
    from optuna_merge.storage.outages import reason

    recipe = config.storage_path / "best_config.yaml"
    try:
        text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
        out.write_text(page(summary, config, pictures(study, summary, config), text), encoding="utf-8")
    except OSError as exc:
        raise StudyError(f"{out}: --html must be a file that can be written, got {reason(exc)}") from exc
    note(f"page: {out}")


def print_summary(summary: Summary) -> None:
    """The table and what follows from it, on stdout."""
    from optuna_merge.report.summary import verdict

    states = ", ".join(f"{count} {state}" for state, count in sorted(summary.states.items()))
    typer.echo(f"study {summary.study}: {states}; {summary.n_documents} documents scored in {summary.seconds:.0f} s")
    if not summary.rows:
        typer.echo("no trial is complete yet")
        return
    tasks = list(summary.rows[0].tasks)
    held = any(row.holdout for row in summary.rows)
    held_tasks = list(next(row.holdout.tasks for row in summary.rows if row.holdout)) if held else []
    header = ["searched documents", "trial", "score", *tasks]
    print_table(header, [_searched(row, tasks) for row in summary.rows])
    if held:
        header = ["holdout documents", "trial", "score", *held_tasks, "best merge − this"]
        print_table(header, [_held_out(row, row.holdout, held_tasks) for row in summary.rows if row.holdout])
        typer.echo("± is one standard error; differences are paired by document.")
        typer.echo(verdict(summary))
    if summary.front:
        names = list(summary.front[0].values)
        rows = [
            [point.name, str(point.trial), *(f"{value:.4f}" for value in (*point.values.values(), point.value))]
            for point in summary.front
        ]
        print_table(["front, searched documents", "trial", *names, "sum"], rows)
        typer.echo("No other trial is better than one of these in every objective; export --trial N writes one.")
    for number, reason in summary.failures.items():
        typer.echo(f"trial {number} failed: {reason}")


def _searched(row: Row, tasks: list[str]) -> list[str]:
    figures = [_figure(row.tasks[task].value, row.tasks[task].stderr) if task in row.tasks else "" for task in tasks]
    return [row.name, str(row.trial), f"{row.value:.4f}", *figures]


def _held_out(row: Row, held: HoldoutRow, tasks: list[str]) -> list[str]:
    figures = [_figure(held.tasks[task].value, held.tasks[task].stderr) for task in tasks]
    ahead = "" if row.kind == "best" else f"{held.difference:+.4f} ± {held.difference_stderr:.4f}"
    if row.kind != "best" and 0 < held.difference_stderr < float("inf"):
        ahead += f" ({held.difference / held.difference_stderr:+.1f} SE)"
    return [row.name, str(row.trial), f"{held.value:.4f}", *figures, ahead]


def _figure(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
