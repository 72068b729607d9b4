"""Worker processes are started, replaced and stopped; the workers here do next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optuna_merge.errors import WorkerError
from optuna_merge.study.workers import CRASHED, run_workers

ROOT = Path(__file__).parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{code}"]


def wait_until(file: Path, n_lines: int) -> list[str]:
    deadline = time.monotonic() + 600
    while not file.exists() or file.read_text().count("\n") < n_lines:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text().split()


def test_workers_run_until_all_are_done(tmp_path: Path) -> None:
    commands = [python(f"open('{tmp_path}/{n}', 'w').write(os.environ['OMP_NUM_THREADS'])") for n in range(3)]
    notes = []
    assert run_workers(commands, 1, notes.append) is False
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == [os.environ.get("OMP_NUM_THREADS", "1")] * 3
    assert notes == []


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", f"sys.exit({CRASHED})"])
def test_a_worker_that_dies_is_started_again(tmp_path: Path, death: str) -> None:
    file = tmp_path / "starts"
    code = f"open('{file}', 'a').write('x\\n')\nif open('{file}').read().count('x') < 3: {death}"
    notes = []
    assert run_workers([python(code)], 1, notes.append) is False
    assert file.read_text().count("x") == 3
    how = "signal SIGKILL" if "kill" in death else "exit code 70"
    assert notes == [f"worker 1 died ({how}); starting it again"] * 2


def test_a_worker_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    notes = []
    assert run_workers([python(""), python("os.abort()")], 1, notes.append) is False  # the other one goes on
    assert notes[-1] == "worker 2 has given up (signal SIGABRT)"
    assert len(notes) == 3
    with pytest.raises(WorkerError, match=r"workers: at least one of 2 must run, all have given up; see above"):
        run_workers([python("sys.exit(1)")] * 2, 1, notes.append)
    assert notes[-1] == "worker 2 has given up (exit code 1)"  # it has said why: started once


PARENT = """
import sys
from optuna_merge.study.workers import run_workers
print(run_workers([[sys.executable, "-c", sys.argv[1]]] * 2, 1, print), flush=True)
"""
WORKER = """
import os, signal, sys, time
from optuna_merge.study.workers import stop_with_parent
stop_with_parent()
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    open({file!r}, "a").write(f"{{os.getpid()}}\\n")
    time.sleep(60)
except KeyboardInterrupt:
    open({file!r}, "a").write("stopped\\n")
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_stop_cleanly_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    file = tmp_path / "log"
    command = [sys.executable, "-c", PARENT, WORKER.format(file=str(file))]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    pids = [int(pid) for pid in wait_until(file, 2)]
    os.kill(parent.pid, how)
    assert wait_until(file, 4)[2:] == ["stopped", "stopped"]
    output, _ = parent.communicate(timeout=600)
    assert output.splitlines()[-1:] == (["True"] if how == signal.SIGINT else [])
    assert not set(pids) & {parent.pid}
