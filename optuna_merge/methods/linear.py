"""Linear merging: the weighted mean or the weighted sum of the models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optuna_merge.methods.elementwise import write
from optuna_merge.methods.function import MergeInput, float32_sum


def linear(inputs: MergeInput, out: Tensor) -> None:
    """Write ``sum_i weight_i model_i``, divided by ``sum_i weight_i`` with ``normalize``.

    If the weights sum to 0, normalizing divides by 0, as in mergekit: the result is not finite, and the merge fails.
    The base is not part of the sum unless it is one of the models.

    References:
        Model soups, arXiv:2203.05482.
    """
    weights = inputs.per_model["weight"]
    divisor = float32_sum(weights) if inputs.switches["normalize"] else 1.0
    write(replace(inputs, base=None), out, _weighted_sum, [*weights, divisor], is_fused=True)


def _weighted_sum(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    total = torch.zeros_like(stored[0], dtype=torch.float32)
    for index, model in enumerate(stored):
        total = torch.addcmul(total, model.float(), floats[index])  # rounds once, as in mergekit
    return total / floats[len(stored)]  # at the end: dividing the weights first would give other bits
