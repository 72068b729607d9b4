from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage

from optuna_merge.errors import StudyError
from optuna_merge.storage.lock import file_lock, make_lock
from optuna_merge.storage.open import open_storage
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


def test_a_storage_without_locks_is_refused() -> None:
    with pytest.raises(StudyError, match=r"storage must be an SQLite or journal file, .* got InMemoryStorage: workers"):
        make_lock(InMemoryStorage(), "study", None)
