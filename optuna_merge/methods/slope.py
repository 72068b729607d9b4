"""The slope of a scalar in a method's parameters, collected while the method runs on one tensor.

Knows the gradient by the merged tensor; knows nothing of how a method computes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from optuna_merge.duals import slopes_of
from optuna_merge.errors import MethodError


class Slope:
    """Given to a method in :class:`.function.MergeInput`, it makes the method differentiate instead of write.

    The method's parameters are then dual numbers (:mod:`optuna_merge.duals`).

    Args:
        gradient: Gradient of the scalar by the merged tensor, of its shape and of any floating dtype and device.
        device: Device of the arithmetic.
    """

    def __init__(self, gradient: Tensor, device: torch.device) -> None:
        self._flat = gradient.detach().reshape(-1)
        self._device = device
        self._parts: list[tuple[list[tuple[int, Hashable, float]], Tensor]] = []

    def gradient(self, span: slice) -> Tensor:
        """The gradient of a piece, given as a slice of the flat tensor; float32 on the device, shape ``[n]``."""
        return self._flat[span].to(self._device, torch.float32)

    def add(self, numbers: Sequence[float], slopes: Tensor) -> None:
        """Add what numbers contribute that a method computed from its parameters; does not wait for the device.

        Args:
            numbers: The numbers, dual where they depend on a parameter.
            slopes: Derivative of the scalar by each of them, float64, shape ``[n]``.
        """
        terms = [(i, key, own) for i, number in enumerate(numbers) for key, own in slopes_of(number).items()]
        self._parts.append((terms, slopes))

    def finish(self, name: str, method: str) -> None:
        """Release the gradient, and refuse a method that computed the tensor ``name`` without telling its slope.

        Raises:
            MethodError: If it did.
        """
        self._flat = self._flat.new_empty(0)
        if not self._parts:
            raise MethodError(
                f"{name}: {method} must compute through elementwise.write to be differentiated, got arithmetic of its"
                " own; use elementwise.write, or declare its parameters with is_smooth=False"
            )

    def totals(self) -> dict[Hashable, float]:
        """Derivative of the scalar by each parameter that took part; waits for the device."""
        totals: dict[Hashable, float] = {}
        for terms, slopes in self._parts:
            values = slopes.tolist()
            for index, key, own in terms:
                totals[key] = totals.get(key, 0.0) + own * values[index]
        return totals
