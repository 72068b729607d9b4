"""``run-study``: run a study, or go on with it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from optuna_merge.config.sections import StudyConfig
    from optuna_merge.report.trackers import Tracker
    from optuna_merge.study.objective import MergeObjective


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
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", help="Processes that run it here, together."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option("--devices", metavar="LIST", help="One worker on each, such as cuda:0,cuda:1.")
    ] = None,
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
    as_worker: Annotated[str | None, typer.Option("--as-worker", hidden=True)] = None,
) -> None:
    """Run a study, or go on with it: the same line starts and resumes.

    Example: optuna-merge run-study studies/quickstart.yaml --n-trials 100

    Any number of these may run one study at the same time, on all machines that reach its storage; they run N trials
    in all.

    Ctrl-C stops it cleanly; the trial in flight is put back, and the next start takes it up where it was.
    """
    if as_worker is not None:
        _work(file, **json.loads(as_worker))
        return
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

    from optuna_merge.config.read import load_study

    config = load_study(file, overrides)

    from optuna_merge.report.summary import summarize
    from optuna_merge.report.trackers import WandbTracker, make_tracker
    from optuna_merge.storage.trials import n_finished
    from optuna_merge.study import run as studies
    from optuna_merge.study.holdout import score_holdout
    from optuna_merge.study.holdout_file import N_BEST
    from optuna_merge.study.workers import parse_devices

    trackers = [make_tracker(path) for path in tracker or ()]
    if wandb:
        if find_spec("wandb") is None:
            raise StudyError("--wandb must have the package wandb, got none; pip install 'optuna-merge[wandb]'")
        trackers.append(WandbTracker(config.storage_path, wandb_project, wandb_entity))

    names: list[str | None] = [*parse_devices(devices)] if devices else []
    n_workers = workers or len(names) or 1
    if n_workers > 1:
        if trackers:
            raise StudyError("--wandb and --tracker follow one process, got --workers or --devices; leave one out")
        overrides["study.n_workers"] = max(n_workers, config.study.n_workers)
    config = load_study(file, overrides | ({"engine.device": names[0]} if names else {}))
    objective = None
    if n_workers == 1:
        objective = _objective(file, config)
        interrupted = _run(studies.as_started(config), objective, trackers)
    else:
        interrupted = _run_workers(file, overrides, [*islice(cycle(names or [None]), n_workers)])
    study = open_started(config)
    if not interrupted:
        objective = objective or _objective(file, config)
        score_holdout(study, objective, note)
    summary = summarize(study, config, N_BEST)
    if as_json:
        print_json(summary.as_dict())
    else:
        print_summary(summary)
        if summary.best_trial is not None:
            typer.echo(f"recipe: {config.storage_path / studies.BEST_CONFIG}")
            typer.echo(f"model:  {export_line(file, storage_path, storage, seed)}")
    if objective is not None:
        objective.close()
    n_done = n_finished(study)
    if interrupted:
        note(f"interrupted after {n_done} of {config.study.n_trials} trials; the same command continues")
        raise typer.Exit(INTERRUPTED)
    if summary.best_trial is None:
        raise StudyError(
            f"study {config.study.name!r} must have a merge with a score, got none; see the failures above"
        )
    if n_done < config.study.n_trials:
        note(f"timeout after {n_done} of {config.study.n_trials} trials; the same command continues")


def _objective(file: Path, config: StudyConfig) -> MergeObjective:
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import as_started

    note(f"reading models and eval tasks of {file}")
    objective = MergeObjective.from_config(as_started(config))
    for line in objective.describe():
        note(line)
    return objective


def _run(
    config: StudyConfig, objective: MergeObjective, trackers: Sequence[Tracker], worker: int | None = None
) -> bool:
    """Run the study in this process; whether it was interrupted."""
    from optuna_merge.cli.progress import TerminalWatcher
    from optuna_merge.report.dashboard import DashboardWatcher
    from optuna_merge.report.trackers import TrackingWatcher
    from optuna_merge.study.run import BEST_CONFIG, run_study
    from optuna_merge.study.watcher import Watchers

    dashboard = DashboardWatcher(config, objective.merge_file, note)
    tracking = [TrackingWatcher(one, config, config.storage_path / BEST_CONFIG, note) for one in trackers]
    with TerminalWatcher(worker) as terminal, ExitStack() as stack:
        for watcher in tracking:
            stack.callback(watcher.close)
        return run_study(config, objective, Watchers([dashboard, *tracking, terminal])).interrupted


def _run_workers(file: Path, overrides: dict[str, Any], devices: list[str | None]) -> bool:
    """Run worker processes on these devices, None being the study file's; whether they were interrupted."""
    from optuna_merge.study.run import terminable
    from optuna_merge.study.workers import run_workers

    start = [sys.executable, "-m", "optuna_merge", "run-study", str(file), "--as-worker"]
    commands = []
    for number, device in enumerate(devices, start=1):
        given = overrides if device is None else overrides | {"engine.device": device}
        commands.append([*start, json.dumps({"number": number, "overrides": given}, default=str)])
    where = ", ".join(dict.fromkeys(device for device in devices if device is not None))
    note(f"{len(devices)} workers" + (f" on {where}" if where else ""))
    with terminable():
        return run_workers(commands, max(1, (os.cpu_count() or 1) // len(devices)), note)


def _work(file: Path, number: int, overrides: dict[str, Any]) -> None:
    """What a worker process does; the first one says what the study is."""
    from optuna_merge.config.read import load_study
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import as_started
    from optuna_merge.study.workers import CRASHED, stop_with_parent

    stop_with_parent()
    try:
        config = as_started(load_study(file, overrides))
        objective = MergeObjective.from_config(config)
        for line in objective.describe() if number == 1 else ():
            note(line)
        interrupted = _run(config, objective, (), worker=number)
        objective.close()
    except OptunaMergeError:
        raise
    except Exception as exc:
        traceback.print_exc()
        raise typer.Exit(CRASHED) from exc
    if interrupted:
        raise typer.Exit(INTERRUPTED)
