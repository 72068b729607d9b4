"""Linear merging: the weighted mean, or the weighted sum, of the models."""

from __future__ import annotations

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
    write(inputs.of(None, inputs.models), out, _weighted_sum, [*weights, divisor])


def _weighted_sum(sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    total = sources[0].float() * floats[0]
    for index in range(1, len(sources)):
        total = _multiply_add(total, sources[index].float(), floats[index])
    return total / floats[len(sources)]  # at the end: weights divided before give other bits


def _multiply_add(total: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """``total + values * factor``, rounded once, as mergekit does it."""
    if torch.compiler.is_compiling() and total.device.type == "cpu":  # what is compiled there rounds the product too
        return (total.double() + values.double() * factor.double()).float()
    return torch.addcmul(total, values, factor)
