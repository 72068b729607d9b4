"""What thins a task vector: numbers, and elementwise arithmetic that they steer; and rescaling of what is left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput

_ROW = 1024
_TOO_SMALL = 1e-7  # mergekit: a smaller norm is not rescaled


class Thinning(Protocol):
    """Zeroes and scales the entries of a task vector; part of an :class:`.elementwise.Expression`."""

    def __call__(self, task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None, /) -> Tensor:
        """Thin a piece, float32, shape ``[n]``, left unmodified; the others are as in :class:`Sparsifier`."""
        ...


@dataclass(frozen=True)
class Sparsifier:
    """Thins the tensor of one source.

    Attributes:
        thinning: The arithmetic.
        floats: Its numbers.
        n_integers: How many others it has.
        integers: Those, for a piece that is given by its place in the flat tensor.
        extra: Makes a tensor that it needs, float32, shape ``[n]``.
        factor: What the result is multiplied with.
    """

    thinning: Thinning
    floats: tuple[float, ...] = ()
    n_integers: int = 0
    integers: Callable[[slice], tuple[int, ...]] = lambda span: ()
    extra: Callable[[Chunk], Tensor] | None = None
    factor: float = 1.0


def rescaled(inputs: MergeInput, index: int, sparsifier: Sparsifier) -> Sparsifier:
    """The same sparsifier, with the l1 norm of the task vector restored if the switch ``rescale`` is on."""
    if not inputs.switches["rescale"]:
        return sparsifier
    before, after = [], []
    floats = torch.tensor(sparsifier.floats, dtype=torch.float32, device=inputs.device)
    for block in inputs.blocks():
        task_vector = block.task_vector(index)
        integers = torch.tensor(sparsifier.integers(block.span), dtype=torch.int32, device=inputs.device)
        extra = None if sparsifier.extra is None else sparsifier.extra(block)
        before.append(l1_norm(task_vector))
        after.append(l1_norm(sparsifier.thinning(task_vector, floats, integers, extra)))
    norms = math.fsum(before), math.fsum(after)
    if min(norms) < _TOO_SMALL:
        return sparsifier
    return dataclasses.replace(sparsifier, factor=norms[0] / norms[1])


def l1_norm(values: Tensor) -> float:
    """Sum of the magnitudes of a block, shape ``[n]``; the same for any number of threads."""
    return _sum_of_rows(values, lambda rows: torch.linalg.vector_norm(rows, ord=1, dim=1))


def squares(values: Tensor) -> float:
    """Sum of the squares of a block, shape ``[n]``; the same for any number of threads."""
    return _sum_of_rows(values, lambda rows: torch.linalg.vecdot(rows, rows))


def _sum_of_rows(values: Tensor, row_sums: Callable[[Tensor], Tensor]) -> float:
    # A sum over a whole block is split by thread; one for each row is not.
    whole = values.numel() // _ROW * _ROW
    parts: Iterable[Tensor] = (values[:whole].view(-1, _ROW), values[whole:].view(1, -1))
    return math.fsum(float(row_sums(part).double().sum()) for part in parts if part.numel())
