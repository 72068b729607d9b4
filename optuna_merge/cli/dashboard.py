"""``dashboard``: shows a study in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from optuna_merge.cli import options, output


@options.takes_study(shown=("storage_path", "storage", "as_json"))
def dashboard(
    given: options.StudyArguments,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen on; 0 takes any free port.")
    ] = 8080,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen on; everyone who reaches it can delete the study."),
    ] = "127.0.0.1",
) -> None:
    """Show a study in the browser with optuna-dashboard, while it runs or afterwards. Ctrl-C stops the server.

    Example: optuna-merge dashboard studies/quickstart.yaml

    Pictures are under Analytics and a summary is under Note. Each trial has its merge file and its document scores.
    """
    from optuna_merge.report.dashboard import refresh
    from optuna_merge.report.dashboard_server import make_dashboard

    config, study = given.open()
    refresh(study, config)
    server = make_dashboard(config, host, port)
    if given.as_json:
        output.print_json({"url": server.url})
    else:
        typer.echo(server.url)
    server.serve()
