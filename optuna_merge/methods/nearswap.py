"""NearSwap: moves each element of the base towards the model, further where the two are closer."""

from __future__ import annotations

from torch import Tensor

from optuna_merge.methods.elementwise import write
from optuna_merge.methods.function import MergeInput


def nearswap(inputs: MergeInput, out: Tensor) -> None:
    """Write ``(1 - w) base + w model`` with ``w = min(1, t / |base - model|)``.

    References:
        https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    write(inputs, out, _moved, [inputs.shared["t"]])


def _moved(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    base, model = (tensor.float() for tensor in stored)
    weight = (floats[0] / (model - base).abs().clamp(min=1e-6)).clamp(0, 1)
    return weight * model + (1 - weight) * base
