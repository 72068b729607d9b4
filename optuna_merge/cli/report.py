"""``report``: shows what a study found, on the searched documents and on the holdout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli import options, output
from optuna_merge.errors import OptunaMergeError, StudyError

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config.study_config import StudyConfig
    from optuna_merge.report.answers import ShownDocument
    from optuna_merge.report.summary import Row, Summary
    from optuna_merge.study.holdout_file import HoldoutRow

_N_EXAMPLES = 2
"""Documents whose answers are printed; ``answers`` shows more."""

_SHOWN = ("storage_path", "storage", "task_search_path", "device", "seed", "vllm", "trust_remote_code", "as_json")


@options.takes_study(shown=_SHOWN)
def report(
    given: options.StudyArguments,
    best: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Number of best merges to show; default: 5.")
    ] = None,
    html: options.Html = None,
    lengths: Annotated[
        int | None,
        typer.Option(
            "--lengths", min=1, metavar="N", help="Score the holdout again with answers of up to N tokens; shows both."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print markdown, for a model card.")] = False,
) -> None:
    """Compare the best merges with the sources, the base and uniform merges, on searched and held-out documents.

    Example: optuna-merge report studies/quickstart.yaml --html report.html

    Where one of the best merges has no score on the holdout yet, this loads the models and scores it.
    """
    from optuna_merge.report.answers import shown_documents
    from optuna_merge.report.summary import summarize
    from optuna_merge.report.tables import markdown_table
    from optuna_merge.study.holdout_file import N_BEST, needs_holdout

    best = best or N_BEST
    config, study = given.open()
    if lengths is not None and config.holdout is None:
        raise StudyError("--lengths must be for a study with a holdout, got one without; set holdout")
    fault = None
    limits = [None] if lengths is None else [None, lengths]
    for limit in limits:
        if fault is None and config.holdout is not None and needs_holdout(study, config.storage_path, best, limit):
            try:
                _score_holdout(study, config, best, limit)
            except OptunaMergeError as exc:
                fault = exc  # raised when what the search found has been shown
    summary = summarize(study, config, best)
    longer = None if lengths is None else summarize(study, config, best, lengths)
    examples = shown_documents(study, summary, config)
    if html is not None:
        output.write_page(html, _page(study, summary, config, examples, longer))
    if given.as_json:
        output.print_json(summary.as_dict() | ({} if longer is None else {"longer": longer.as_dict()}))
    elif markdown:
        typer.echo(markdown_table(summary))
    else:
        print_summary(summary)
        if longer is not None:
            _print_longer(longer)
        _print_examples(examples, given)
    if fault is not None:
        raise fault


def _print_examples(examples: Sequence[ShownDocument], given: options.StudyArguments) -> None:
    from optuna_merge.report.answers import brief_lines

    shown = [document for document in examples if document.differs][:_N_EXAMPLES]
    for document in shown:
        for line in brief_lines(document):
            typer.echo(line)
    if shown:
        typer.echo(f"More answers: {given.next_line('answers')}")


def _score_holdout(study: optuna.Study, config: StudyConfig, n_best: int, max_gen_toks: int | None) -> None:
    from optuna_merge.report.artifacts import upload_answers
    from optuna_merge.storage.fingerprint import check_fingerprint
    from optuna_merge.study.holdout import score_holdout
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import as_started

    with closing(MergeObjective.from_config(as_started(config), output.note)) as objective:
        check_fingerprint(study, objective.fingerprint())
        score_holdout(study, objective, output.note, n_best, max_gen_toks)
    upload_answers(study, config)


def _page(
    study: optuna.Study,
    summary: Summary,
    config: StudyConfig,
    examples: Sequence[ShownDocument],
    longer: Summary | None,
) -> str:
    from optuna_merge.errors import first_line
    from optuna_merge.report.page import page
    from optuna_merge.report.study_pictures import pictures_of_study
    from optuna_merge.study.folder import BEST_CONFIG

    recipe = config.storage_path / BEST_CONFIG
    try:
        text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    except OSError as exc:
        raise StudyError(f"{recipe}: best merge must be readable, got {first_line(exc)}") from exc
    return page(summary, config, pictures_of_study(study, summary, config), text, examples, longer)


def print_summary(summary: Summary) -> None:
    """Print the tables of a study, and the sentences that follow from them, on stdout."""
    from optuna_merge.report.lengths import answers_split, answers_table, length_warnings
    from optuna_merge.report.summary import ascent_line, verdict
    from optuna_merge.report.tables import ascent_table, front_table, held_rows, race_table, searched_table

    typer.echo(
        f"study {summary.study}: {summary.state_counts};"
        f" {summary.n_documents} documents scored in {summary.seconds:.0f} s"
    )
    if line := ascent_line(summary):
        typer.echo(line)
    if summary.judge_line:
        typer.echo(summary.judge_line)
    if summary.race is not None:
        typer.echo(summary.race.line)
        race = race_table(summary.race, "race")
        output.print_table(race.header, race.rows)
    if not summary.rows:
        typer.echo("no trial is complete yet")
        return
    searched = searched_table(summary, "searched documents")
    output.print_table(searched.header, searched.rows)
    if held := held_rows(summary):
        _print_holdout(held, "holdout documents")
        typer.echo("± is one standard error; differences are paired by document.")
        typer.echo(verdict(summary))
    if summary.ascent:
        steps = ascent_table(summary)
        output.print_table(steps.header, steps.rows)
    if answers := answers_table(summary, f"answers, {answers_split(summary)} documents"):
        output.print_table(answers.header, answers.rows)
        for warning in length_warnings(summary):
            typer.echo(warning)
    if summary.front:
        front = front_table(summary, "front, searched documents", "trial")
        output.print_table(front.header, front.rows)
        typer.echo("No other trial is better than one of these in every objective; export --trial N writes one.")
    for number, reason in summary.failures.items():
        typer.echo(f"trial {number} failed: {reason}")


def _print_longer(longer: Summary) -> None:
    """Print the figures on the holdout for another limit of the answers' length."""
    from optuna_merge.report.lengths import answers_table, length_warnings
    from optuna_merge.report.summary import verdict
    from optuna_merge.report.tables import held_rows

    first = f"holdout, at most {longer.max_gen_toks} tokens"
    if held := held_rows(longer):
        _print_holdout(held, first)
        typer.echo(verdict(longer))
        if answers := answers_table(longer, f"answers, {first}"):
            output.print_table(answers.header, answers.rows)
        for warning in length_warnings(longer):
            typer.echo(warning)


def _print_holdout(held: list[tuple[Row, HoldoutRow]], first: str) -> None:
    from optuna_merge.report.tables import figure_text, lead_text

    tasks = list(held[0][1].tasks)
    rows = []
    for row, figures in held:
        metrics = [figure_text(figures.tasks[task].value, figures.tasks[task].stderr) for task in tasks]
        lead = "" if row.kind == "best" else lead_text(figures)
        if row.kind != "best" and 0 < figures.difference_stderr < float("inf"):
            lead += f" ({figures.difference / figures.difference_stderr:+.1f} SE)"
        rows.append([row.name, str(row.trial), f"{figures.value:.4f}", *metrics, lead])
    output.print_table([first, "trial", "score", *tasks, "best merge − this"], rows)
