"""Task arithmetic: the base plus the weighted sum of the task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput

_NO_DIVISOR = 1e-8  # mergekit: a smaller sum of weights divides by 1 instead


def task_arithmetic(inputs: MergeInput, out: Tensor) -> None:
    """Write ``base + lambda sum_i weight_i (model_i - base)``, the sum divided by ``sum_i weight_i`` if normalized.

    References:
        Editing models with task arithmetic, arXiv:2212.04089.
    """
    weights = inputs.per_model["weight"]
    divisor = sum_of_weights(weights) if inputs.switches["normalize"] else 1.0
    flat = out.view(-1)
    for chunk in inputs.chunks():
        total = chunk.zeros("total")
        for index, weight in enumerate(weights):
            total += chunk.task_vector(index).mul_(weight)
        if divisor != 1:
            total /= divisor
        if inputs.shared["lambda"] != 1:
            total *= inputs.shared["lambda"]
        flat[chunk.span] = torch.add(chunk.base, total, out=total)


def sum_of_weights(weights: tuple[float, ...]) -> float:
    """What normalizing divides by: the float32 sum of the weights, or 1 if that is closer to 0 than 1e-8."""
    total = torch.tensor(weights, dtype=torch.float32).sum().item()
    return 1.0 if abs(total) < _NO_DIVISOR else total
