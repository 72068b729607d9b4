"""Part ``merge``: seconds, bandwidth, memory and waits of a merge.

Knows the speed of merging. Does not know whether the result is right; ``equality`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.inputs import SPEED_METHODS, Inputs, make_recipe, open_merger
from benchmarks.cuda.measuring import TARGETS, counted_waits, empty_caches, least_seconds, peak_bytes, reset_peak
from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import EngineError
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.placement import free_host_bytes, plan_placement
from optuna_merge.recipe import Recipe


def part_merge(inputs: Inputs) -> dict[str, Any]:
    """Measure each method with the sources on the GPU, in host memory and on disk, relative to copy bandwidth.

    Compiled kernels are made before the clock starts, and so are the tables of magnitudes unless sources are on disk.
    """
    linear = make_recipe(inputs, "linear")
    first = Checkpoint.open(linear.models[0])
    resident = {
        name: torch.empty(first.shape(name), dtype=torch.bfloat16, device=inputs.device)
        for name in open_merger(inputs, linear, "disk").names
    }
    copy = copy_bandwidths(inputs)
    figures: dict[str, Any] = {"copy": copy}
    for placement in ["gpu", "host", "disk"] if inputs.is_cuda else ["host", "disk"]:
        reset_peak(inputs.device)
        try:
            figures |= placement_speed(inputs, placement, resident, copy)
        except EngineError as exc:
            figures[placement] = f"skipped: {exc}"
        empty_caches(inputs.device)
    return figures


def placement_speed(
    inputs: Inputs, placement: str, resident: dict[str, Tensor], copy: dict[str, float]
) -> dict[str, Any]:
    """Measure each method with the sources in one place.

    Raises:
        EngineError: If they do not fit there.
    """
    merger = warm_merger(inputs, placement, resident)
    return {
        f"{method}, {placement}": method_speed(inputs, merger, method, placement, resident, copy)
        for method in SPEED_METHODS
    }


def copy_bandwidths(inputs: Inputs) -> dict[str, float]:
    """Bytes a second: ``device`` counts bytes read and written, ``host`` bytes moved from page-locked memory."""
    n_bytes = 1 << (20 if inputs.tiny else 31)
    original = torch.ones(n_bytes, dtype=torch.uint8, device=inputs.device)
    target = torch.empty_like(original)
    bandwidths = {"device": 2 * n_bytes / least_seconds(inputs.device, lambda: target.copy_(original), 5)}
    if inputs.is_cuda:
        pinned = torch.ones(n_bytes // 4, dtype=torch.uint8).pin_memory()
        copied = target[: n_bytes // 4]
        seconds = least_seconds(inputs.device, lambda: copied.copy_(pinned, non_blocking=True), 5)
        bandwidths["host"] = pinned.numel() / seconds
    return bandwidths


def warm_merger(inputs: Inputs, placement: Any, resident: dict[str, Tensor]) -> Merger:
    """One merger for all methods, which has already brought base and sources to their place."""
    checkpoints = {str(path): Checkpoint.open(str(path)) for path in inputs.models}
    free = torch.cuda.mem_get_info(inputs.device)[0] if inputs.is_cuda else 0
    plan = plan_placement(
        placement, checkpoints.values(), list(resident), inputs.device, gpu_free=free, host_free=free_host_bytes()
    )
    is_compiled = None if inputs.tiny else True
    merger = Merger(checkpoints, device=inputs.device, placement=plan.placement, is_compiled=is_compiled)
    merge_all(merger, make_recipe(inputs, "linear"), resident)
    merge_all(merger, make_recipe(inputs, "task_arithmetic"), resident)  # it reads the base too
    return merger


def method_speed(
    inputs: Inputs,
    merger: Merger,
    method: str,
    placement: str,
    resident: dict[str, Tensor],
    copy: dict[str, float],
) -> dict[str, Any]:
    """The figures of one method; each merge has other numbers, because an unchanged tensor would not be merged."""
    recipes = [make_recipe(inputs, method, number) for number in range(5)]
    if placement != "disk":
        merge_all(merger, recipes[0], resident)
    before = torch.cuda.memory_allocated(inputs.device) if inputs.is_cuda else 0
    reset_peak(inputs.device)
    turns = iter(recipes[1:])
    repeats = {"gpu": 4, "host": 2, "disk": 1}[placement]
    seconds = least_seconds(inputs.device, lambda: merge_all(merger, next(turns), resident), repeats)
    peak = peak_bytes(inputs.device)
    with counted_waits(inputs.device) as waits:
        if placement == "gpu":
            merge_all(merger, make_recipe(inputs, method, 9), resident)
    is_near = placement == "gpu" or not inputs.is_cuda
    n_sources = len(recipes[0].references)
    n_tensors_moved = n_sources + 1 if is_near else n_sources  # the result is written, but not over the host link
    n_moved = 2 * sum(tensor.numel() for tensor in resident.values()) * n_tensors_moved
    targets = TARGETS["of_copy"].get(placement, {}) if inputs.is_cuda else {}
    return {
        "seconds": seconds,
        "gb_per_s": n_moved / seconds / 1e9,
        "of_copy": n_moved / seconds / copy["device" if is_near else "host"],
        "goal": targets.get(method, targets.get("")),
        "extra_mib": (peak - before) / 2**20 if inputs.is_cuda else None,
        "waits": len(waits) if placement == "gpu" else None,
    }


def merge_all(merger: Merger, recipe: Recipe, resident: dict[str, Tensor]) -> None:
    """Merge every tensor into its resident one."""
    for _ in merger.merge(recipe, out=resident.get):
        pass
