"""``run-study``: run a study, or go on with it."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from optuna_merge.cli.options import (
    INTERRUPTED,
    Json,
    Seed,
    StoragePath,
    StorageUrl,
    StudyFile,
    TaskSearchPath,
    export_line,
    note,
    open_started,
    overrides_of,
    print_json,
)
from optuna_merge.cli.report import print_summary
from optuna_merge.errors import OptunaMergeError, StudyError


def run_study(
    file: StudyFile,
    n_trials: Annotated[
        int | None,
        typer.Option(
            "--n-trials", "--max-fevals", metavar="N", help="Trials in total, baselines and earlier runs included."
        ),
    ] = None,
    storage_path: StoragePath = None,
    storage: StorageUrl = None,
    task_search_path: TaskSearchPath = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:<index>.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Longest sequences in one forward pass.")
    ] = None,
    sigma0: Annotated[
        float | None, typer.Option("--sigma0", help="First step of CMA-ES as a fraction of each range.")
    ] = None,
    seed: Seed = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="S", help="Seconds after which no further trial begins.")
    ] = None,
    merge_cuda: Annotated[
        bool | None,
        typer.Option(
            "--merge-cuda/--no-merge-cuda", help="Merge on the GPU or on the CPU; by default where it is scored."
        ),
    ] = None,
    in_memory: Annotated[
        bool,
        typer.Option("--in-memory/--no-in-memory", help="Understood and needless: every merge is made in memory."),
    ] = True,
    vllm: Annotated[bool, typer.Option("--vllm", help="Score with vLLM.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases; WANDB_MODE=offline works.")] = False,
    wandb_project: Annotated[
        str, typer.Option("--wandb-project", metavar="NAME", help="Project there.")
    ] = "optuna-merge",
    wandb_entity: Annotated[
        str | None, typer.Option("--wandb-entity", metavar="NAME", help="User or team there.")
    ] = None,
    tracker: Annotated[
        list[str] | None,
        typer.Option("--tracker", metavar="PATH", help="mlflow, or the import path of a Tracker class of your own."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that a model folder brings along.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with it: the same line starts and resumes.

    Example: optuna-merge run-study studies/quickstart.yaml --n-trials 100

    Ctrl-C stops it cleanly; the trial in flight is put back, and the next start takes it up where it was.
    """
    if not in_memory:
        raise OptunaMergeError("--no-in-memory must be absent: every merge is made in memory; drop the option")
    overrides = overrides_of(storage_path, storage, task_search_path, seed)
    given: dict[str, Any] = {
        "study.n_trials": n_trials,
        "study.timeout": timeout,
        "study.sampler.sigma0": sigma0,
        "engine.device": device,
        "engine.batch_size": batch_size,
        "engine.backend": "vllm" if vllm else None,
        "engine.trust_remote_code": trust_remote_code or None,
        "engine.merge_device": {True: "cuda", False: "cpu", None: None}[merge_cuda],
    }
    overrides |= {key: value for key, value in given.items() if value is not None}

    from optuna_merge.config import load_study

    config = load_study(file, overrides)

    from optuna_merge import study as studies
    from optuna_merge.cli.progress import TerminalWatcher
    from optuna_merge.dashboard import DashboardWatcher
    from optuna_merge.holdout import score_holdout
    from optuna_merge.objective import MergeObjective
    from optuna_merge.report import N_BEST, summarize
    from optuna_merge.trackers import TrackingWatcher, WandbTracker, make_tracker
    from optuna_merge.watcher import Watchers

    trackers = [make_tracker(path) for path in tracker or ()]
    if wandb:
        if find_spec("wandb") is None:
            raise StudyError("--wandb must have the package wandb, got none; pip install 'optuna-merge[wandb]'")
        trackers.append(WandbTracker(config.storage_path, wandb_project, wandb_entity))

    note(f"reading models and eval tasks of {file}")
    config = studies.as_started(config)
    objective = MergeObjective.from_config(config)
    for line in objective.describe():
        note(line)
    dashboard = DashboardWatcher(config, objective.merge_file, note)
    best_file = config.storage_path / studies.BEST_CONFIG
    tracking = [TrackingWatcher(one, config, best_file, note) for one in trackers]
    with TerminalWatcher() as terminal, ExitStack() as stack:
        for watcher in tracking:
            stack.callback(watcher.close)
        outcome = studies.run_study(config, objective, Watchers([dashboard, *tracking, terminal]))
    study = open_started(config)
    if not outcome.interrupted:
        score_holdout(study, objective, note)
    summary = summarize(study, config, N_BEST)
    if as_json:
        print_json(summary.as_dict())
    else:
        print_summary(summary)
        if summary.best_trial is not None:
            typer.echo(f"recipe: {config.storage_path / studies.BEST_CONFIG}")
            typer.echo(f"model:  {export_line(file, storage_path, storage, seed)}")
    objective.close()
    if outcome.interrupted:
        note(f"interrupted after {outcome.n_finished} of {config.study.n_trials} trials; the same command continues")
        raise typer.Exit(INTERRUPTED)
    if summary.best_trial is None:
        raise StudyError(
            f"study {config.study.name!r} must have a merge with a score, got none; see the failures above"
        )
    if outcome.timed_out:
        note(f"timeout after {outcome.n_finished} of {config.study.n_trials} trials; the same command continues")
