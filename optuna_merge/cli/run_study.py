"""``run-study``: runs a study, or continues it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optuna_merge.cli import options, output
from optuna_merge.cli.report import print_summary
from optuna_merge.errors import OptunaMergeError, StudyError

if TYPE_CHECKING:
    from optuna_merge.config.study_config import StudyConfig
    from optuna_merge.report.summary import Summary
    from optuna_merge.report.trackers import Tracker
    from optuna_merge.study.objective import MergeObjective


@options.takes_study(shown=options.ALL)
def run_study(
    given: options.StudyArguments, as_worker: Annotated[str | None, typer.Option("--as-worker", hidden=True)] = None
) -> None:
    """Run a study, or continue it: the same line starts and resumes.

    Example: optuna-merge run-study studies/quickstart.yaml --n-trials 100

    Any number of these commands may run one study at the same time, on all machines that reach its storage. Together
    they run N trials.

    Ctrl-C stops the study cleanly: the running trial is put back, and the next start continues it.
    """
    if as_worker is not None:
        from optuna_merge.cli.processes import run_as_worker

        run_as_worker(given.file, **json.loads(as_worker))
    else:
        search(given)


def search(given: options.StudyArguments) -> None:
    """Run the study that the options describe, and print what it found and what to do next.

    Raises:
        typer.Exit: If the run was interrupted.
        OptunaMergeError: If the study cannot be run, or no merge has a score.
    """
    for line in given.needless():
        output.note(line)
    config = given.load()
    trackers = _make_trackers(given, config)
    devices = given.worker_devices()
    if len(devices) > 1 and trackers:
        raise StudyError("--wandb and --tracker follow one process, got several workers; leave them out")
    summary, interrupted, fault = _run(given, config, devices, trackers)
    if given.as_json:
        output.print_json(summary.as_dict())
    else:
        print_summary(summary)
        if summary.best_trial is not None:
            typer.echo(f"recipe: {_best_config(config)}")
            typer.echo(f"model:  {given.next_line('export', 'OUT')}")
            typer.echo(f"page:   {given.next_line('report', '--html', 'report.html')}")
            typer.echo(f"more:   the same line with --n-trials {2 * config.study.n_trials}")
    if given.save_final_model and summary.best_trial is not None and not interrupted:
        _save_final_model(config)
    if fault is not None:
        raise fault
    _exit(config, summary, interrupted=interrupted)


def _make_trackers(given: options.StudyArguments, config: StudyConfig) -> list[Tracker]:
    from optuna_merge.report.trackers import WandbTracker, make_tracker

    trackers = [make_tracker(path) for path in given.tracker or ()]
    if given.wandb:
        if find_spec("wandb") is None:
            raise StudyError("--wandb must have the package wandb, got none; pip install 'optuna-merge[wandb]'")
        trackers.append(WandbTracker(config.storage_path, given.wandb_project, given.wandb_entity))
    return trackers


def _run(
    given: options.StudyArguments, config: StudyConfig, devices: Sequence[str | None], trackers: Sequence[Tracker]
) -> tuple[Summary, bool, OptunaMergeError | None]:
    """Run the study, then score the holdout unless the run was interrupted.

    Returns:
        What the study found, whether the run was interrupted, and what went wrong with the holdout.
    """
    from optuna_merge.cli.processes import run_here, run_in_workers
    from optuna_merge.report.summary import summarize
    from optuna_merge.study.holdout_file import N_BEST
    from optuna_merge.study.run import as_started

    fault = None
    if len(devices) == 1:
        with closing(_objective(given.file, config)) as objective:
            interrupted = run_here(as_started(config), objective, trackers)
            if not interrupted:
                fault = _score_holdout(config, objective)
    else:
        vllm = config.engine.backend == "vllm"
        interrupted = run_in_workers(given.file, given.overrides(), devices, vllm=vllm)
        if not interrupted:
            with closing(_objective(given.file, config)) as objective:
                fault = _score_holdout(config, objective)
    return summarize(options.open_started(config), config, N_BEST), interrupted, fault


def _score_holdout(config: StudyConfig, objective: MergeObjective) -> OptunaMergeError | None:
    """Score the holdout; returns what went wrong, to be raised when what the search found has been shown."""
    from optuna_merge.report.artifacts import upload_answers
    from optuna_merge.study.holdout import score_holdout

    try:
        study = options.open_started(config)
        score_holdout(study, objective, output.note)
        upload_answers(study, config)
    except OptunaMergeError as exc:
        return exc
    return None


def _save_final_model(config: StudyConfig) -> None:
    """Export the best merge into the storage path, where mergekit-evolve saves it."""
    from optuna_merge.report.summary import summarize
    from optuna_merge.report.tables import markdown_table
    from optuna_merge.study.export import export_trial

    study = options.open_started(config)
    folder = config.storage_path / "final_model"
    results = markdown_table(summarize(study, config))
    done = export_trial(study, config, folder, results=results, overwrite=True, note=output.note)
    output.note(f"final model: {done.folder}")


def _objective(file: Path, config: StudyConfig) -> MergeObjective:
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import as_started

    output.note(f"reading models and eval tasks of {file}")
    objective = MergeObjective.from_config(as_started(config), output.note)
    for line in objective.describe():
        output.note(line)
    return objective


def _best_config(config: StudyConfig) -> Path:
    from optuna_merge.study.folder import BEST_CONFIG

    return config.storage_path / BEST_CONFIG


def _exit(config: StudyConfig, summary: Summary, *, interrupted: bool) -> None:
    """Say how the run ended, if not as planned.

    Raises:
        typer.Exit: If the run was interrupted.
        StudyError: If no merge has a score.
    """
    progress = f"{summary.n_finished} of {config.study.n_trials} trials; the same command continues"
    if interrupted:
        output.note(f"interrupted after {progress}")
        raise typer.Exit(options.INTERRUPTED)
    if summary.best_trial is None:
        raise StudyError(
            f"study {config.study.name!r} must have a merge with a score, got none; see the failures above"
        )
    if summary.n_finished < config.study.n_trials:
        output.note(f"timeout after {progress}")
