"""``answers``: shows what the models answered to held-out documents, side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from optuna_merge.cli import options, output


@options.takes_study(shown=("storage_path", "storage", "as_json"))
def answers(
    given: options.StudyArguments,
    trial: Annotated[
        int | None, typer.Option("--trial", metavar="N", help="A trial to show instead of the best merge.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, metavar="N", help="Number of documents to show.")] = 5,
) -> None:
    """Show what base, sources and the best merge answered to some held-out documents, side by side with their scores.

    Example: optuna-merge answers studies/quickstart.yaml --n 10

    Documents on which the models' scores differ most come first, in turns of one of each task. Loads no model:
    run-study and report keep the answers when they score the holdout.
    """
    from optuna_merge.report.answers import answer_lines, nothing_to_show, shown_documents
    from optuna_merge.report.summary import summarize

    config, study = given.open()
    summary = summarize(study, config)
    found = shown_documents(study, summary, config, trial)
    if not found:
        raise nothing_to_show(study, summary, config, trial)
    if given.as_json:
        output.print_json([asdict(document) for document in found[:n]])
        return
    for document in found[:n]:
        for line in answer_lines(document):
            typer.echo(line)
    n_differ = sum(document.differs for document in found)
    typer.echo(f"{min(n, len(found))} of {len(found)} held-out documents; scores differ on {n_differ}")
