from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import add_storage_service, trial_id
from optuna_merge.storage import proxy
from optuna_merge.storage.claims import Claims
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import create_study, open_storage, open_study
from optuna_merge.storage.server import serve

pytest.importorskip("grpc")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    with serve(f"sqlite:///{tmp_path}/study.db", "127.0.0.1", 0) as (_, port):
        yield f"grpc://127.0.0.1:{port}"


def test_a_study_is_run_through_the_proxy(served: str, tmp_path: Path) -> None:
    study, storage = create_study(served, "s")
    claims = Claims(study, storage, make_lock(storage.backend, "s", None))
    for n in range(3):
        claim = claims.next(3)
        claim.trial.suggest_float("x", 0, 1)
        claim.trial.set_user_attr("n", [n, "é"])
        claim.trial.report(0.5, step=0)
        claim.tell(n / 2, TrialState.COMPLETE)
    assert claims.next(3) is None
    trials = open_study(f"sqlite:///{tmp_path}/study.db", "s").trials
    assert [(t.value, t.user_attrs["n"], t.intermediate_values, list(t.params)) for t in trials] == [
        (n / 2, [n, "é"], {0: 0.5}, ["x"]) for n in range(3)
    ]


def test_a_finished_trial_is_not_written_to(served: str) -> None:
    _, storage = create_study(served, "s")
    study = optuna.load_study(storage=storage, study_name="s")
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError):
        storage.write_trial(trial_id(trial), [("user_attr", "a", 1)])
    with pytest.raises(KeyError):
        storage.write_trial(99, [("user_attr", "a", 1)])


def test_the_lock_is_one_s_at_a_time_and_ends_with_its_connection(served: str) -> None:
    one, two = proxy.connect(served), proxy.connect(served)
    order = []

    def wait() -> None:
        with proxy.hold(two, "mine"):
            order.append("two")

    waiting = threading.Thread(target=wait)
    with proxy.hold(one, "mine"), proxy.hold(one, "another"):
        waiting.start()
        time.sleep(0.2)
        order.append("one")
    waiting.join()
    assert order == ["one", "two"]
    held = proxy.hold(one, "mine")
    held.__enter__()
    one.close()  # as a process does that dies
    with proxy.hold(two, "mine"):
        pass


def test_a_proxy_without_locks_is_refused(tmp_path: Path) -> None:
    import grpc

    server = grpc.server(ThreadPoolExecutor())
    add_storage_service(server, RDBStorage(f"sqlite:///{tmp_path}/study.db"))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        message = r"must be served by optuna-merge serve-storage, got a proxy without locks"
        with pytest.raises(StudyError, match=message), proxy.hold(proxy.connect(f"grpc://127.0.0.1:{port}"), "mine"):
            pass
    finally:
        server.stop(grace=None).wait()


def test_addresses_that_lead_nowhere(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_ANSWER_S", 0.3)
    with pytest.raises(StudyError, match=r"storage must be grpc://HOST:PORT, got grpc://;"):
        open_storage("grpc://")
    with pytest.raises(StudyError, match=r"storage must be grpc://HOST:PORT, got grpc://host:port"):
        open_storage("grpc://host:port")
    with pytest.raises(StudyError, match=r"grpc://127.0.0.1:1 must answer, it has not for 0 s; start it with"):
        open_storage("grpc://127.0.0.1:1")
    port = int(served.rpartition(":")[2])
    other = f"sqlite:///{tmp_path}/other.db"
    with pytest.raises(StudyError, match=rf"port must be free, got 127.0.0.1:{port}; choose another"):
        serve(other, "127.0.0.1", port).__enter__()
