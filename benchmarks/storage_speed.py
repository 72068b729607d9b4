"""What a trial costs besides merging and scoring: drawing it, decoding it, and the traffic with its storage.

    python -m benchmarks.storage_speed [--storage URL ...] [--layers 50] [--trials 500] [--chunks 20]
    python -m benchmarks.storage_speed --direct-writes [--trials 15] [--chunks 24]

The first form runs whole studies of two sources with 50 layers, with everything that ``run-study`` does, on SQLite and
on a PostgreSQL server over loopback, or on the given storages. The engine has no model. A trial's overhead is the time
from the end of the previous trial to its own end, without merging and scoring. Trials that a Gaussian process draws,
one in five, are listed apart: what they take longer is arithmetic, not traffic.

The second form measures what ``storage/writes.py`` saves: the time that a trial spends on its storage with direct
writes into Optuna's tables, and with the same batches written through Optuna's public calls, one by one. The trial
takes ten seconds, and its chunks come at equal intervals. PostgreSQL is measured over loopback, and through a relay
that adds 1 ms to each round trip.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import optuna
import torch
import transformers
import yaml
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from optuna_merge.cli.progress import TerminalWatcher
from optuna_merge.config.read import load_study
from optuna_merge.merging.merger import Merger
from optuna_merge.report.dashboard_watcher import DashboardWatcher
from optuna_merge.search.named import GP_EVERY
from optuna_merge.search.space import SearchSpace
from optuna_merge.storage import attributes, batched
from optuna_merge.storage.claims import Claims
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import create_study, local_file
from optuna_merge.storage.writes import write_one_by_one
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

PARAMETERS = (9, 36, 100)
TRIAL_S = 10.0
RELAY_S = 0.001
WARM_UP = 3


@dataclass
class Stopwatch(Watcher):
    """Notes what each trial cost besides merging and scoring."""

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
    parser.add_argument("--direct-writes", action="store_true", help="measure what direct writes save")
    parser.add_argument("--storage", action="append", help="URL of a storage; may be given more than once")
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--trials", type=int, help="trials of each study; default 500, or 15 with --direct-writes")
    parser.add_argument("--chunks", type=int, help="chunks of each trial; default 20, or 24 with --direct-writes")
    given = parser.parse_args()
    if given.direct_writes:
        show_direct_writes(given.storage, given.trials or 15, given.chunks or 24)
    else:
        show_overheads(given.storage, given.layers, given.trials or 500, given.chunks or 20)


# --- the overhead of whole studies


def show_overheads(urls: list[str] | None, n_layers: int, n_trials: int, n_chunks: int) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print("| storage | dimensions | chunks | trials | pruned | median, ms | mean, ms | drawn by GP, ms | limit, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_tiny_models(folder / "models", 2, n_layers=n_layers, spread=0.3)
        for number, url in enumerate(urls or default_storages(folder, stack)):
            objective = make_objective(folder, f"s{number}", url, n_trials, n_chunks)
            watch = Stopwatch()
            with contextlib.redirect_stderr(io.StringIO()), TerminalWatcher() as terminal:
                dashboard = DashboardWatcher(objective.config, objective.merge_file, lambda _: None)
                run_study(objective.config, objective, Watchers([dashboard, terminal, watch]))
            last = {n: 1000 * watch.overheads[n] for n in range(n_trials - LAST, n_trials)}
            by_gp = [ms for n, ms in last.items() if n % GP_EVERY == 0]
            others = [ms for n, ms in last.items() if n % GP_EVERY]
            kind = url.partition(":")[0]
            pruned = watch.states[-LAST:].count("pruned")
            print(
                f"| {kind} | {len(objective.space.distributions)} | {n_chunks} | {n_trials} |"
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
    # This pruner is asked after each chunk and never prunes: a trial that is scored in full costs most.
    never = {"name": "wilcoxon", "p_threshold": 1e-9}
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


# --- what direct writes save


def show_direct_writes(urls: list[str] | None, n_trials: int, n_chunks: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print("| storage | parameters | direct, ms | one by one, ms | saved, ms | of a trial of 10 s |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        named = {url: url for url in urls} if urls else storages_with_latency(Path(name), stack)
        for kind, url in named.items():
            for n_parameters in PARAMETERS:
                direct, one_by_one = traffic(url, n_parameters, n_trials, n_chunks)
                saved = one_by_one - direct
                print(
                    f"| {kind} | {n_parameters} | {1000 * direct:.0f} | {1000 * one_by_one:.0f} | {1000 * saved:.0f} |"
                    f" {saved / TRIAL_S:.1%} |",
                    flush=True,
                )


def traffic(url: str, n_parameters: int, n_trials: int, n_chunks: int) -> tuple[float, float]:
    """Median seconds that a trial spends on its storage: with direct writes, and with writes one by one.

    Trials of the two kinds take turns, so that both see the same load of the machine.
    """
    took: dict[bool, list[float]] = {True: [], False: []}
    studies = {is_direct: claims_of(url, f"{n_parameters} {is_direct}") for is_direct in took}
    for _ in range(WARM_UP + n_trials):
        for is_direct, claims in studies.items():
            with contextlib.ExitStack() as stack:
                if not is_direct:
                    stack.enter_context(mock.patch.object(batched, "write_trial", write_one_by_one))
                    stack.enter_context(mock.patch.object(batched, "read_state", read_state_publicly))
                start = time.perf_counter()
                run_trial(claims, n_parameters, n_chunks)
                took[is_direct].append(time.perf_counter() - start)
    return median(took[True][WARM_UP:]), median(took[False][WARM_UP:])


def claims_of(url: str, name: str) -> Claims:
    study, storage = create_study(url, name)
    study.sampler = RandomSampler(seed=1)
    return Claims(study, storage, make_lock(storage.backend, name, local_file(url)))


def run_trial(claims: Claims, n_parameters: int, n_chunks: int) -> None:
    """What a trial writes to its storage; ten seconds pass on the clock that decides when reports are written."""
    now = time.monotonic()
    claim = claims.next(1_000_000)
    assert claim is not None
    for index in range(n_parameters):
        claim.trial.suggest_float(f"layers_{index:03d}.model.weight", 0, 1)
    claim.trial.set_user_attr(attributes.RECIPE_DIGEST, "0" * 64)
    for chunk in range(n_chunks):
        now += TRIAL_S / n_chunks
        with mock.patch.object(batched.time, "monotonic", return_value=now):
            claim.trial.report(0.5, chunk)
    for key in (
        attributes.MERGE_SECONDS,
        attributes.EVALUATION_SECONDS,
        attributes.DOCUMENTS,
        "score one",
        "stderr one",
    ):
        claim.trial.set_user_attr(key, 1.5)
    claim.tell(1.0, TrialState.COMPLETE)


def read_state_publicly(storage: BaseStorage, trial_id: int) -> tuple[TrialState, dict[str, Any]]:
    trial = storage.get_trial(trial_id)
    return trial.state, trial.system_attrs


def storages_with_latency(folder: Path, stack: contextlib.ExitStack) -> Mapping[str, str]:
    server = stack.enter_context(databases.postgres())
    port = databases.free_port()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=relay, args=(port, server.port), daemon=True)
    process.start()
    stack.callback(process.kill)
    databases.wait_for(port)
    return {
        "SQLite": f"sqlite:///{folder / 'study.db'}",
        "PostgreSQL": server.url,
        "PostgreSQL, 1 ms away": server.url.replace(f":{server.port}/", f":{port}/"),
    }


def relay(port: int, server_port: int) -> None:
    """Pass connections on to a server, each of the client's messages after a pause."""

    def pass_on(receive: socket.socket, send: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := receive.recv(65536):
                time.sleep(pause_s)
                send.sendall(data)
        with contextlib.suppress(OSError):
            send.shutdown(socket.SHUT_WR)

    listening = socket.create_server(("127.0.0.1", port))
    while True:
        client, _ = listening.accept()
        server = socket.create_connection(("127.0.0.1", server_port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=pass_on, args=(client, server, RELAY_S), daemon=True).start()
        threading.Thread(target=pass_on, args=(server, client, 0.0), daemon=True).start()


if __name__ == "__main__":
    main()
