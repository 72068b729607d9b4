"""``run-study``: runs a study, or continues it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optuna_merge.cli import options, output
from optuna_merge.cli.report import print_summary
from optuna_merge.errors import OptunaMergeError, StudyError

if TYPE_CHECKING:
    from optuna_merge.config.study_config import StudyConfig
    from optuna_merge.report.summary import Summary
    from optuna_merge.report.trackers import Tracker
    from optuna_merge.study.objective import MergeObjective

_NTrials = Annotated[
    int | None,
    typer.Option(
        "--n-trials", "--max-fevals", metavar="N", help="Total number of trials, with baselines and earlier runs."
    ),
]
_Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="Device to score on: auto, cpu, cuda or cuda:<index>.")
]
_Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Number of processes here that run the study together."),
]
_Devices = Annotated[
    str | None, typer.Option("--devices", metavar="LIST", help="One worker on each device, such as cuda:0,cuda:1.")
]
_BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="Sequences in one forward pass, if all are as long as the longest."),
]
_Sigma0 = Annotated[
    float | None,
    typer.Option("--sigma0", metavar="X", help="Initial step size of CMA-ES, as a fraction of each range."),
]
_Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="S", help="Start no new trial after this many seconds.")
]
_MergeCuda = Annotated[
    bool | None,
    typer.Option("--merge-cuda/--no-merge-cuda", help="Merge on the GPU or on the CPU; default: where it is scored."),
]
_InMemory = Annotated[
    bool,
    typer.Option(
        "--in-memory/--no-in-memory", help="For mergekit-evolve's command lines; merges are in memory anyway."
    ),
]
_Vllm = Annotated[bool, typer.Option("--vllm", help="Score with vLLM.")]
_Wandb = Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases; WANDB_MODE=offline works too.")]
_WandbProject = Annotated[str, typer.Option("--wandb-project", metavar="NAME", help="Weights & Biases project.")]
_WandbEntity = Annotated[
    str | None, typer.Option("--wandb-entity", metavar="NAME", help="Weights & Biases user or team.")
]
_Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="PATH",
        help="Log to mlflow, or to an optuna_merge.Tracker of your own, such as my_package.MyTracker; repeatable.",
    ),
]
_TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with a model.")
]


def run_study(
    file: options.StudyFile,
    n_trials: _NTrials = None,
    storage_path: options.StoragePath = None,
    storage: options.StorageUrl = None,
    task_search_path: options.TaskSearchPath = None,
    device: _Device = None,
    workers: _Workers = None,
    devices: _Devices = None,
    batch_size: _BatchSize = None,
    sigma0: _Sigma0 = None,
    seed: options.Seed = None,
    timeout: _Timeout = None,
    merge_cuda: _MergeCuda = None,
    in_memory: _InMemory = True,
    vllm: _Vllm = False,
    wandb: _Wandb = False,
    wandb_project: _WandbProject = "optuna-merge",
    wandb_entity: _WandbEntity = None,
    tracker: _Trackers = None,
    trust_remote_code: _TrustRemoteCode = False,
    as_json: options.Json = False,
    as_worker: Annotated[str | None, typer.Option("--as-worker", hidden=True)] = None,
) -> None:
    """Run a study, or continue it: the same line starts and resumes.

    Example: optuna-merge run-study studies/quickstart.yaml --n-trials 100

    Any number of these commands may run one study at the same time, on all machines that reach its storage. Together
    they run N trials.

    Ctrl-C stops the study cleanly: the running trial is put back, and the next start continues it.
    """
    if as_worker is not None:
        from optuna_merge.cli.processes import run_as_worker

        run_as_worker(file, **json.loads(as_worker))
        return
    if not in_memory:
        raise OptunaMergeError("--no-in-memory must be absent: every merge is made in memory; drop the option")
    overrides = options.overrides_of(
        storage_path,
        storage,
        task_search_path,
        seed,
        {
            "study.n_trials": n_trials,
            "study.timeout": timeout,
            "study.sampler.sigma0": sigma0,
            "engine.device": device,
            "engine.batch_size": batch_size,
            "engine.backend": "vllm" if vllm else None,
            "engine.trust_remote_code": trust_remote_code or None,
            "engine.merge_device": {True: "cuda", False: "cpu", None: None}[merge_cuda],
        },
    )
    from optuna_merge.config.read import load_study

    config = load_study(file, overrides)
    trackers = _make_trackers(tracker or ())
    if wandb:
        trackers.append(_make_wandb(config, wandb_project, wandb_entity))
    on = _worker_devices(workers, devices)
    if len(on) > 1 and trackers:
        raise StudyError("--wandb and --tracker follow one process, got --workers or --devices; leave one out")
    if len(on) > 1:
        overrides["study.n_workers"] = max(len(on), config.study.n_workers)
    config = load_study(file, overrides | ({} if on[0] is None else {"engine.device": on[0]}))
    summary, interrupted = _run(file, config, overrides, on, trackers)
    if as_json:
        output.print_json(summary.as_dict())
    else:
        print_summary(summary)
        if summary.best_trial is not None:
            typer.echo(f"recipe: {_best_config(config)}")
            typer.echo(f"model:  {options.export_line(file, storage_path, storage, seed)}")
    _exit(config, summary, interrupted=interrupted)


def _make_trackers(paths: Sequence[str]) -> list[Tracker]:
    from optuna_merge.report.trackers import make_tracker

    return [make_tracker(path) for path in paths]


def _make_wandb(config: StudyConfig, project: str, entity: str | None) -> Tracker:
    from optuna_merge.report.trackers import WandbTracker

    if find_spec("wandb") is None:
        raise StudyError("--wandb must have the package wandb, got none; pip install 'optuna-merge[wandb]'")
    return WandbTracker(config.storage_path, project, entity)


def _worker_devices(workers: int | None, devices: str | None) -> list[str | None]:
    """The device of each process that runs the study; None for the study file's."""
    from optuna_merge.study.workers import parse_devices

    names = [*parse_devices(devices)] if devices else [None]
    return [*islice(cycle(names), workers or len(names))]


def _run(
    file: Path,
    config: StudyConfig,
    overrides: dict[str, Any],
    devices: Sequence[str | None],
    trackers: Sequence[Tracker],
) -> tuple[Summary, bool]:
    """Run the study, then score the holdout unless the run was interrupted; returns whether it was."""
    from optuna_merge.cli.processes import run_here, run_in_workers
    from optuna_merge.report.summary import summarize
    from optuna_merge.study.holdout import score_holdout
    from optuna_merge.study.holdout_file import N_BEST
    from optuna_merge.study.run import keep_n_chunks

    objective = None
    if len(devices) == 1:
        objective = _objective(file, config)
        interrupted = run_here(keep_n_chunks(config), objective, trackers)
    else:
        interrupted = run_in_workers(file, overrides, devices)
    study = options.open_started(config)
    if not interrupted:
        objective = objective or _objective(file, config)
        score_holdout(study, objective, output.note)
    if objective is not None:
        objective.close()
    return summarize(study, config, N_BEST), interrupted


def _objective(file: Path, config: StudyConfig) -> MergeObjective:
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import keep_n_chunks

    output.note(f"reading models and eval tasks of {file}")
    objective = MergeObjective.from_config(keep_n_chunks(config))
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
