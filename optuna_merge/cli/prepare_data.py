"""``prepare-data``: prepares the documents of a study's eval tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli import options, output


def prepare_data(
    file: options.StudyFile,
    copies: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Read local copies of the datasets instead of the hub.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Draw the samples that the study's eval tasks declare; they are the same every time.

    Example: optuna-merge prepare-data studies/spartqa_alpaca.yaml
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.data import prepare_data

    config = load_study(file)
    samples = prepare_data([task.name for task in config.tasks], config.task_search_path, copies)
    if as_json:
        output.print_json([{key: str(value) for key, value in asdict(sample).items()} for sample in samples])
        return
    for sample in samples:
        typer.echo(str(sample))
