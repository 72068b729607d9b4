"""Sparsifiers, which thin a task vector: elementwise arithmetic, the numbers that it takes, and a factor to rescale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput, numbers_on

_ROW = 1024
_TOO_SMALL = 1e-7  # as in mergekit, a smaller norm is not rescaled


class Thinning(Protocol):
    """Zeroes and scales the entries of a task vector; part of an :class:`.elementwise.Expression`."""

    def __call__(self, task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None, /) -> Tensor:
        """Thin a piece of a task vector, float32, shape ``[n]``, left unmodified; see :class:`Sparsifier`."""
        ...


@dataclass(frozen=True)
class Sparsifier:
    """Thins the tensor of one source.

    Attributes:
        thinning: The arithmetic.
        floats: Its float32 numbers.
        n_integers: Number of its int32 numbers.
        integers: Returns its int32 numbers for a piece, which is given as a slice of the flat tensor.
        extra: Makes the tensor that it needs for a piece, float32, shape ``[n]``; None if it needs none.
        factor: Factor of the result.
    """

    thinning: Thinning
    floats: tuple[float, ...] = ()
    n_integers: int = 0
    integers: Callable[[slice], tuple[int, ...]] = lambda span: ()
    extra: Callable[[Chunk], Tensor] | None = None
    factor: float = 1.0


def rescaled(inputs: MergeInput, index: int, sparsifier: Sparsifier) -> Sparsifier:
    """The same sparsifier; it restores the l1 norm of the task vector if the switch ``rescale`` is on."""
    if not inputs.switches["rescale"]:
        return sparsifier
    before, after = Sums(), Sums()
    floats = numbers_on(inputs.device, sparsifier.floats)
    for block in inputs.blocks():
        task_vector = block.task_vector(index)
        integers = numbers_on(inputs.device, sparsifier.integers(block.span), torch.int32)
        extra = None if sparsifier.extra is None else sparsifier.extra(block)
        before.add(l1_norm(task_vector))
        after.add(l1_norm(sparsifier.thinning(task_vector, floats, integers, extra)))
    norms = before.total(), after.total()
    if min(norms) < _TOO_SMALL:
        return sparsifier
    return dataclasses.replace(sparsifier, factor=norms[0] / norms[1])


class Sums:
    """A sum over the blocks of a tensor that does not wait for the device until the total is asked for."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, parts: Tensor) -> None:
        """Add partial sums, float64, any shape."""
        self._parts.append(parts.view(-1))

    def total(self) -> float:
        """The sum, rounded once; not finite if a part is not, or if it is too large."""
        parts = torch.cat(self._parts).tolist() if self._parts else []
        try:
            return math.fsum(parts)
        except (ValueError, OverflowError):  # infinities of both signs, or a sum beyond the largest number
            return float(sum(parts))


def l1_norm(values: Tensor) -> Tensor:
    """Partial sums of the magnitudes of a block, shape ``[n]``; they do not depend on the number of threads."""
    return _sums_of_rows((values,), lambda rows: torch.linalg.vector_norm(rows, ord=1, dim=1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Partial sums of the inner product of two blocks, shape ``[n]`` each, whatever the number of threads."""
    return _sums_of_rows((a, b), torch.linalg.vecdot)


def _sums_of_rows(blocks: tuple[Tensor, ...], row_sums: Callable[..., Tensor]) -> Tensor:
    # torch splits a sum over a whole block by thread, but not the sum of a row.
    whole = blocks[0].numel() // _ROW * _ROW
    rows = tuple(block[:whole].view(-1, _ROW) for block in blocks)
    rest = tuple(block[whole:].view(1, -1).double() for block in blocks)
    return torch.stack([row_sums(*part).double().sum() for part in (rows, rest) if part[0].numel()])
