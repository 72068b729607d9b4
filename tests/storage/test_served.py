"""One storage, two ways to it: some workers open it by themselves, others come through serve-storage."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import trial_id
from optuna_merge.storage import proxy
from optuna_merge.storage.claims import OWNER, Claims
from optuna_merge.storage.lock import file_lock, make_lock
from optuna_merge.storage.open import create_study, local_file, open_storage, open_study
from optuna_merge.storage.runners import running
from optuna_merge.storage.server import serve
from optuna_merge.storage.trials import FINISHED
from optuna_merge.study.run import run_study
from tests import databases, processes
from tests.study.killing import Logged, refuse_what_was_done_twice, small

pytest.importorskip("grpc")


def waits_for(wanted: Callable[[], object], deadline_s: float = 600.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- the lock


def test_who_comes_through_the_server_and_who_does_not_wait_for_each_other(tmp_path: Path) -> None:
    """Each reads a number, waits, and writes the next one; together they lose none. Two share a connection."""
    url, count = f"sqlite:///{tmp_path}/study.db", tmp_path / "count"
    count.write_text("0")
    direct = make_lock(open_storage(url), "s", local_file(url))

    def add(lock: Callable[[], object]) -> None:
        for _ in range(10):
            with lock():
                n = int(count.read_text())
                time.sleep(0.005)
                count.write_text(str(n + 1))

    with databases.proxy(url) as server, processes.forked(partial(add, direct)) as [one]:
        remote = make_lock(proxy.connect(server.url), "s", None)
        threads = [threading.Thread(target=add, args=(lock,)) for lock in (remote, remote, direct)]
        for thread in threads:
            thread.start()
        for thread in [*threads, one]:
            thread.join()
    assert count.read_text() == "40"


def test_a_lock_ends_with_the_server_that_took_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with databases.proxy(url) as server:
        held = proxy.hold(proxy.connect(server.url), "s")
        held.__enter__()
        path = tmp_path / "study.db.s.lock"
        with pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
        server.stop(signal.SIGKILL)
        with file_lock(path, wait=False):
            pass
        server.start()
        with proxy.hold(proxy.connect(server.url), "s"):
            pass


def test_a_client_that_is_killed_while_it_waits_gets_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "study.db.s.lock"

    def wait() -> None:
        with proxy.hold(proxy.connect(server.url), "s"):
            (tmp_path / "held").touch()

    with databases.proxy(f"sqlite:///{tmp_path}/study.db") as server:
        with file_lock(path), processes.forked(wait) as [client]:
            time.sleep(1.0)
            processes.kill(client)
        with proxy.hold(proxy.connect(server.url), "s"), pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
        with file_lock(path):
            pass
    assert not (tmp_path / "held").exists()


def test_a_server_takes_the_lock_of_its_database_server(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    order: list[str] = []
    with databases.postgres() as database, databases.proxy(database.url) as server:
        direct = make_lock(open_storage(database.url), "s", None)
        remotes = [make_lock(proxy.connect(server.url), "s", None) for _ in range(20)]  # more than the pool connects

        def wait(lock: Callable[[], object]) -> None:
            with lock():
                order.append("remote")

        threads = [threading.Thread(target=wait, args=(lock,)) for lock in remotes]
        with direct():
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            order.append("direct")
        for thread in threads:
            thread.join(600)
    assert order == ["direct"] + ["remote"] * 20


def test_a_name_from_the_network_is_no_path(tmp_path: Path) -> None:
    with serve(f"sqlite:///{tmp_path}/served/study.db", "127.0.0.1", 0) as (_, port):
        client = proxy.connect(f"grpc://127.0.0.1:{port}")
        for name in ("x/../../outside", "../outside"):
            message = "a study must have a name that can be part of a file name, got"
            with pytest.raises(StudyError, match=message), proxy.hold(client, name):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


# --- who runs the study


def test_a_server_counts_as_one_who_runs_every_study_of_its_file(tmp_path: Path) -> None:
    url, alone = f"sqlite:///{tmp_path}/study.db", list[bool]()
    with serve(url, "127.0.0.1", 0), serve(url, "127.0.0.1", 0), running(url, "made later", alone.append):
        pass
    with running(url, "made later", alone.append):
        pass
    with serve("sqlite:///" + str(tmp_path / "other.db"), "127.0.0.1", 0), running(url, "s", alone.append):
        pass
    assert alone == [False, True, True]


def test_the_trial_of_one_who_came_through_the_server_is_lost_with_its_process_only(tmp_path: Path) -> None:
    """Its server may be away for now, so that nobody else seems to run the study."""
    url = f"sqlite:///{tmp_path}/study.db"
    study, storage = create_study(url, "s")
    claims = Claims(study, storage, make_lock(storage.backend, "s", local_file(url)))

    def claim(url: str) -> Claims:
        study, storage = create_study(url, "s")
        claims = Claims(study, storage, make_lock(storage.backend, "s", local_file(url)))
        assert claims.next(3) is not None
        return claims

    with databases.proxy(url) as server, processes.forked(lambda: claim(server.url) and time.sleep(60)) as [process]:
        waits_for(lambda: study.trials and OWNER in study.trials[0].system_attrs)
        server.stop(signal.SIGKILL)
        with claims.lock():
            assert claims.requeue_lost(alone=True) == []
        processes.kill(process)
        with claims.lock():
            assert claims.requeue_lost(alone=True) == [0]
        server.start()
    claim(url)
    with claims.lock():
        assert claims.requeue_lost(alone=True) == [0]  # as of a process of another machine that opened the file


def test_a_direct_worker_that_starts_leaves_the_trial_of_a_remote_one_alone(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Also when the server is killed in mid-trial and comes back later."""
    url, log = f"sqlite:///{tmp_path}/study.db", tmp_path / "log"
    direct = small(study_file, tmp_path / "out", url, n_trials=12)

    class Pauses(Logged):
        def chunk_scored(self, n_scored: int, n_chunks: int) -> None:
            if not (tmp_path / "paused").exists():
                (tmp_path / "paused").touch()
                waits_for((tmp_path / "go").exists)

    def others_are_done() -> bool:
        return sum(trial.state.is_finished() for trial in open_study(url, "tiny").trials) == 11

    with databases.proxy(url) as server:
        remote = small(study_file, tmp_path / "out", server.url, n_trials=12)
        with processes.forked(partial(run_study, remote.config, remote, Pauses(log))) as [far]:
            waits_for((tmp_path / "paused").exists)
            server.stop(signal.SIGKILL)
            with processes.forked(partial(run_study, direct.config, direct, Logged(log))) as [near]:
                waits_for(others_are_done)
                server.start()
                (tmp_path / "go").touch()
                near.join(600)
                far.join(600)
    assert [near.exitcode, far.exitcode] == [0, 0]
    refuse_what_was_done_twice(log)
    events = [line.split() for line in log.read_text().splitlines()]
    assert [what for pid, what, number in events if number == "0"] == ["start", "finish"]
    assert {pid for pid, what, number in events if number == "0"} == {str(far.pid)}


