"""Worker processes on this machine: started, replaced when they crash, stopped together.

Knows processes, signals and exit codes; knows nothing of studies. Each worker runs the study like any other process,
and learns about the others only from the storage.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from optuna_merge.errors import WorkerError

EXPECTED_ERROR = 1
"""Exit code of a worker that has reported an expected error; it is not replaced."""
INTERRUPTED = 130
"""Exit code of a worker that was asked to stop."""
CRASHED = 70
"""Exit code of a worker that failed unexpectedly; it is replaced, like one that a signal killed."""

_MAX_CRASHES = 3  # within _CRASH_WINDOW_S; then a worker is not replaced again
_CRASH_WINDOW_S = 120.0
_POLL_S = 0.2


@dataclass
class _Worker:
    number: int
    command: Sequence[str]
    process: subprocess.Popen[bytes]
    crashes: list[float] = field(default_factory=list)


def run_workers(commands: Sequence[Sequence[str]], n_threads: int, note: Callable[[str], None]) -> bool:
    """Run worker processes until all are done.

    Args:
        commands: One command line for each worker.
        n_threads: OpenMP threads of each worker, unless the environment sets ``OMP_NUM_THREADS``.
        note: Called with a line about each worker that dies.

    Returns:
        Whether the workers were interrupted, by Ctrl-C or by a signal to one of them.

    Raises:
        WorkerError: If all workers have given up.
    """
    environment = {"OMP_NUM_THREADS": str(n_threads), **os.environ}

    def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
        # In a session of its own, so that Ctrl-C in a terminal reaches only this process, which passes it on once.
        # The pipe closes when this process ends, however it ends: that tells the worker to stop.
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    workers = [_Worker(number, command, start(command)) for number, command in enumerate(commands, start=1)]
    n_done = 0
    interrupted = False
    try:
        while workers:
            time.sleep(_POLL_S)
            for worker in list(workers):
                code = worker.process.poll()
                if code is None:
                    continue
                if worker.process.stdin is not None:
                    worker.process.stdin.close()
                if code in (0, INTERRUPTED, -signal.SIGTERM):
                    n_done += 1
                    interrupted |= code != 0
                    workers.remove(worker)
                elif code == EXPECTED_ERROR or not _may_restart(worker):
                    note(f"worker {worker.number} has given up ({_ended(code)})")
                    workers.remove(worker)
                else:
                    note(f"worker {worker.number} died ({_ended(code)}); starting it again")
                    worker.process = start(worker.command)
    except KeyboardInterrupt:
        interrupted = True
        _stop(workers, note)
    except BaseException:
        _stop(workers, note)
        raise
    if not interrupted and not n_done:
        raise WorkerError(f"workers: at least one of {len(commands)} must run, all have given up; see above")
    return interrupted


def stop_with_parent() -> None:
    """Interrupt this worker process when the process that started it ends. Returns at once."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):  # not sys.stdin, whose lock would block the end of Python
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _may_restart(worker: _Worker) -> bool:
    now = time.monotonic()
    worker.crashes = [*(when for when in worker.crashes if now - when < _CRASH_WINDOW_S), now]
    return len(worker.crashes) < _MAX_CRASHES


def _stop(workers: Sequence[_Worker], note: Callable[[str], None]) -> None:
    """Ask all to stop, and wait until they have put their trials back; a second Ctrl-C kills them.

    The trial of a killed worker is not lost either: the next run takes it over.
    """
    try:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in workers:
            worker.process.wait()
    except KeyboardInterrupt:
        note("killing the workers")
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def _ended(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
