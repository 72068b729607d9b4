"""Arcee fusion: takes an element from the model only if its change is important."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput
from optuna_merge.methods.selection import Quantity, kth_largest


def arcee_fusion(inputs: MergeInput, out: Tensor) -> None:
    """Write the model's elements whose importance is at least ``median + 1.5 (q3 - q1)``, and the base's elsewhere.

    The importance of an element is the size of its change times the divergence of its row. Departure from mergekit
    0.1.5, which estimates the quartiles from a million random elements: we use all elements.

    References:
        mergekit's arcee_fusion.
    """
    flat = out.view(-1)
    n_elements = flat.numel()
    if n_elements == 0:
        return
    # As in mergekit, a quantile is the entry at this place of the ascending order.
    q1, median, q3 = (_at(inputs, int(torch.tensor(q) * (n_elements - 1))) for q in (0.25, 0.5, 0.75))
    values = torch.tensor([q1, median, q3])
    threshold = (values[1] + 1.5 * (values[2] - values[0])).item()
    for chunk in inputs.chunks():
        taken = _importance(chunk).ge_(threshold)
        flat[chunk.span] = chunk.task_vector(0).mul_(taken).add_(chunk.base)


def _at(inputs: MergeInput, place: int) -> float:
    """The importance at a place, from 0, of the ascending order."""
    # A divergence near 0 may round to a negative number, and so may an importance.
    identity, n_elements = inputs.identities[0], inputs.models[0].numel()
    above = Quantity(("importance", identity), lambda chunk: _importance(chunk).clamp_(min=0))
    value = kth_largest(inputs, above, n_elements - place)[0]
    if value > 0:
        return value
    below = Quantity(("negated importance", identity), lambda chunk: _importance(chunk).neg_().clamp_(min=0))
    return -kth_largest(inputs, below, place + 1)[0]


def _importance(chunk: Chunk) -> Tensor:
    model, base = (tensor.view(-1, chunk.inputs.row_elements) for tensor in (chunk.model(0), chunk.base))
    p, q = (torch.softmax(rows, dim=-1).add_(1e-8) for rows in (model, base))
    divergence = torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    return torch.mul(torch.sub(model, base).abs_(), divergence).view(-1)
