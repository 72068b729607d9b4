"""``serve-storage``: serves a storage to workers on other hosts."""

from __future__ import annotations

from typing import Annotated

import typer

from optuna_merge.cli import output


def serve_storage(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Storage to serve: sqlite:///FILE, postgresql://... or mysql://...")
    ],
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 admits other hosts.")
    ] = "localhost",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen on; 0 takes any free port.")
    ] = 13000,
) -> None:
    """Serve a storage over gRPC, so that run-study on other hosts can use it as grpc://HOST:PORT.

    Example: optuna-merge serve-storage sqlite:///studies/study.db --host 0.0.0.0

    There is no password: everyone who reaches the port can change every study. Listen on a network that you trust.
    """
    from pathlib import Path

    from optuna_merge.config.paths import absolute_storage
    from optuna_merge.errors import StudyError
    from optuna_merge.storage.open import shown_url
    from optuna_merge.storage.server import serve

    if url.startswith(("journal:", "grpc:")):
        raise StudyError(f"URL must name a database, got {url}: Optuna's proxy serves no other; use sqlite:///FILE")
    url = absolute_storage(url, Path.cwd())
    with serve(url, host, port) as (server, free_port):
        output.note(f"serving {shown_url(url)} as grpc://{host}:{free_port}; stop with Ctrl-C")
        server.wait_for_termination()
