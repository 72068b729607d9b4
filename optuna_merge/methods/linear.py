"""Linear merging: the weighted mean, or the weighted sum, of the models."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput


def linear(inputs: MergeInput, out: Tensor) -> None:
    """Write ``sum_i weight_i model_i``, with ``normalize`` divided by ``sum_i weight_i``.

    Weights that sum to 0 divide by 0: with ``normalize`` the result is then not finite, as in mergekit, and the
    merge fails. The base is no part of the sum unless it is one of the models.

    References:
        Model soups, arXiv:2203.05482.
    """
    weights = inputs.per_model["weight"]
    divisor = torch.tensor(weights, dtype=torch.float32).sum().item() if inputs.switches["normalize"] else 1.0
    flat = out.view(-1)
    for chunk in inputs.chunks():
        total = torch.mul(chunk.model(0), weights[0], out=chunk.scratch("total"))
        for index, weight in enumerate(weights[1:], start=1):
            total.add_(chunk.model(index), alpha=weight)
        if divisor != 1:
            total /= divisor  # at the end: weights divided before give other bits, the more often the rounder they are
        flat[chunk.span] = total
