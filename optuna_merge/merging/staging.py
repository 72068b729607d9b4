"""Brings what is merged next to the device that merges, while it merges what came before.

Knows tensors and devices; knows nothing of models and recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optuna_merge.merging.sizes import STAGED_BYTES


class Stage:
    """Copies to a device, on a stream of their own, of the tensors that are merged next.

    A copy lies in memory of the device's current stream, and begins when that stream has done what it was told by
    then: so memory can go from a tensor that was merged to the next copy, and to whatever follows the merge.

    Attributes:
        is_ahead: Whether there is anything to be gained by starting before tensors are taken.
    """

    def __init__(self, device: torch.device, *, is_ahead: bool | None = None) -> None:
        """Copies to ``device``.

        Args:
            device: Where tensors are merged.
            is_ahead: Whether tensors are copied; None: unless it is the CPU.
        """
        self.is_ahead = device.type != "cpu" if is_ahead is None else is_ahead
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copying: Any = None
        self._started: tuple[str, list[Tensor], Any] | None = None

    def start(self, name: str, tensors: list[Tensor]) -> None:
        """Begin to copy; nothing waits for it, if the tensors lie in page-locked memory."""
        self.drop()
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        if not self.is_ahead or n_bytes > STAGED_BYTES or self._are_here(tensors):
            self._started = name, tensors, None
            return
        current = self._streams.current_stream(self._device)
        if self._copying is None:
            self._copying = self._streams.Stream(self._device)
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device) for tensor in tensors]
        self._copying.wait_stream(current)
        try:
            with self._streams.stream(self._copying):
                for copy, tensor in zip(copies, tensors, strict=True):
                    copy.copy_(tensor, non_blocking=True)
        finally:
            self._started = name, copies, self._copying.record_event()

    def take(self, name: str, read: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors of a name, which ``read`` reads where they were not started with.

        Returns:
            Copies on the device, which what is done there from now on waits for; or, where they are too large to be
            brought whole, or on the device already, the tensors themselves.
        """
        if self._started is None or self._started[0] != name:
            self.start(name, read())
        assert self._started is not None
        tensors = self._started[1]
        self.drop()
        return tensors

    def drop(self) -> None:
        """Let go of what was begun; what the device does from now on, in its memory too, waits until it is done."""
        if self._started is not None and self._started[2] is not None:
            self._streams.current_stream(self._device).wait_event(self._started[2])
        self._started = None

    def stop(self) -> None:
        """Take no more memory: from now on tensors stay where they are."""
        self.drop()
        self.is_ahead = False

    def _are_here(self, tensors: list[Tensor]) -> bool:
        return self._device.type != "cpu" and all(tensor.device == self._device for tensor in tensors)
