"""``export``: write a trial's merge as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli.options import (
    Json,
    Seed,
    StoragePath,
    StorageUrl,
    StudyFile,
    note,
    open_started,
    overrides_of,
    print_json,
)
from optuna_merge.errors import StudyError


def export(
    file: StudyFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty.")],
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="Number of the trial; the best merge by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload it to the Hugging Face hub, too.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that --push makes is public.")] = False,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Write the merged model of a trial: the tensors that were scored, tokenizer, model card and merge file.

    Example: optuna-merge export studies/quickstart.yaml merged_model
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.merging.export import export
    from optuna_merge.merging.hub import check_name
    from optuna_merge.merging.hub import push as upload
    from optuna_merge.merging.merger import Merger
    from optuna_merge.report.summary import markdown_table, summarize
    from optuna_merge.search.space import SearchSpace
    from optuna_merge.storage.attributes import FAILURE
    from optuna_merge.storage.fingerprint import refuse_differences
    from optuna_merge.storage.trials import best_merge, score_of
    from optuna_merge.study.fingerprint import merge_fingerprint
    from optuna_merge.study.models import StudyModels, recipe_of

    if push is not None:
        check_name(push)
    config = load_study(file, overrides_of(storage_path, storage, seed=seed))
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
    if chosen.state.name == "FAIL":
        reason = chosen.user_attrs.get(FAILURE, "no reason recorded")
        raise StudyError(f"trial {chosen.number}: must have a score, it failed: {reason}; choose another, see status")
    models = StudyModels.open(config)
    space = SearchSpace(config, models.refs)
    refuse_differences(study, merge_fingerprint(config, models, space))
    recipe = recipe_of(space, models, chosen)
    score = score_of(chosen) if chosen.state.name == "COMPLETE" else None
    origin = f"study {study.study_name}, trial {chosen.number}, "
    origin += f"{chosen.state.name.lower()}" if score is None else f"score {score:.6g}"
    note(f"merging trial {chosen.number}")
    folder = export(
        recipe,
        out,
        merger=Merger(models.views, tokenizer_source=models.refs.tokenizer_source),
        references=models.spelling,
        comment=[origin],
        results=f"This is {origin}.\n\n{markdown_table(summarize(study, config))}",
        overwrite=overwrite,
        copy_code=config.engine.trust_remote_code,
    )
    address = None
    if push is not None:
        note(f"uploading to {push}")
        address = upload(folder, push, message=f"optuna-merge: {origin}", private=not public)
    if as_json:
        print_json({"trial": chosen.number, "score": score, "folder": str(folder), "address": address})
    else:
        typer.echo(str(folder))
        if address is not None:
            typer.echo(address)
