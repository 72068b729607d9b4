"""``dashboard``: shows a study in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from optuna_merge.cli import options


def dashboard(
    file: options.StudyFile,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 takes any free port.")
    ] = 8080,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on; everyone who reaches it can delete the study."),
    ] = "127.0.0.1",
    storage_path: options.StoragePath = None,
    storage: options.StorageUrl = None,
) -> None:
    """Show a study in the browser with optuna-dashboard, while it runs or afterwards. Ctrl-C stops the server.

    Example: optuna-merge dashboard studies/quickstart.yaml

    Pictures are under Analytics and a summary is under Note. Each trial has its merge file and its document scores.
    """
    from optuna_merge.report.dashboard import refresh
    from optuna_merge.report.dashboard_server import make_dashboard

    config, study = options.open_study_file(file, storage_path, storage)
    refresh(study, config)
    server = make_dashboard(config, host, port)
    typer.echo(server.url)
    server.serve()
