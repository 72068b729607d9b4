"""``dashboard``: the study in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from optuna_merge.cli.options import StoragePath, StorageUrl, StudyFile, open_started, overrides_of


def dashboard(
    file: StudyFile,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8080,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; whoever reaches it can delete the study.")
    ] = "127.0.0.1",
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
) -> None:
    """Show the study in the browser with optuna-dashboard, while it runs or afterwards. Ctrl-C ends it.

    Example: optuna-merge dashboard studies/quickstart.yaml

    The pictures are under Analytics, the note under Note, and each trial has its merge file and its documents' scores.
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.report.dashboard import make_dashboard, refresh

    config = load_study(file, overrides_of(storage_path, storage))
    refresh(open_started(config), config)
    server = make_dashboard(config, host, port)
    typer.echo(server.url)
    server.serve()
