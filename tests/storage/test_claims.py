from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState

from optuna_merge.errors import TrialTakenError
from optuna_merge.internals.optuna import trial_id
from optuna_merge.storage import claims as claims_module
from optuna_merge.storage import owner as owners
from optuna_merge.storage.claims import BEAT, OWNER, Claims
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import create_study, local_file
from optuna_merge.storage.owner import Owner
from tests.processes import forked

KINDS = ["sqlite:///", "journal://"]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def claims_of(url: str, lease_s: float = 60.0) -> Claims:
    study, storage = create_study(url, "s")
    return Claims(study, storage, make_lock(storage.backend, "s", local_file(url)), lease_s)


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}{tmp_path}/study.db"


def states(claims: Claims) -> str:
    return " ".join(trial.state.name[0] for trial in claims.study.trials)


def elsewhere(claims: Claims, taken: int) -> None:
    """Let a trial be that of a process on another machine, whatever its clock says."""
    stranger = replace(Owner.me(), host="another-host")
    claims.storage.write_trial(taken, [("system_attr", OWNER, asdict(stranger))])


def test_the_lock_waits_for_a_storage_that_is_away(url: str) -> None:
    claims = claims_of(url)
    held, n_asked = claims._lock, 0

    @contextmanager
    def away_at_first() -> Iterator[None]:
        nonlocal n_asked
        n_asked += 1
        if n_asked < 3:
            raise sqlalchemy.exc.OperationalError("SELECT pg_advisory_lock", {}, Exception("terminating connection"))
        with held():
            yield

    claims._lock = away_at_first
    with claims.lock():
        assert n_asked == 3
    with claims.lock():  # given back
        assert n_asked == 4


def test_an_owner_is_gone_when_its_process_is() -> None:
    me = Owner.me()
    assert (me.host, me.pid) == (socket.gethostname(), os.getpid())
    assert me.is_gone  # no claim of ours
    owners.OPEN_CLAIMS.add(me.claim)
    assert not me.is_gone
    assert replace(me, started=me.started - 1).is_gone  # an earlier process had our number
    assert not replace(me, host="another-host", pid=1).is_gone  # who knows
    assert not replace(me, machine="another container of that name", started=1).is_gone
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = replace(me, pid=child.pid, started=owners._start_ticks(child.pid) or 0)
        assert not owner.is_gone
    finally:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_gone  # a zombie
    child.wait()
    assert owner.is_gone
    assert owners._start_ticks(child.pid) is None


def test_a_killed_process_s_trial_is_put_back_with_what_it_has(url: str) -> None:
    claims = claims_of(url)
    mine = claims.next(5)
    assert mine is not None

    def die() -> None:
        claim = claims_of(url).next(5)
        claim.trial.suggest_float("x", 0, 1)
        claim.trial.report(0.75, step=0)
        os.kill(os.getpid(), signal.SIGKILL)

    with forked(die) as [process]:
        process.join()
    assert states(claims) == "R R"
    lost = claims.study.trials[1]
    again = claims.next(5)
    assert again is not None
    assert again.trial.number == 1
    assert again.trial.suggest_float("x", 0, 1) == lost.params["x"]
    assert lost.intermediate_values == {0: 0.75}
    again.tell(1.0, TrialState.COMPLETE)
    mine.tell(None, TrialState.FAIL)
    assert states(claims) == "F C"


def test_a_trial_whose_process_died_before_it_could_claim_it_is_lost_at_once(url: str) -> None:
    claims = claims_of(url)
    claims.study.ask()
    assert claims.next(1).trial.number == 0
    assert states(claims) == "R"


def test_the_number_of_trials_is_never_exceeded(url: str) -> None:
    def work() -> None:
        claims = claims_of(url)
        while (claim := claims.next(25)) is not None:
            claim.tell(1.0, TrialState.COMPLETE)

    with forked(*[work] * 4) as processes:
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert states(claims_of(url)) == " ".join("C" * 25)


def test_what_runs_counts_until_it_is_lost(url: str) -> None:
    claims = claims_of(url)
    one, two = claims.next(2), claims.next(2)
    assert claims.next(2) is None
    one.put_back()
    assert claims.next(2).trial.number == 0
    two.tell(1.0, TrialState.COMPLETE)
    assert claims.next(2) is None


def test_a_process_of_another_machine_is_dead_when_its_trial_stands_still(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    claims = claims_of(url)
    trial = claims.study.ask()
    elsewhere(claims, trial_id(trial))
    assert claims.next(1) is None  # seen for the first time, however long it has been so
    now[0] += 59
    assert claims.next(1) is None
    trial.report(0.5, step=0)  # it reports
    now[0] += 59
    assert claims.next(1) is None
    claims.storage.write_trial(trial_id(trial), [("system_attr", BEAT, 7)])  # it lives, and has not reported for long
    now[0] += 59
    assert claims.next(1) is None
    now[0] += 59
    assert claims.next(1) is None
    now[0] += 2
    assert claims.next(1).trial.number == 0


def test_nobody_is_dead_because_the_storage_was_away(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now[0])
    claims = claims_of(url)
    elsewhere(claims, trial_id(claims.study.ask()))
    assert claims.next(1) is None
    now[0] += 600
    claims.storage.n_outages += 1
    assert claims.next(1) is None
    now[0] += 61
    assert claims.next(1).trial.number == 0


def test_who_lost_a_trial_cannot_tell_it(url: str) -> None:
    claims = claims_of(url)
    slow = claims.next(1)
    elsewhere(claims, trial_id(slow.trial))  # it was not heard of, and another machine has taken it over
    with pytest.raises(TrialTakenError, match=r"trial 0 must be run by one process, another one has taken it over"):
        slow.tell(1.0, TrialState.COMPLETE)
    slow.put_back()
    assert states(claims) == "R"
    claims.study.tell(0, 2.0)
    with pytest.raises(TrialTakenError):
        slow.tell(1.0, TrialState.COMPLETE)
    assert claims.study.trials[0].value == 2.0


def test_what_was_kept_of_a_trial_that_another_process_finished_is_dropped(url: str) -> None:
    claims = claims_of(url)
    slow = claims.next(1)
    claims_of(url).study.tell(0, 2.0)
    slow.trial.set_user_attr("late", 1)  # is kept
    with pytest.raises(TrialTakenError, match=r"gave no sign of life for 60 s"):
        slow.tell(1.0, TrialState.COMPLETE)
    assert claims_of(url).study.trials[0].user_attrs == {}


def test_a_process_says_that_it_lives_and_notices_that_its_trial_is_taken(url: str) -> None:
    claims = claims_of(url, lease_s=0.2)
    claim = claims.next(1)
    with claim:
        deadline = time.monotonic() + 300
        while claims.study.trials[0].system_attrs.get(BEAT, 0) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert claims.study.trials[0].system_attrs[BEAT] >= 3
        assert not claim.is_taken
        elsewhere(claims, trial_id(claim.trial))
        while not claim.is_taken and time.monotonic() < deadline:
            time.sleep(0.02)
        assert claim.is_taken
