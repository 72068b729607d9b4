"""What a merge method's tensor function is given, and what it must do.

A function merges one tensor. It sees the tensor whole, in the dtype of each file, or in float32 pieces of bounded
size; it writes the result piece by piece, and each element is rounded once. Knows nothing of files and recipes.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_N_NUMBERS = 1 << 14  # tensors of numbers that are kept on their device


@dataclass(frozen=True)
class MergeInput:
    """One tensor of every model, and the numbers that apply to it.

    Attributes:
        name: Its name in the checkpoint.
        base: The base model's, any shape; None if the method has no base.
        models: The sources', in the order of the recipe, of the same shape; may be maps of files: never written to.
        per_model: Method parameter to one value for each of ``models``.
        shared: Method parameter to its value.
        switches: Such as ``normalize``.
        seed: Seeds random masks.
        identities: One text for each of ``models`` that stands for its content; tells them apart in masks and memory.
        device: Where the arithmetic is done and the result lives.
        chunk_elements: Elements in a piece, about; pieces hold whole rows. Changes speed and memory, never a result.
        kernel_elements: Likewise in a piece for compiled arithmetic, which makes nothing on its way.
        buffers: Memory that pieces of consecutive tensors share.
        memory: What a method found out about a tensor and can use in the next merge; small.
        is_compiled: Whether elementwise arithmetic is compiled; changes speed, never a result.
    """

    name: str
    base: Tensor | None
    models: tuple[Tensor, ...]
    per_model: Mapping[str, tuple[float, ...]]
    shared: Mapping[str, float]
    switches: Mapping[str, bool]
    seed: int
    identities: tuple[str, ...]
    device: torch.device
    chunk_elements: int
    kernel_elements: int
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    memory: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)
    is_compiled: bool = False

    def of(self, base: Tensor | None, models: tuple[Tensor, ...]) -> MergeInput:
        """The same, of other tensors."""
        return dataclasses.replace(self, base=base, models=models)

    def chunks(self, n_elements: int = 0) -> Iterator[Chunk]:
        """The tensor in flat pieces of whole rows, in order. A piece is valid until the next one.

        Args:
            n_elements: What a piece should have at least.
        """
        n_rows = max(self.chunk_elements, n_elements) // max(1, self.row_elements)
        return self._pieces(max(1, n_rows) * self.row_elements)

    def large_chunks(self) -> Iterator[Chunk]:
        """The tensor in flat pieces for elementwise arithmetic, in order: larger ones if it is compiled."""
        return self._pieces(max(self.chunk_elements, self.kernel_elements) if self.is_compiled else self.chunk_elements)

    @property
    def row_elements(self) -> int:
        """Elements in a row, which is the last axis; a vector is one row."""
        shape = self.models[0].shape
        return shape[-1] if len(shape) > 1 else self.models[0].numel()

    def blocks(self) -> Iterator[Chunk]:
        """The tensor in flat pieces of a size fixed for the device, in order: for sums, which depend on the pieces."""
        return self._pieces(_BLOCK_ELEMENTS[self.device.type])

    def _pieces(self, size: int) -> Iterator[Chunk]:
        tensors = self.models if self.base is None else (self.base, *self.models)
        flat = [tensor.reshape(-1) for tensor in tensors]
        n_elements = flat[0].numel()
        for start in range(0, n_elements, max(1, size)):
            yield Chunk(self, flat, slice(start, min(start + size, n_elements)))

    def scratch(self, name: str, n_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory, shape ``[n_elements]``, the same for every call with ``name``."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < n_elements:
            buffer = self.buffers[name] = torch.empty(n_elements, dtype=dtype, device=self.device)
        return buffer[:n_elements]


class Chunk:
    """A flat piece of a :class:`MergeInput`: float32, on its device.

    Attributes:
        span: Which elements of the flat tensor.
    """

    def __init__(self, inputs: MergeInput, flat: list[Tensor], span: slice) -> None:
        self.inputs = inputs
        self.span = span
        self._flat = flat

    @cached_property
    def base(self) -> Tensor:
        """The base's elements, shape ``[n]``; read only."""
        return self._load(0, "base")

    def model(self, index: int) -> Tensor:
        """A source's elements, shape ``[n]``; read only, valid until the next call for any source."""
        return self._load(index + (self.inputs.base is not None), "model")

    def task_vector(self, index: int) -> Tensor:
        """A source minus the base, shape ``[n]``; writable, valid until the next call for any source."""
        out = self.scratch("task_vector")
        return torch.sub(self.model(index), self.base, out=out)

    def stored(self) -> tuple[Tensor, ...]:
        """The base, if there is one, and the sources, as stored, on the device, shape ``[n]`` each; read only."""
        return tuple(tensor[self.span].to(self.inputs.device) for tensor in self._flat)

    def stored_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """The base and a source; as :meth:`stored`."""
        base, model = (self._flat[position][self.span].to(self.inputs.device) for position in (0, index + 1))
        return base, model

    def scratch(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory, shape ``[n]``, shared by all pieces."""
        return self.inputs.scratch(name, self.n_elements, dtype)

    @property
    def n_elements(self) -> int:
        """Elements in the piece."""
        n_elements: int = self.span.stop - self.span.start
        return n_elements

    def zeros(self, name: str) -> Tensor:
        """:meth:`scratch`, filled with zeros."""
        return self.scratch(name).zero_()

    def direction(self, index: int) -> Tensor:
        """A source as seen from the origin: minus the base if there is one. As :meth:`task_vector`, but read only."""
        return self.model(index) if self.inputs.base is None else self.task_vector(index)

    def _load(self, position: int, name: str) -> Tensor:
        stored = self._flat[position][self.span]
        if stored.dtype == torch.float32 and stored.device == self.inputs.device:
            return stored
        return self.scratch(name).copy_(stored)


def numbers_on(device: torch.device, values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that arithmetic on a device is steered by, shape ``[n]``; read only.

    Equal ones are kept, and others travel without anybody waiting: a merge of many tensors stays ahead of its GPU.
    """
    return _numbers_on(device, array("d", values).tobytes(), dtype)


@functools.lru_cache(maxsize=_N_NUMBERS)
def _numbers_on(device: torch.device, packed: bytes, dtype: torch.dtype) -> Tensor:
    numbers = torch.tensor(array("d", packed), dtype=dtype)  # by their bits: 0 and -0 are equal as keys
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class MergeFunction(Protocol):
    """The tensor function of a merge method."""

    def __call__(self, inputs: MergeInput, out: Tensor) -> None:
        """Merge one tensor.

        Args:
            inputs: What is merged; only read.
            out: Contiguous, shape of the tensor, on ``inputs.device``, uninitialised; every element must be written,
                computed in float32 (``out`` rounds it to its own dtype).

        Raises:
            MethodError: If a parameter is outside its range.
        """
        ...
