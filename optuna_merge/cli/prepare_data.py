"""``prepare-data``: make the documents of a study's eval tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli.options import Json, StudyFile, print_json


def prepare_data(
    file: StudyFile,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="Local copies of the datasets instead of the hub.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the samples that the study's eval tasks declare, the same ones every time.

    Example: optuna-merge prepare-data studies/spartqa_alpaca.yaml
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.data import prepare_data

    config = load_study(file)
    samples = prepare_data([task.name for task in config.tasks], config.task_search_path, source)
    if as_json:
        print_json([{key: str(value) for key, value in asdict(sample).items()} for sample in samples])
        return
    for sample in samples:
        typer.echo(str(sample))
