"""The processes that run a study: this one, or several workers on this machine, and what a worker does.

Knows who watches a run; the run itself is in ``study/run.py`` and the life of workers in ``study/workers.py``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from optuna_merge.cli import options, output
from optuna_merge.errors import OptunaMergeError

if TYPE_CHECKING:
    from optuna_merge.config.study_config import StudyConfig
    from optuna_merge.report.trackers import Tracker
    from optuna_merge.study.objective import MergeObjective


def run_here(
    config: StudyConfig, objective: MergeObjective, trackers: Sequence[Tracker] = (), worker: int | None = None
) -> bool:
    """Run a study in this process, watched by the terminal, the dashboard and trackers.

    Args:
        config: The study file, with the number of chunks that the study was started with.
        objective: Scores its trials.
        trackers: Are told what happens.
        worker: Number of this worker process; None if this process runs the study alone.

    Returns:
        Whether the run was interrupted.
    """
    from optuna_merge.cli.progress import TerminalWatcher
    from optuna_merge.report.dashboard_watcher import DashboardWatcher
    from optuna_merge.report.tracking_watcher import TrackingWatcher
    from optuna_merge.study.folder import BEST_CONFIG
    from optuna_merge.study.run import run_study
    from optuna_merge.study.watcher import Watchers

    dashboard = DashboardWatcher(config, objective.merge_file, output.note)
    tracking = [
        TrackingWatcher(tracker, config, config.storage_path / BEST_CONFIG, output.note) for tracker in trackers
    ]
    with TerminalWatcher(worker) as terminal, ExitStack() as stack:
        for watcher in tracking:
            stack.callback(watcher.close)
        return run_study(config, objective, Watchers([dashboard, *tracking, terminal])).interrupted


def run_in_workers(file: Path, overrides: dict[str, Any], devices: Sequence[str | None], *, vllm: bool) -> bool:
    """Run a study in worker processes.

    Args:
        file: The study file.
        overrides: Dotted key to value; replaces what the file says.
        devices: The device of each worker; None for the study file's.
        vllm: Whether vLLM scores. It runs on the first GPU that it sees, so each worker is shown its own GPU only;
            afterwards, this process is shown the first worker's.

    Returns:
        Whether the workers were interrupted.
    """
    from optuna_merge.study.run import terminable
    from optuna_merge.study.workers import run_workers

    start = [sys.executable, "-m", "optuna_merge", "run-study", str(file), "--as-worker"]
    tasks = worker_tasks(overrides, devices, vllm=vllm)
    commands = [[*start, json.dumps(task, default=str)] for task in tasks]
    where = ", ".join(dict.fromkeys(device for device in devices if device is not None))
    output.note(f"{len(devices)} workers" + (f" on {where}" if where else ""))
    with terminable():
        interrupted = run_workers(commands, max(1, (os.cpu_count() or 1) // len(devices)), output.note)
    _see_only(tasks[0]["gpu"])
    return interrupted


def worker_tasks(overrides: dict[str, Any], devices: Sequence[str | None], *, vllm: bool) -> list[dict[str, Any]]:
    """The arguments of :func:`run_as_worker` for each worker, except the file; see :func:`run_in_workers`.

    Raises:
        OptunaMergeError: If ``CUDA_VISIBLE_DEVICES`` hides a GPU that is asked for.
    """
    tasks = []
    for number, device in enumerate(devices, start=1):
        gpu = _visible_gpu(device) if vllm and device is not None and device.startswith("cuda") else None
        on = "cuda:0" if gpu is not None else device
        given = overrides if on is None else overrides | {"engine.device": on}
        tasks.append({"number": number, "overrides": given, "gpu": gpu})
    return tasks


def run_as_worker(file: Path, number: int, overrides: dict[str, Any], gpu: str | None = None) -> None:
    """Run a study as one of several workers; the first of them describes the study.

    Args:
        file: The study file.
        number: Number of the worker, from 1.
        overrides: Dotted key to value; replaces what the file says.
        gpu: The only GPU that the worker sees, as ``CUDA_VISIBLE_DEVICES`` names it; None: all of them.

    Raises:
        typer.Exit: If the worker was interrupted, or crashed and shall be replaced.
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import as_started
    from optuna_merge.study.workers import CRASHED, stop_with_parent

    stop_with_parent()
    _see_only(gpu)
    try:
        config = as_started(load_study(file, overrides))
        with closing(MergeObjective.from_config(config, output.note)) as objective:
            for line in objective.describe() if number == 1 else ():
                output.note(line)
            interrupted = run_here(config, objective, worker=number)
    except OptunaMergeError:
        raise
    except Exception as exc:
        traceback.print_exc()
        raise typer.Exit(CRASHED) from exc
    if interrupted:
        raise typer.Exit(options.INTERRUPTED)


def _visible_gpu(device: str) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` calls a device such as ``cuda:1``."""
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not visible:
        return str(index)
    names = visible.split(",")
    if index >= len(names):
        raise OptunaMergeError(
            f"CUDA_VISIBLE_DEVICES must show {device}, got {visible}; ask for at most {len(names)} GPUs"
        )
    return names[index]


def _see_only(gpu: str | None) -> None:
    """Hide all other GPUs from what this process has not started yet: CUDA and vLLM's processes."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
