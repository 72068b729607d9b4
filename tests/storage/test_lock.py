from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy
from optuna.storages import InMemoryStorage

from optuna_merge.errors import StudyError
from optuna_merge.storage.lock import file_lock, make_lock, server_lock
from optuna_merge.storage.open import local_file, open_storage
from tests.processes import forked


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    """Each reads a number, waits, and writes the next one; together they lose none."""
    count = tmp_path / "count"
    count.write_text("0")

    def add() -> None:
        for _ in range(10):
            with file_lock(tmp_path / "lock"):
                n = int(count.read_text())
                time.sleep(0.005)
                count.write_text(str(n + 1))

    with forked(*[add] * 3) as processes:
        for process in processes:
            process.join()
    assert count.read_text() == "30"


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    def die() -> None:
        with file_lock(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(die) as [process]:
        process.join()
    assert process.exitcode == -signal.SIGKILL
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_a_shared_lock_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock", shared=True):
        with file_lock(tmp_path / "lock", shared=True, wait=False):
            pass
        with pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
            pass
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StudyError, match=r"file/lock: lock must be writable, got .*; choose another storage_path"),
        file_lock(tmp_path / "file" / "lock"),
    ):
        pass


def test_studies_of_one_file_do_not_wait_for_each_other(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    storage = open_storage(f"sqlite:///{file}")
    with make_lock(storage, "one", file)(), make_lock(storage, "two", file)():
        pass
    assert {path.name for path in tmp_path.glob("*.lock")} == {"study.db.one.lock", "study.db.two.lock"}


@pytest.mark.parametrize("kind", ["sqlite:///", "journal://"])
def test_a_file_has_one_lock_whatever_path_leads_to_it(tmp_path: Path, kind: str) -> None:
    file, link = tmp_path / "study.db", tmp_path / "elsewhere" / "link.db"
    storage = open_storage(f"{kind}{file}")
    link.parent.mkdir()
    link.symlink_to(file)
    lock = make_lock(storage, "s", local_file(f"{kind}{link}"))
    with lock(), pytest.raises(BlockingIOError), file_lock(tmp_path / "study.db.s.lock", wait=False):
        pass


def test_a_fork_of_the_holder_does_not_keep_the_lock(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with file_lock(tmp_path / "lock"):
            stack.enter_context(forked(lambda: time.sleep(60)))
        with file_lock(tmp_path / "lock", wait=False):
            pass


class MySQL:
    """A database whose ``GET_LOCK`` answers what it is told to; SQLite is the rest of it."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.given_back: list[str] = []
        self.engine = sqlalchemy.create_engine("sqlite://")
        sqlalchemy.event.listen(self.engine, "connect", self._add_functions)
        self.engine.connect().close()
        self.engine.dialect.name = "mysql"

    def _add_functions(self, connection: sqlite3.Connection, _: object) -> None:
        connection.create_function("GET_LOCK", 2, lambda name, seconds: self.answers.pop(0))
        connection.create_function("RELEASE_LOCK", 1, self.given_back.append)


def test_a_lock_of_mysql_that_is_waited_for_in_vain_is_asked_for_again() -> None:
    server = MySQL(0, 0, 1)
    with server_lock(server.engine, "s"):
        assert server.answers == []
        assert server.given_back == []
    assert len(server.given_back) == 1


def test_a_lock_that_mysql_cannot_give_is_not_gone_without() -> None:
    server = MySQL(0, None, 1)
    with (
        pytest.raises(StudyError, match=r"storage sqlite:// must give a lock, its GET_LOCK failed; look into the serv"),
        server_lock(server.engine, "s"),
    ):
        raise AssertionError
    assert server.answers == [1]


def test_a_storage_without_locks_is_refused() -> None:
    with pytest.raises(StudyError, match=r"storage must be an SQLite or journal file, .* got InMemoryStorage: workers"):
        make_lock(InMemoryStorage(), "study", None)
