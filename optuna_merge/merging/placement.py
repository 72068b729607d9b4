"""Where the checkpoints of a merge are kept between merges: on the GPU, in host memory, or in their files.

Knows sizes and devices; knows nothing of recipes.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.view import CheckpointView
from optuna_merge.errors import EngineError

Placement = Literal["gpu", "host", "disk"]
"""``host`` is page-locked memory if a GPU merges; ``disk`` means files that are mapped into memory."""

_HOST_SHARE = 0.8  # of the free host memory may be taken
_SAMPLE_BYTES = 1 << 26


@dataclass(frozen=True)
class PlacementPlan:
    """Where the checkpoints will be kept, and why.

    Attributes:
        placement: The place.
        n_bytes: Bytes that they take there.
        reason: One line for people.
    """

    placement: Placement
    n_bytes: int
    reason: str


def plan_placement(
    wanted: Literal["auto", "gpu", "host", "disk"],
    checkpoints: Iterable[Checkpoint],
    names: Iterable[str],
    device: torch.device,
    *,
    gpu_free: int,
    host_free: int,
) -> PlacementPlan:
    """Choose where to keep the checkpoints.

    ``auto`` takes the GPU if they fit there, else host memory if they fit there, else their files. When the CPU merges,
    it always leaves them in their files: the page cache holds as much as it can, and processes share it.

    Args:
        wanted: A place, or ``auto`` to choose one.
        checkpoints: Every model of the merge, the base included.
        names: Tensors that are merged.
        device: Device that merges.
        gpu_free: Bytes of GPU memory that may be taken.
        host_free: Bytes of free host memory.

    Raises:
        EngineError: If they do not fit in the place that is wanted.
    """
    sizes = _sizes(checkpoints, list(names))
    n_bytes = sum(sizes)
    is_gpu = device.type == "cuda"
    # The allocator of page-locked memory rounds up to powers of two.
    host_bytes = sum(1 << (size - 1).bit_length() for size in sizes if size) if is_gpu else n_bytes
    fits_gpu, fits_host = is_gpu and n_bytes <= gpu_free, host_bytes <= _HOST_SHARE * host_free
    gpu_numbers = f"{_gib(n_bytes)} of models, {_gib(gpu_free)} free on the GPU"
    host_numbers = f"{_gib(host_bytes)} of models, {_gib(_HOST_SHARE * host_free)} of host memory to spare"
    if wanted == "gpu" and not is_gpu:
        raise EngineError(f"engine.sources must be auto, host or disk when {device.type} merges, got gpu")
    if wanted == "gpu" and not fits_gpu:
        raise EngineError(f"engine.sources must fit: {gpu_numbers}; use auto, host or disk")
    if wanted == "host" and not fits_host:
        raise EngineError(f"engine.sources must fit: {host_numbers}; use auto or disk")
    if wanted == "gpu" or (wanted == "auto" and fits_gpu):
        return PlacementPlan("gpu", n_bytes, gpu_numbers)
    if wanted == "host" or (wanted == "auto" and is_gpu and fits_host):
        return PlacementPlan("host", host_bytes, host_numbers)
    if wanted == "auto" and is_gpu:
        return PlacementPlan("disk", n_bytes, f"{gpu_numbers}; {host_numbers}")
    return PlacementPlan("disk", n_bytes, "mapped files, held by the page cache and shared by processes")


def place_checkpoints(
    checkpoints: Mapping[str, Checkpoint], placement: Placement, device: torch.device
) -> dict[str, Checkpoint]:
    """The same checkpoints; each tensor is kept at ``placement`` once it has been read."""
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


def merge_seconds(plan: PlacementPlan, checkpoints: Iterable[Checkpoint], device: torch.device) -> float:
    """Estimate how long reading all checkpoints once takes, by reading up to 64 MiB from where they are to be kept."""
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
    """Bytes of host memory that are free or hold only cached files."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def count_disk_waits() -> int:
    """How often this process has waited for the disk because a page was not in memory (major page faults)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


class _Kept(CheckpointView):
    """A checkpoint whose tensors stay in memory once they are read, but for those that every merge only copies."""

    def __init__(self, checkpoint: Checkpoint, keep: Callable[[Tensor], Tensor]) -> None:
        super().__init__(checkpoint)
        self._keep = keep
        self._tensors_kept: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        if name in self.copied:
            return super().get(name)
        if name not in self._tensors_kept:
            self._tensors_kept[name] = self._keep(super().get(name))
        return self._tensors_kept[name]


def _sizes(checkpoints: Iterable[Checkpoint], names: list[str]) -> list[int]:
    return [
        math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize
        for checkpoint in checkpoints
        for name in names
        if name not in checkpoint.copied
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
