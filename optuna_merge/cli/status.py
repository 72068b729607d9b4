"""``status``: how far a study is, without disturbing it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli.options import Json, StoragePath, StorageUrl, StudyFile, open_started, overrides_of, print_json

if TYPE_CHECKING:
    import optuna


def status(
    file: StudyFile,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds until the study is done.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how far a study is and what leads, while it runs or afterwards. Loads no model.

    Example: optuna-merge status studies/quickstart.yaml --watch
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.report.summary import summarize

    config = load_study(file, overrides_of(storage_path, storage))
    study = open_started(config)
    if watch:
        _watch(study)
    summary = summarize(study, config)
    if as_json:
        print_json(summary.as_dict())
        return
    finished = sum(summary.states.get(state, 0) for state in ("complete", "pruned", "fail"))
    states = ", ".join(f"{count} {state}" for state, count in sorted(summary.states.items()))
    typer.echo(f"study {summary.study}: {finished} of {max(finished, summary.n_trials)} trials ({states})")
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
