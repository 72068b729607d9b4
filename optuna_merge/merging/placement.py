"""Where the models that are merged live between merges: on the GPU, in host memory, or in their files.

Knows sizes and devices; knows nothing of recipes.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint, CheckpointView
from optuna_merge.errors import EngineError

Placement = Literal["gpu", "host", "disk"]

_HOST_SHARE = 0.8  # of the free host memory, that sources may take
_SAMPLE_BYTES = 1 << 26


@dataclass(frozen=True)
class SourcePlan:
    """Where sources live, and why.

    Attributes:
        placement: ``gpu``, ``host`` (page-locked if they are merged on a GPU) or ``disk``, which means mapped files.
        n_bytes: What they take there.
        reason: One line for people.
    """

    placement: Placement
    n_bytes: int
    reason: str


def plan_sources(
    wanted: Literal["auto", "gpu", "host", "disk"],
    checkpoints: Iterable[Checkpoint],
    names: Iterable[str],
    device: torch.device,
    *,
    gpu_free: int,
    host_free: int,
) -> SourcePlan:
    """Decide where sources live: on the GPU if they fit, else in host memory if they fit, else in their files.

    Merged on the CPU, ``auto`` leaves them in their files: the page cache holds what it can, and processes share it.

    Args:
        wanted: ``auto`` decides.
        checkpoints: Of all models that are merged.
        names: Of the tensors that are merged.
        device: Where they are merged.
        gpu_free: Bytes that sources may take on the GPU.
        host_free: Bytes of host memory that are free.

    Raises:
        EngineError: If they do not fit where they are wanted.
    """
    sizes = _sizes(checkpoints, list(names))
    n_bytes = sum(sizes)
    is_gpu = device.type == "cuda"
    # The allocator of page-locked memory rounds up to powers of two.
    host_bytes = sum(1 << (size - 1).bit_length() for size in sizes if size) if is_gpu else n_bytes
    fits_gpu, fits_host = is_gpu and n_bytes <= gpu_free, host_bytes <= _HOST_SHARE * host_free
    gpu_numbers = f"{_gib(n_bytes)} of sources, {_gib(gpu_free)} free on the GPU"
    host_numbers = f"{_gib(host_bytes)} of sources, {_gib(_HOST_SHARE * host_free)} of host memory to spare"
    if wanted == "gpu" and not is_gpu:
        raise EngineError(f"engine.sources must be auto, host or disk where {device.type} merges, got gpu")
    if wanted == "gpu" and not fits_gpu:
        raise EngineError(f"engine.sources must fit: {gpu_numbers}; use auto, host or disk")
    if wanted == "host" and not fits_host:
        raise EngineError(f"engine.sources must fit: {host_numbers}; use auto or disk")
    if wanted == "gpu" or (wanted == "auto" and fits_gpu):
        return SourcePlan("gpu", n_bytes, gpu_numbers)
    if wanted == "host" or (wanted == "auto" and is_gpu and fits_host):
        return SourcePlan("host", host_bytes, host_numbers)
    if wanted == "auto" and is_gpu:
        return SourcePlan("disk", n_bytes, f"{gpu_numbers}; {host_numbers}")
    return SourcePlan("disk", n_bytes, "mapped, held by the page cache and shared between processes")


def place_sources(
    checkpoints: Mapping[str, Checkpoint], placement: Placement, device: torch.device
) -> dict[str, Checkpoint]:
    """The same checkpoints, with tensors that are kept at ``placement`` from when they are first asked for."""
    keep: Callable[[Tensor], Tensor]
    if placement == "disk":
        return dict(checkpoints)
    if placement == "gpu":
        keep = lambda tensor: tensor.to(device)  # noqa: E731
    elif device.type == "cuda":
        keep = Tensor.pin_memory
    else:
        keep = Tensor.clone
    return {reference: _Kept(checkpoint, keep) for reference, checkpoint in checkpoints.items()}


def merge_seconds(plan: SourcePlan, checkpoints: Iterable[Checkpoint], device: torch.device) -> float:
    """What reading all sources once would take, by reading a sample of up to 64 MiB of them as they lie now."""
    seconds, n_read = 0.0, 0
    for checkpoint in checkpoints:
        for name in checkpoint.names:
            stored = checkpoint.get(name).reshape(-1).view(torch.uint8)[:_SAMPLE_BYTES]
            if plan.placement == "gpu":
                stored = stored.to(device)
            elif plan.placement == "host" and device.type == "cuda":
                stored = stored.pin_memory()
            target = torch.empty_like(stored, device=device)
            target.fill_(0)
            _wait(device)
            start = time.perf_counter()
            target.copy_(stored)
            _wait(device)
            seconds += time.perf_counter() - start
            n_read += stored.numel()
            if n_read >= _SAMPLE_BYTES:
                return seconds / n_read * plan.n_bytes
    return seconds / max(1, n_read) * plan.n_bytes


def free_host_bytes() -> int:
    """Host memory that is free or holds nothing but cached files."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            (line,) = (line for line in file if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reads_waited_for() -> int:
    """How often this process has waited for the disk because a page was not in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class _Kept(CheckpointView):
    """A checkpoint whose tensors stay in memory."""

    def __init__(self, checkpoint: Checkpoint, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__(checkpoint)
        self._keep = keep
        self._tensors_kept: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """A tensor; must never be written to."""
        if name not in self._tensors_kept:
            self._tensors_kept[name] = self._keep(super().get(name))
        return self._tensors_kept[name]


def _sizes(checkpoints: Iterable[Checkpoint], names: list[str]) -> list[int]:
    return [
        math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize
        for checkpoint in checkpoints
        for name in names
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
