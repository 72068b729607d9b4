"""Trials per hour of one study, by the number of its workers.

    python -m benchmarks.worker_speed [--seconds 2.0] [--trials 6] [--workers 1 2 4 8 16]

Real: the command ``run-study --workers N`` with two-layer models of 16 dimensions on the CPU, 1 and 2 workers.
Simulated: an engine that sleeps for as long as a trial takes. What is missing to ideal scaling there is lost to the
storage, the lock and the machine. Time runs from the start of the first trial to the end of the last one; SQLite, no
pruning.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
import transformers
import yaml

from optuna_merge.config.read import load_study
from optuna_merge.evaluation.engine import Prepared, Response
from optuna_merge.merging.merger import Merger
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.storage.trials import FINISHED
from optuna_merge.study.engines import build_scorer
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.testing.engine import FakeEngine
from optuna_merge.testing.models import write_tiny_models
from tests.conftest import write_task

N_CHUNKS = 5


class SleepingEngine(FakeEngine):
    """Sleeps before it answers."""

    seconds = 0.0

    def respond(self, prepared: Prepared) -> list[Response]:
        time.sleep(self.seconds / N_CHUNKS)
        return super().respond(prepared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a simulated trial sleeps")
    parser.add_argument("--trials", type=int, default=6, help="trials of each worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print("| engine | workers | trials per hour | of ideal |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_models(folder / "models", 2, n_layers=2, spread=0.3)
        write_task(folder / "tasks", "one", 400)
        show("real", ((n, real(folder, n, 10 * given.trials)) for n in given.workers if n <= 2))
        show("simulated", ((n, simulated(folder, n, n * given.trials, given.seconds)) for n in given.workers))


def show(engine: str, rates: Iterable[tuple[int, float]]) -> None:
    of_one = None
    for n_workers, rate in rates:
        of_one = of_one or rate / n_workers
        share = rate / (n_workers * of_one)
        print(f"| {engine} | {n_workers} | {rate:,.0f} | {share:.2f} |", flush=True)


def real(folder: Path, n_workers: int, n_trials: int) -> float:
    file = write_study(folder, f"real_{n_workers}", n_trials)
    command = [sys.executable, "-m", "optuna_merge", "run-study", str(file), "--workers", str(n_workers)]
    subprocess.run(command, check=True, capture_output=True)
    return trials_per_hour(file)


def simulated(folder: Path, n_workers: int, n_trials: int, seconds: float) -> float:
    file = write_study(folder, f"simulated_{n_workers}", n_trials)
    config = load_study(file)
    models = StudyModels.open(config)
    merger, space = Merger(models.checkpoints), SearchSpace(config, models.refs)
    engine = SleepingEngine({name: t.clone() for name, t in merger.merge(space.decode(space.uniform(1.0)))})
    engine.seconds = seconds
    objective = MergeObjective(config, models, LocalLoader(merger, engine), build_scorer(config, engine))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=partial(run_study, config, objective)) for _ in range(n_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return trials_per_hour(file)


def write_study(folder: Path, name: str, n_trials: int) -> Path:
    models = {"models": [str(folder / "models" / f"model_{i}") for i in range(2)]}
    genome = {**models, "base_model": str(folder / "models" / "base"), "merge_method": "task_arithmetic"}
    data = {
        "genome": {**genome, "layer_granularity": 1},
        "tasks": [{"name": "one"}],
        "study": {"name": name, "n_trials": n_trials, "seed": 1, "n_chunks": N_CHUNKS, "pruner": {"name": "none"}},
        "engine": {"device": "cpu", "dtype": "float32"},
        "task_search_path": "tasks",
        "storage_path": name,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def trials_per_hour(file: Path) -> float:
    config = load_study(file)
    url = storage_url(config.storage_path, config.study.storage)
    trials = open_study(url, config.study.name).get_trials(states=FINISHED)
    begun = min(trial.datetime_start for trial in trials if trial.datetime_start)
    ended = max(trial.datetime_complete for trial in trials if trial.datetime_complete)
    return 3600 * len(trials) / (ended - begun).total_seconds()


if __name__ == "__main__":
    main()
