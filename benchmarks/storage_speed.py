"""What a trial costs that neither merges nor scores: drawing it, decoding it, and the traffic with its storage.

    python -m benchmarks.storage_speed [--storage URL ...] [--layers 50] [--trials 500] [--chunks 20]

Runs whole studies of two sources with 50 layers, all that ``run-study`` does included, on SQLite and on a PostgreSQL
server of its own over loopback, or on the storages that are given. The engine is one without a model. A trial's
overhead is the time from the end of the trial before to its own end, without what it took to merge and to score. The
trials that a Gaussian process draws, one in five, are shown apart: what they take longer is arithmetic, not traffic.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import optuna
import torch
import transformers
import yaml
from optuna.trial import FrozenTrial

from optuna_merge.cli.progress import TerminalWatcher
from optuna_merge.config.read import load_study
from optuna_merge.merging.merger import Merger
from optuna_merge.report.dashboard_watcher import DashboardWatcher
from optuna_merge.search.named import GP_EVERY
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes
from optuna_merge.study.engines import build_scorer
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.models import StudyModels
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.study.watcher import Watcher, Watchers
from optuna_merge.testing.engine import FakeEngine
from optuna_merge.testing.models import write_tiny_models
from tests import databases
from tests.conftest import write_task

LAST = 50
LIMITS_MS = {"sqlite": 50, "postgresql": 150}


@dataclass
class Stopwatch(Watcher):
    """Notes what each trial cost beside merging and scoring."""

    overheads: list[float] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    _since: float = 0.0

    def study_opened(self, study: optuna.Study, n_trials: int, requeued: list[int]) -> None:
        self._since = time.perf_counter()

    def trial_finished(self, study: optuna.Study, trial: FrozenTrial, is_best: bool) -> None:
        now = time.perf_counter()
        work = trial.user_attrs[attributes.MERGE_SECONDS] + trial.user_attrs[attributes.EVALUATION_SECONDS]
        self.overheads.append(now - self._since - work)
        self.states.append(trial.state.name.lower())
        self._since = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", action="append", help="URL; may be given more than once")
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--chunks", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print("| storage | dimensions | chunks | trials | pruned | median, ms | mean, ms | drawn by GP, ms | limit, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_tiny_models(folder / "models", 2, n_layers=given.layers, spread=0.3)
        for number, url in enumerate(given.storage or default_storages(folder, stack)):
            objective = make_objective(folder, f"s{number}", url, given.trials, given.chunks)
            watch = Stopwatch()
            with contextlib.redirect_stderr(io.StringIO()), TerminalWatcher() as terminal:
                dashboard = DashboardWatcher(objective.config, objective.merge_file, lambda _: None)
                run_study(objective.config, objective, Watchers([dashboard, terminal, watch]))
            last = {n: 1000 * watch.overheads[n] for n in range(given.trials - LAST, given.trials)}
            by_gp = [ms for n, ms in last.items() if n % GP_EVERY == 0]
            others = [ms for n, ms in last.items() if n % GP_EVERY]
            kind = url.partition(":")[0]
            pruned = watch.states[-LAST:].count("pruned")
            print(
                f"| {kind} | {len(objective.space.distributions)} | {given.chunks} | {given.trials} |"
                f" {pruned} of the last {len(last)} | {median(others):.0f} | {fmean(others):.0f} | {fmean(by_gp):.0f} |"
                f" {LIMITS_MS.get(kind, '')} |",
                flush=True,
            )


def default_storages(folder: Path, stack: contextlib.ExitStack) -> Iterator[str]:
    yield f"sqlite:///{folder / 'study.db'}"
    yield stack.enter_context(databases.postgres()).url


def make_objective(folder: Path, name: str, url: str, n_trials: int, n_chunks: int) -> MergeObjective:
    write_task(folder / "tasks", "one", 100, "0")
    file = folder / f"{name}.yaml"
    models = {"models": [str(folder / "models" / f"model_{i}") for i in range(2)]}
    genome = {**models, "base_model": str(folder / "models" / "base"), "merge_method": "task_arithmetic"}
    never = {"name": "wilcoxon", "p_threshold": 1e-9}  # it is asked after each chunk, and a trial in full costs most
    options = {"name": name, "n_trials": n_trials, "seed": 1, "n_chunks": n_chunks, "storage": url}
    data = {
        "genome": {**genome, "layer_granularity": 1},
        "search": {"embed_group": "shared"},
        "tasks": [{"name": "one"}],
        "study": {**options, "pruner": never},
        "engine": {"device": "cpu", "dtype": "float32"},
        "task_search_path": "tasks",
        "storage_path": name,
    }
    file.write_text(yaml.safe_dump(data))
    config = load_study(file)
    opened = StudyModels.open(config)
    merger, space = Merger(opened.checkpoints), SearchSpace(config, opened.refs)
    optimum = {name: t.clone() for name, t in merger.merge(space.decode(space.uniform(1.0)))}
    engine = FakeEngine(optimum)
    return MergeObjective(config, opened, LocalLoader(merger, engine), build_scorer(config, engine))


if __name__ == "__main__":
    main()