def test_direct_and_remote_workers_are_killed_and_no_trial_is_lost(
    study_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Two workers open the file, and are killed at the same time, so that the next seems to be alone; one is remote."""
    url, log, chance = f"sqlite:///{tmp_path}/study.db", tmp_path / "log", random.Random(11)
    rounds = [("direct", "direct too")] * 4 + [("remote",)] * 2
    chance.shuffle(rounds)
    with databases.proxy(url) as server, contextlib.ExitStack() as stack:
        direct, remote = (small(study_file, tmp_path / "out", one, n_trials=45) for one in (url, server.url))
        objectives = {"direct": direct, "direct too": direct, "remote": remote}

        def start(name: str) -> BaseProcess:
            run = partial(run_study, objectives[name].config, objectives[name], Logged(log))
            return stack.enter_context(processes.forked(run))[0]

        workers = {name: start(name) for name in objectives}
        n_killed = 0
        for names in rounds:
            n_events = (len(log.read_text().splitlines()) if log.exists() else 0) + chance.randint(2, 8)
            waits_for(lambda n=n_events: log.exists() and len(log.read_text().splitlines()) >= n)
            time.sleep(chance.uniform(0, 0.05))
            for name in names:
                processes.kill(workers[name])
                n_killed += workers[name].exitcode == -signal.SIGKILL
            workers |= {name: start(name) for name in names}
        for worker in workers.values():
            worker.join(120)
    assert n_killed == 10
    assert [worker.exitcode for worker in workers.values()] == [0, 0, 0]
    refuse_what_was_done_twice(log)
    trials = open_study(url, "tiny").trials
    assert [trial.number for trial in trials if trial.state in FINISHED] == list(range(45))
    assert all(len(trial.intermediate_values) == 10 for trial in trials if trial.state == TrialState.COMPLETE)


# --- clients that know nothing of us


def test_a_plain_client_is_told_that_a_parameter_does_not_suit_the_study(tmp_path: Path) -> None:
    with serve(f"sqlite:///{tmp_path}/study.db", "127.0.0.1", 0) as (_, port):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port)
        study = optuna.create_study(storage=storage, study_name="s")
        one, two = (trial_id(study.ask()) for _ in range(2))
        storage.set_trial_param(one, "x", 0.5, FloatDistribution(0, 1))
        with pytest.raises(ValueError, match=r"^$"):  # Optuna's client drops the words
            storage.set_trial_param(two, "x", 1, IntDistribution(0, 3))
