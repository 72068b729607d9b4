"""The processes that run a study: this one, or several workers on this machine, and what a worker does.

Knows who watches a run; the run itself is in ``study/run.py`` and the life of workers in ``study/workers.py``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
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


def run_in_workers(file: Path, overrides: dict[str, Any], devices: Sequence[str | None]) -> bool:
    """Run a study in worker processes.

    Args:
        file: The study file.
        overrides: Dotted key to value; replaces what the file says.
        devices: The device of each worker; None for the study file's.

    Returns:
        Whether the workers were interrupted.
    """
    from optuna_merge.study.run import terminable
    from optuna_merge.study.workers import run_workers

    start = [sys.executable, "-m", "optuna_merge", "run-study", str(file), "--as-worker"]
    commands = []
    for number, device in enumerate(devices, start=1):
        given = overrides if device is None else overrides | {"engine.device": device}
        commands.append([*start, json.dumps({"number": number, "overrides": given}, default=str)])
    where = ", ".join(dict.fromkeys(device for device in devices if device is not None))
    output.note(f"{len(devices)} workers" + (f" on {where}" if where else ""))
    with terminable():
        return run_workers(commands, max(1, (os.cpu_count() or 1) // len(devices)), output.note)


def run_as_worker(file: Path, number: int, overrides: dict[str, Any]) -> None:
    """Run a study as one of several workers; the first of them describes the study.

    Args:
        file: The study file.
        number: Number of the worker, from 1.
        overrides: Dotted key to value; replaces what the file says.

    Raises:
        typer.Exit: If the worker was interrupted, or crashed and shall be replaced.
    """
    from optuna_merge.config.read import load_study
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import keep_n_chunks
    from optuna_merge.study.workers import CRASHED, stop_with_parent

    stop_with_parent()
    try:
        config = keep_n_chunks(load_study(file, overrides))
        objective = MergeObjective.from_config(config)
        for line in objective.describe() if number == 1 else ():
            output.note(line)
        interrupted = run_here(config, objective, worker=number)
        objective.close()
    except OptunaMergeError:
        raise
    except Exception as exc:
        traceback.print_exc()
        raise typer.Exit(CRASHED) from exc
    if interrupted:
        raise typer.Exit(options.INTERRUPTED)
