"""Processes that tests start and kill: forks of the test, which are there at once, and command lines."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any


def start(function: Callable[[], Any]) -> BaseProcess:
    """A fork of this process that calls the function and ends."""
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function,))
    process.start()
    return process


@contextlib.contextmanager
def forked(*functions: Callable[[], Any]) -> Iterator[list[BaseProcess]]:
    """Forks of this process, one for each function; killed at the end at the latest."""
    processes = [start(function) for function in functions]
    try:
        yield processes
    finally:
        for process in processes:
            kill(process)


def kill(process: BaseProcess) -> None:
    """SIGKILL, and wait for it."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


@contextlib.contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """Let the kernel refuse to make any file of this process longer, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _call(function: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function()
