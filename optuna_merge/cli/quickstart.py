"""``quickstart``: trains small models, searches their merge, and reports."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli import options, output, run_study

_SHOWN = ("file", "n_trials", "workers", "device", "seed", "timeout", "as_json")
_Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that gets everything; made if it is missing.")]


@options.takes_study(shown=_SHOWN, file=_Folder, default=Path("studies"))
def quickstart(
    given: options.StudyArguments,
    models_only: Annotated[
        bool, typer.Option("--models-only", help="Write the files and train the models, but run no study.")
    ] = False,
) -> None:
    """Train three small models, search their merge, and report: a first study, in minutes on a CPU.

    Example: optuna-merge quickstart --n-trials 30

    It writes the study file quickstart.yaml and its eval tasks into the folder, trains the models there, and runs the
    study. All other commands take that study file. Nothing is downloaded.

    Ctrl-C stops it at any time, and the same line continues: what is trained or scored is kept.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: models this small are fastest with one
    from optuna_merge.quickstart.folder import write_quickstart

    study = replace(given, file=write_quickstart(given.file, output.note))
    if models_only:
        typer.echo(f"next: {study.next_line('run-study')}")
    else:
        run_study.search(study)
