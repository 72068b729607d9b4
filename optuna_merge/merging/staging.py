"""Copies the tensors that are merged next to the device, while the device merges the ones before.

Knows tensors and devices; knows nothing of models and recipes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optuna_merge.merging.sizes import STAGED_BYTES


class Stage:
    """Copies the tensors that are merged next to a device, on a stream of its own.

    A copy takes memory of the device's current stream, and starts when that stream has finished the work it had by
    then. So memory of a merged tensor can be reused by the next copy, and memory of a copy by whatever follows.

    Attributes:
        is_ahead: Whether starting to copy early gains anything.
    """

    def __init__(self, device: torch.device, *, is_ahead: bool | None = None) -> None:
        """Set up copying to ``device``.

        Args:
            device: Device that merges.
            is_ahead: Whether to copy ahead; None to do so on every device but the CPU.
        """
        self.is_ahead = device.type != "cpu" if is_ahead is None else is_ahead
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._copying: Any = None
        self._started: tuple[str, list[Tensor], Any] | None = None

    def start(self, name: str, tensors: list[Tensor]) -> None:
        """Start to copy the tensors of a name. If they are in page-locked memory, nothing waits for it."""
        self.drop()
        n_bytes = sum(tensor.nbytes for tensor in tensors)
        if not self.is_ahead or n_bytes > STAGED_BYTES or self._are_on_device(tensors):
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
        """Take the tensors of a name; ``read`` reads them if they were not started.

        Returns:
            Copies on the device, for which its further work waits. If the tensors are too large to be copied whole, or
            on the device already, the tensors themselves.
        """
        if self._started is None or self._started[0] != name:
            self.start(name, read())
        assert self._started is not None
        tensors = self._started[1]
        self.drop()
        return tensors

    def drop(self) -> None:
        """Release the copies that were started; further work of the device and reuse of their memory wait for them."""
        if self._started is not None and self._started[2] is not None:
            self._streams.current_stream(self._device).wait_event(self._started[2])
        self._started = None

    def stop(self) -> None:
        """Stop copying, which takes memory: from now on tensors stay where they are."""
        self.drop()
        self.is_ahead = False

    def _are_on_device(self, tensors: list[Tensor]) -> bool:
        return self._device.type != "cpu" and all(tensor.device == self._device for tensor in tensors)
