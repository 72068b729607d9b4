"""Processes that tests start and kill: forks of the test, which are there at once, and command lines."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
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


@contextlib.contextmanager
def memory_up_to(more_bytes: int) -> Iterator[None]:
    """Let the kernel refuse this process more memory than so many bytes on top of what it has."""
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps at hand would be granted without the kernel
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (n_pages * resource.getpagesize() + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _call(function: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function()
