"""A study on real servers, PostgreSQL, MariaDB and the gRPC proxy, whose workers and whose database are killed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from optuna_merge.errors import StudyError
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.open import create_study
from optuna_merge.study import run as study
from optuna_merge.study.run import run_study
from optuna_merge.study.watcher import Watcher
from tests import databases, processes
from tests.study.killing import share_and_kill, small, table


@pytest.fixture(scope="module")
def server() -> Iterator[databases.Postgres]:
    with databases.postgres() as running:
        yield running


def with_database(server: databases.Postgres, name: str) -> str:
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.url.removesuffix("/postgres") + f"/{name}"


def test_workers_on_postgresql_are_killed_and_no_trial_is_lost(
    study_file: Callable[..., Path], tmp_path: Path, server: databases.Postgres
) -> None:
    objective = small(study_file, tmp_path / "out", with_database(server, "killed"), n_trials=30)
    assert share_and_kill([objective] * 3, n_kills=10) == list(range(30))


def test_workers_on_mariadb_are_killed_and_no_trial_is_lost(study_file: Callable[..., Path], tmp_path: Path) -> None:
    with databases.mariadb() as url:
        objective = small(study_file, tmp_path / "out", url, n_trials=30)
        assert share_and_kill([objective] * 3, n_kills=10) == list(range(30))


def test_workers_on_the_proxy_are_killed_and_no_trial_is_lost(
    study_file: Callable[..., Path], tmp_path: Path, server: databases.Postgres
) -> None:
    with databases.proxy(with_database(server, "served")) as proxy:
        objective = small(study_file, tmp_path / "out", proxy.url, n_trials=30)
        assert share_and_kill([objective] * 3, n_kills=10) == list(range(30))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_database_that_restarts_in_mid_trial_is_waited_for(
    study_file: Callable[..., Path], tmp_path: Path, server: databases.Postgres, how: signal.Signals
) -> None:
    through = small(study_file, tmp_path / "through", n_trials=20)
    run_study(through.config, through)
    url = with_database(server, f"restarted_{how.name.lower()}")
    objective = small(study_file, tmp_path / "out", url, n_trials=20)

    class Outage(Watcher):
        left = 15
        back: threading.Timer | None = None

        def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
            self.left -= 1
            if self.left == 0:
                server.stop(how)
                self.back = threading.Timer(1.5, server.start)
                self.back.start()

    outage = Outage()
    assert run_study(objective.config, objective, outage) == study.Outcome(20)
    assert outage.back is not None
    outage.back.join()
    assert table(url) == table(f"sqlite:///{tmp_path}/through/study.db")


def test_a_database_that_stays_away_ends_the_study_with_a_line(
    study_file: Callable[..., Path], tmp_path: Path, server: databases.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(BatchedStorage.__init__, "__defaults__", (0.5,))
    url = with_database(server, "away")
    objective = small(study_file, tmp_path / "out", url, n_trials=20)

    class Gone(Watcher):
        def trial_started(self, trial: object) -> None:
            if trial.number == 3:
                server.stop()

    try:
        with pytest.raises(StudyError, match=r"postgresql://postgres@.*/away must answer, it has not for \d s \(.*\);"):
            run_study(objective.config, objective, Gone())
    finally:
        server.start()
    assert run_study(objective.config, objective) == study.Outcome(20)  # the same command again


def test_many_processes_may_create_the_schema(server: databases.Postgres) -> None:

    url = with_database(server, "fresh")
    started = [processes.start(partial(create_study, url, "mine")) for _ in range(5)]
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0] * 5
