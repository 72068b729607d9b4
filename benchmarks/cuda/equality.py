"""Part ``equal``: whether the device gives the same merges as the CPU.

Knows tolerances. Does not know speed.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.inputs import N_SOURCES, SPEED_METHODS, Inputs, make_recipe, open_merger
from benchmarks.cuda.measuring import DifferenceError
from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.merging.export import export
from optuna_merge.methods import METHODS
from optuna_merge.recipe import Recipe
from optuna_merge.testing.methods import merge_tensors

RELATIVE_LIMIT = 1e-6
"""Greatest relative difference in float32."""

SHARE_LIMIT = 1e-4
"""Greatest share of elements that may differ after rounding to bfloat16, or fall to the other side of a threshold."""

SELECTED_BY_SUMS = ("sce", "arcee_fusion")
"""Methods whose thresholds depend on sums: an element next to its threshold may fall to either side."""

TINY_COMPILED = ("task_arithmetic", "ties")
"""Methods compiled at the tiny size: the compiler takes seconds for each."""


def part_equal(inputs: Inputs) -> dict[str, Any]:
    """Compare each method with the CPU, and merges with each other across piece sizes, placements and export.

    A random mask that differed in one element would change the result by that element: far above the limits.

    Raises:
        DifferenceError: If anything differs; the message names everything that does.
    """
    base, sources = draw_tensors(inputs)
    figures: dict[str, Any] = {}
    problems: list[str] = []
    for method in METHODS:
        figures[method], found = compare_with_cpu(inputs, method, base, sources)
        problems += found
    recipe = make_recipe(inputs.small, "dare_ties")
    problems += compare_placements(inputs.small, recipe)
    figures["exported"] = n_different = count_exported_differences(inputs.small, recipe)
    if n_different:
        problems.append(f"{n_different} exported tensors differ from the resident ones")
    if problems:
        raise DifferenceError("; ".join(problems), figures)
    return figures


def draw_tensors(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """A bfloat16 base and sources on the CPU, of a shape that no piece size divides."""
    generator = torch.Generator().manual_seed(1)
    shape = (131, 257) if inputs.tiny else (1031, 2053)
    base = 0.02 * torch.randn(shape, generator=generator)
    sources = [(base + 0.002 * torch.randn(shape, generator=generator)).bfloat16() for _ in range(N_SOURCES)]
    return base.bfloat16(), sources


def compare_with_cpu(
    inputs: Inputs, method: str, base: Tensor, sources: list[Tensor]
) -> tuple[dict[str, float], list[str]]:
    """Merge the same tensors by one method on the device and on the CPU, whole, compiled and in pieces.

    Returns:
        The method's figures, and a line for each difference above its limit.
    """
    declared = METHODS[method]
    greatest = declared.n_models_for(declared.base != "none")[1] or N_SOURCES
    settings: dict[str, Any] = {p.name: 0.5 for p in declared.parameters if p.name in ("density", "select_topk")}
    settings |= {p.name: 0.1 for p in declared.parameters if p.name == "epsilon" and p.per_model}
    cpu = torch.device("cpu")

    def merged(device: torch.device, dtype: str, **options: Any) -> Tensor:
        placed = [tensor.to(device) for tensor in sources[:greatest]]
        with_base = None if declared.base == "none" else base.to(device)
        return merge_tensors(method, placed, with_base, dtype=dtype, **settings, **options).cpu()

    expected, whole = merged(cpu, "float32"), merged(inputs.device, "float32")
    difference = (whole - expected).abs() / expected.abs().clamp(min=1e-4)
    may_flip = method in SELECTED_BY_SUMS
    flipped = difference > RELATIVE_LIMIT if may_flip else torch.zeros_like(difference, dtype=torch.bool)
    rounded = merged(cpu, "bfloat16")
    shares = {"differing_bfloat16": share_different(merged(inputs.device, "bfloat16"), rounded)}
    if may_flip:
        shares["flipped_float32"] = float(flipped.float().mean())
    if method in (TINY_COMPILED if inputs.tiny else SPEED_METHODS):
        compiled = merged(inputs.device, "bfloat16", is_compiled=True)
        shares["differing_compiled"] = share_different(compiled, rounded)
    relative = float(difference[~flipped].max())
    problems = []
    if relative > RELATIVE_LIMIT or max(shares.values()) > SHARE_LIMIT:
        problems.append(f"{method} differs from the CPU's")
    for chunk_elements in (base.shape[1], 10 * base.shape[1], 1 << 30):
        if not torch.equal(merged(inputs.device, "float32", chunk_elements=chunk_elements), whole):
            problems.append(f"{method}: pieces of {chunk_elements} elements change the result")
    return {"relative_float32": relative, **shares}, problems


def share_different(found: Tensor, expected: Tensor) -> float:
    """Share of the elements that differ, in [0, 1]."""
    return float((found != expected).float().mean())


def compare_placements(inputs: Inputs, recipe: Recipe) -> list[str]:
    """Merge with the sources on disk, in host memory and on the GPU; a line for each tensor that differs."""
    placements = ["disk", "host", *(["gpu"] if inputs.is_cuda else [])]
    streams = [open_merger(inputs, recipe, placement).merge(recipe) for placement in placements]
    problems = []
    for (name, first), *others in zip(*streams, strict=True):
        if not all(torch.equal(first, tensor) for _, tensor in others):
            problems.append(f"{name}: differs between sources on {placements}")
    return problems


def count_exported_differences(inputs: Inputs, recipe: Recipe) -> int:
    """Number of tensors in an exported model that differ from the resident ones."""
    resident = dict(open_merger(inputs, recipe, "disk").merge(recipe))
    folder = inputs.folder / "exported"
    export(recipe, folder, merger=open_merger(inputs, recipe, "disk"))
    exported = Checkpoint.open(str(folder))
    n_different = sum(not torch.equal(exported.get(name), tensor.cpu()) for name, tensor in resident.items())
    shutil.rmtree(folder)
    return n_different
