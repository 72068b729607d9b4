"""Processes that run a study, alone or together, are killed; it ends as if they had not been."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from optuna_merge.storage import attributes
from optuna_merge.storage.open import open_study
from optuna_merge.study import run as study
from optuna_merge.study.folder import BEST_CONFIG
from optuna_merge.study.run import run_study
from tests import processes
from tests.study.killing import Doomed, share_and_kill, small, table
from tests.study.test_objective import fake_objective

RUN = [sys.executable, "-m", "optuna_merge"]


@pytest.mark.parametrize("kind", ["sqlite:///", "journal://"])
def test_killed_twenty_times_it_ends_as_if_it_had_run_through(
    study_file: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    through = small(study_file, tmp_path / "through")
    run_study(through.config, through)
    url = f"{kind}{tmp_path}/killed/study.db"
    killed = small(study_file, tmp_path / "killed", url)
    chance = random.Random(5)
    for _ in range(22):
        watcher = Doomed(chance.randint(1, 20), chance.uniform(0, 0.03))
        process = processes.start(partial(run_study, killed.config, killed, watcher))
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    assert run_study(killed.config, killed) == study.Outcome(60)
    assert table(url) == table(f"sqlite:///{tmp_path}/through/study.db")
    assert [row[1] for row in table(url)].count(TrialState.PRUNED) >= 5
    best = [yaml.safe_load((tmp_path / folder / BEST_CONFIG).read_text()) for folder in ("through", "killed")]
    assert best[0] == best[1]


@pytest.mark.parametrize("kind", ["sqlite:///", "journal://"])
def test_workers_share_a_study_while_they_are_killed(
    study_file: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    objective = small(study_file, tmp_path / "out", f"{kind}{tmp_path}/study.db", n_trials=40)
    assert share_and_kill([objective] * 3, n_kills=10) == list(range(40))


def test_workers_that_want_generations_of_different_sizes_use_that_of_the_first(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Both ask for the size before either has recorded one, unless they take turns."""
    both = multiprocessing.get_context("fork").Barrier(2)
    url = f"sqlite:///{tmp_path}/study.db"

    file = small(study_file, tmp_path / "out", url, n_trials=40).config.path  # written before anyone reads it

    def work(n_workers: int) -> None:
        objective = fake_objective(file, **{"storage_path": tmp_path / "out", "study.storage": url})
        options = objective.config.study.model_copy(update={"n_workers": n_workers})
        objective.config = objective.config.model_copy(update={"study": options})
        sampler = objective.sampler

        def at_the_same_time(population: int | None = None) -> optuna.samplers.BaseSampler:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(3)
            made = sampler(population)
            (tmp_path / f"of_{n_workers}").write_text(str(made.population_size))
            return made

        objective.sampler = at_the_same_time
        run_study(objective.config, objective)

    with processes.forked(partial(work, 4), partial(work, 5)) as workers:
        for worker in workers:
            worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    recorded = str(open_study(url, "tiny").user_attrs[attributes.POPULATION])
    assert recorded in ("12", "16")
    assert {(tmp_path / f"of_{n}").read_text() for n in (4, 5)} == {recorded}


def test_killed_at_any_point_it_ends_as_if_it_had_run_through(study_file: Callable[..., Path], tmp_path: Path) -> None:
    """With the real command line and the real engine, killed by SIGKILL."""
    options = {"name": "tiny", "n_trials": 40, "seed": 3, "n_chunks": 10}
    file = study_file(study=options, n_documents=200, search={"start": "uniform"})
    through = subprocess.run(
        [*RUN, "run-study", str(file), "--storage-path", str(tmp_path / "through")], capture_output=True, check=False
    )
    assert through.returncode == 0, through.stderr.decode()
    killed = tmp_path / "killed"
    for kill in range(3):
        process = subprocess.Popen(
            [*RUN, "run-study", str(file), "--storage-path", str(killed)], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 600
        while _n_rows(killed / "study.db") < 40 * (kill + 1) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = subprocess.run(
        [*RUN, "run-study", str(file), "--storage-path", str(killed)], capture_output=True, check=False
    )
    assert last.returncode == 0, last.stderr.decode()
    assert table(f"sqlite:///{killed}/study.db") == table(f"sqlite:///{tmp_path}/through/study.db")


def _n_rows(database: Path) -> int:
    """Number of reported chunks, read without disturbing the writer."""
    if not database.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1) as connection:
            return connection.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
