"""Forks of the test process, which start at once, and limits that the kernel sets to files and memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def start(function: Callable[[], Any]) -> BaseProcess:
    """Fork this process; the fork calls the function and ends."""
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function,))
    process.start()
    return process


@contextlib.contextmanager
def forked(*functions: Callable[[], Any]) -> Iterator[list[BaseProcess]]:
    """Fork this process once for each function; forks that are left at the end of the context are killed."""
    processes = [start(function) for function in functions]
    try:
        yield processes
    finally:
        for process in processes:
            kill(process)


def kill(process: BaseProcess) -> None:
    """Send SIGKILL and wait until the process is gone."""
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something that another process does holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    """Let the kernel refuse writes of this process beyond ``n_bytes`` of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def memory_up_to(more_bytes: int) -> Iterator[None]:
    """Let the kernel refuse this process more than ``more_bytes`` of memory beyond what it has now."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would be granted without asking the kernel
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (n_pages * resource.getpagesize() + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def obeying_permissions() -> Iterator[None]:
    """Let the kernel check the permissions of files for this thread, as it does for every user but root."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable capabilities, the low 32 bits of each first
    if libc.capget(header, before) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] &= ~0b111  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    try:
        if libc.capset(header, after) != 0:
            raise OSError(ctypes.get_errno(), "capset")
        yield
    finally:
        libc.capset(header, before)


def _call(function: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function()
