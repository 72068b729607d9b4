"""``prepare-data``: prepares the documents of a study's eval tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli import options, output


@options.takes_study(shown=("task_search_path", "as_json"))
def prepare_data(
    given: options.StudyArguments,
    copies: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Read local copies of the datasets instead of the hub.")
    ] = None,
) -> None:
    """Draw the samples that the study's eval tasks declare; they are the same every time.

    Example: optuna-merge prepare-data studies/spartqa_alpaca.yaml
    """
    from optuna_merge.data import prepare_data

    config = given.load()
    samples = prepare_data([task.name for task in config.tasks], config.task_search_path, copies)
    if given.as_json:
        output.print_json([{key: str(value) for key, value in asdict(sample).items()} for sample in samples])
        return
    for sample in samples:
        typer.echo(str(sample))
