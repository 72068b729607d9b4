"""NearSwap: moves each element of the base towards the model, further where the two are closer."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput


def nearswap(inputs: MergeInput, out: Tensor) -> None:
    """Write ``(1 - w) base + w model`` with ``w = min(1, t / |base - model|)``.

    References:
        https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    t = inputs.shared["t"]
    flat = out.view(-1)
    for chunk in inputs.chunks():
        distance = chunk.task_vector(0).abs_().clamp_(min=1e-6)
        weight = torch.div(t, distance, out=distance).clamp_(0, 1)
        kept = torch.sub(1, weight, out=chunk.scratch("kept")).mul_(chunk.base)
        flat[chunk.span] = weight.mul_(chunk.model(0)).add_(kept)
