"""What the methods of weighted task vectors share: thin each one, weigh it, elect signs or not, add to the base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput
from optuna_merge.methods.rescale import Sparsifier

Thin = Callable[[MergeInput, int], Sparsifier]
"""Makes the sparsifier of one source's tensor."""

_SIGN_BIT = -(1 << 31)
_NO_DIVISOR = 1e-8  # mergekit: a smaller sum of weights divides by 1 instead


def untouched(inputs: MergeInput, index: int) -> Sparsifier:
    """The sparsifier that keeps everything as it is."""
    return lambda chunk, task_vector: task_vector


def add_task_vectors(inputs: MergeInput, out: Tensor, thin: Thin = untouched) -> None:
    """Write ``base + lambda sum_i weight_i sparse_i``, the sum divided by ``sum_i weight_i`` if normalized."""
    weights = inputs.per_model["weight"]
    divisor = _sum_of_weights(weights) if inputs.switches["normalize"] else 1.0
    sparsifiers = [thin(inputs, index) for index in range(len(weights))]
    flat = out.view(-1)
    for chunk in inputs.chunks():
        total = chunk.zeros("total")
        for index, weight in enumerate(weights):
            total += sparsifiers[index](chunk, chunk.task_vector(index)).mul_(weight)
        if divisor != 1:
            total /= divisor
        flat[chunk.span] = _on_base(chunk, total)


def elect_task_vectors(inputs: MergeInput, out: Tensor, thin: Thin) -> None:
    """Write the base plus those weighted entries that have the elected sign, which is the sign of their sum.

    A sum of 0 elects plus. If normalized, each element is divided by the sum of the weights that took part in it, or
    by 1 where that is 0.

    References:
        TIES-Merging, arXiv:2306.01708, Algorithm 1, steps 2 and 3. Departure, as in mergekit: the weights enter the
        election.
    """
    weights = inputs.per_model["weight"]
    sparsifiers = [thin(inputs, index) for index in range(len(weights))]
    flat = out.view(-1)
    for chunk in inputs.chunks():
        weighted = []
        total = chunk.zeros("total")
        for index, weight in enumerate(weights):
            # Products are rounded before they are added: opposite ones then cancel, and elect plus.
            sparse = sparsifiers[index](chunk, chunk.task_vector(index))
            weighted.append(torch.mul(sparse, weight, out=chunk.scratch(f"weighted_{index}")))
            total += weighted[index]
        elected = total.view(torch.int32).bitwise_and_(_SIGN_BIT)  # where the sum was
        agreeing = chunk.zeros("agreeing")
        divisor = chunk.zeros("divisor")
        for index, weight in enumerate(weights):
            weighted[index].view(torch.int32).bitwise_xor_(elected)
            agreeing += weighted[index].clamp_(min=0)
            if inputs.switches["normalize"]:
                divisor.add_(weighted[index].sign_(), alpha=weight)
        if inputs.switches["normalize"]:
            agreeing /= divisor.add_(torch.eq(divisor, 0, out=chunk.scratch("no_divisor")))
        agreeing.view(torch.int32).bitwise_xor_(elected)
        flat[chunk.span] = _on_base(chunk, agreeing)


def _on_base(chunk: Chunk, total: Tensor) -> Tensor:
    scale = chunk.inputs.shared["lambda"]
    if scale != 1:
        total *= scale
    return torch.add(chunk.base, total, out=total)


def _sum_of_weights(weights: tuple[float, ...]) -> float:
    total = torch.tensor(weights, dtype=torch.float32).sum().item()
    return 1.0 if abs(total) < _NO_DIVISOR else total
