"""Norms of a tensor in pieces, and rescaling: a thinned task vector gets back the l1 norm that it had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput

Sparsifier = Callable[[Chunk, Tensor], Tensor]
"""Thins one source's task vector: given a piece, shape ``[n]``, returns it with entries zeroed or scaled.

It may write into the piece; what it returns is writable, and valid until it is called again.
"""

_ROW = 1024
_TOO_SMALL = 1e-7  # mergekit: a smaller norm is not rescaled


def rescaled(inputs: MergeInput, index: int, sparsifier: Sparsifier) -> Sparsifier:
    """The same sparsifier, with the l1 norm of the task vector restored if the switch ``rescale`` is on."""
    if not inputs.switches["rescale"]:
        return sparsifier
    before, after = [], []
    for block in inputs.blocks():
        task_vector = block.task_vector(index)
        before.append(l1_norm(task_vector))
        after.append(l1_norm(sparsifier(block, task_vector)))
    norms = math.fsum(before), math.fsum(after)
    if min(norms) < _TOO_SMALL:
        return sparsifier
    factor = norms[0] / norms[1]
    return lambda chunk, task_vector: sparsifier(chunk, task_vector).mul_(factor)


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
