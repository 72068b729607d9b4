from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend

from optuna_merge.storage.journal import WholeLinesBackend
from tests.processes import forked


def read(backend: JournalFileBackend) -> list[int]:
    return [log["n"] for log in backend.read_logs(0)]


def test_lines_of_many_writers_are_whole_and_all_there(tmp_path: Path) -> None:
    def write(first: int) -> None:
        backend = WholeLinesBackend(tmp_path / "journal")
        for n in range(first, first + 20):
            backend.append_logs([{"n": n}])

    with forked(*[lambda first=first: write(first) for first in (0, 20, 40)]) as processes:
        for process in processes:
            process.join()
    assert sorted(read(WholeLinesBackend(tmp_path / "journal"))) == list(range(60))


def test_half_a_line_is_cut_before_the_next_one_is_written(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    backend = WholeLinesBackend(file)
    backend.append_logs([{"n": 1}])
    with file.open("ab") as half:
        half.write(b'{"n": 2, "par')
    backend.append_logs([{"n": 3}])
    assert read(backend) == [1, 3]
    assert read(JournalFileBackend(str(file))) == [1, 3]


def test_what_is_no_journal_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_bytes(b"remember the milk")
    with pytest.raises(ValueError, match="remember the milk"):
        WholeLinesBackend(file)
    assert file.read_bytes() == b"remember the milk"


def test_a_killed_writer_s_lock_keeps_nobody_waiting(tmp_path: Path) -> None:
    def die() -> None:
        with WholeLinesBackend(tmp_path / "journal").lock.held():
            os.kill(os.getpid(), signal.SIGKILL)

    with forked(die) as [process]:
        process.join()
    assert any(path.is_symlink() for path in tmp_path.iterdir())  # Optuna's own waits 30 s for it
    start = time.monotonic()
    WholeLinesBackend(tmp_path / "journal").append_logs([{"n": 1}])
    assert time.monotonic() - start < 25
