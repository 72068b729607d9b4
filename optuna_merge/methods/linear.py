"""Linear merging: the weighted mean, or the weighted sum, of the models."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from optuna_merge.methods.elementwise import write
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
    write(replace(inputs, base=None), out, _weighted_sum, [*weights, divisor], is_fused=True)


def _weighted_sum(sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    total = torch.zeros_like(sources[0], dtype=torch.float32)
    for index, source in enumerate(sources):
        total = torch.addcmul(total, source.float(), floats[index])  # rounds once, as in mergekit
    return total / floats[len(sources)]  # at the end: weights divided before give other bits
