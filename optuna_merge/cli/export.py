"""``export``: write a trial's merge as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli.options import (
    Json,
    StoragePath,
    StorageUrl,
    StudyFile,
    note,
    open_started,
    print_json,
    storage_overrides,
)
from optuna_merge.errors import StudyError


def export(
    file: StudyFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty.")],
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="Number of the trial; the best merge by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is not empty.")] = False,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    as_json: Json = False,
) -> None:
    """Write the merged model of a trial: the tensors that were scored, tokenizer, model card and merge file.

    Example: optuna-merge export studies/quickstart.yaml merged_model
    """
    from optuna_merge.config import load_study
    from optuna_merge.export import export
    from optuna_merge.merge import Merger
    from optuna_merge.objective import StudyModels, recipe_of
    from optuna_merge.report import best_merge, markdown_table, summarize
    from optuna_merge.space import SearchSpace

    config = load_study(file, storage_overrides(storage_path, storage))
    study = open_started(config)
    trials = study.get_trials(deepcopy=False)
    if trial is None:
        chosen = best_merge(study)
        if chosen is None:
            raise StudyError(f"{file}: study must have a complete merge to export, got none yet; run it first")
    elif not 0 <= trial < len(trials):
        raise StudyError(f"--trial must be in [0, {len(trials) - 1}], got {trial}; see status")
    else:
        chosen = trials[trial]
    models = StudyModels.open(config)
    recipe = recipe_of(SearchSpace(config, models.refs), models, chosen)
    note(f"merging trial {chosen.number}")
    folder = export(
        recipe,
        out,
        merger=Merger(models.views, tokenizer_source=models.refs.tokenizer_source),
        references=models.spelling,
        comment=[f"study {study.study_name}, trial {chosen.number}, score {chosen.value}"],
        results=markdown_table(summarize(study, config)),
        overwrite=overwrite,
        copy_code=config.engine.trust_remote_code,
    )
    if as_json:
        print_json({"trial": chosen.number, "score": chosen.value, "folder": str(folder)})
    else:
        typer.echo(str(folder))
