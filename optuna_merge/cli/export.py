"""``export``: writes the merge of a trial as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optuna_merge.cli import options, output


@options.takes_study(shown=("storage_path", "storage", "seed", "trust_remote_code", "as_json"))
def export(
    given: options.StudyArguments,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty.")],
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="Number of the trial; default: the best merge.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder of an earlier export.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Also upload the folder to the Hugging Face hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a repository that --push creates public.")] = False,
) -> None:
    """Write the merged model of a trial: the tensors that were scored, tokenizer, model card and merge file.

    Example: optuna-merge export studies/quickstart.yaml merged_model
    """
    from optuna_merge.merging import hub
    from optuna_merge.report.summary import summarize
    from optuna_merge.report.tables import markdown_table
    from optuna_merge.study.export import export_trial

    if push is not None:
        hub.check_name(push)
    config, study = given.open()
    results = markdown_table(summarize(study, config))
    done = export_trial(study, config, out, trial, results=results, overwrite=overwrite, note=output.note)
    address = None
    if push is not None:
        output.note(f"uploading to {push}")
        address = hub.push(done.folder, push, message=f"optuna-merge: {done.description}", private=not public)
    if given.as_json:
        output.print_json({"trial": done.trial, "score": done.score, "folder": str(done.folder), "address": address})
    else:
        typer.echo(str(done.folder))
        if address is not None:
            typer.echo(address)
