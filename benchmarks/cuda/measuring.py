"""Clocks and counters of a device: seconds, peak memory, waits and memory limits.

Knows torch's CUDA functions. Does not know what is measured. On a CPU the counters stay at 0 and limits do nothing.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

GIB = 2**30

TARGETS: dict[str, Any] = {
    "of_copy": {"gpu": {"linear": 0.8, "task_arithmetic": 0.8, "": 0.5}, "host": {"": 0.85}},
    "over_forward": 1.15,
    "rest": 0.02,
    "planned_over_peak": (0.95, 1.05),
}
"""What the figures should reach; reported beside them as ``goal``. Under ``of_copy``, ``""`` means any other method."""


class DifferenceError(Exception):
    """Two ways to the same result differ.

    Attributes:
        figures: What was measured until then.
    """

    def __init__(self, message: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


def least_seconds(device: torch.device, action: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several repeats, the device's work included."""
    best = math.inf
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        action()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use at once since the last reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextlib.contextmanager
def memory_limit(device: torch.device, n_bytes: int) -> Iterator[None]:
    """Let this process use at most ``n_bytes`` of the device's memory."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Collect torch's warning for each time that the CPU waits for the device."""
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits.extend(str(warning.message) for warning in found if "synchroniz" in str(warning.message))


def empty_caches(device: torch.device) -> None:
    """Give unused memory back, page-locked host memory included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # torch has no public function for it


def device_name(device: torch.device) -> str:
    """The name of the GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
