"""The tensor function of a merge method: what it is given and what it must do.

A function merges one tensor. It reads the tensor whole, in the dtype of each file, or in float32 pieces of bounded
size. It writes the result piece by piece, and each element is rounded once. Knows nothing of files and recipes.
"""

from __future__ import annotations

import dataclasses
import functools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from optuna_merge.duals import value_of, with_value
from optuna_merge.methods.kept import KeptTensors
from optuna_merge.methods.slope import Slope

_BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
_N_NUMBERS = 1 << 14  # small tensors that are kept on their device


@dataclass(frozen=True)
class MergeInput:
    """One tensor of every model, and the method parameters that apply to it.

    Attributes:
        name: The tensor's name in the checkpoint.
        base: The base's tensor, of any shape; None if the method has no base.
        models: The sources' tensors, of the same shape, in the order of the recipe. They may be maps of files, so they
            must never be written to.
        per_model: Method parameter to one value for each of ``models``.
        shared: Method parameter to its value.
        switches: Options that are on or off, such as ``normalize``.
        seed: Seed of random masks.
        identities: One text for each of ``models`` that stands for its content. It tells models apart in masks and in
            ``memory``.
        device: Device of the arithmetic and of the result.
        chunk_elements: Approximate elements in a piece, which holds whole rows. Changes speed and memory, not results.
        kernel_elements: The same for compiled arithmetic, which needs no intermediate tensors.
        buffers: Memory that the pieces of consecutive tensors share.
        memory: Small findings about tensors that a method keeps for the next merge.
        is_compiled: Whether elementwise arithmetic is compiled. Changes speed, not results.
        kept: Large tensors that a method keeps for the next merge.
        slope: Collects derivatives instead of a merge; None to merge. ``elementwise.write`` sees to it.
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
    kept: KeptTensors = field(default_factory=KeptTensors, repr=False)
    slope: Slope | None = field(default=None, repr=False)

    def of(self, base: Tensor | None, models: tuple[Tensor, ...]) -> MergeInput:
        """The same input with other tensors."""
        return dataclasses.replace(self, base=base, models=models)

    def chunks(self, n_elements: int = 0) -> Iterator[Chunk]:
        """Cut the tensor into flat pieces of whole rows, in order. A piece is valid until the next one.

        Args:
            n_elements: Smallest number of elements that a piece should have.
        """
        n_rows = max(self.chunk_elements, n_elements) // max(1, self.row_elements)
        return self._pieces(max(1, n_rows) * self.row_elements)

    def large_chunks(self) -> Iterator[Chunk]:
        """Cut the tensor into flat pieces for elementwise arithmetic, in order; larger pieces if it is compiled."""
        return self._pieces(max(self.chunk_elements, self.kernel_elements) if self.is_compiled else self.chunk_elements)

    @property
    def row_elements(self) -> int:
        """Elements in a row, which is the last axis; a vector is one row."""
        shape = self.models[0].shape
        return shape[-1] if len(shape) > 1 else self.models[0].numel()

    def blocks(self) -> Iterator[Chunk]:
        """Cut the tensor into flat pieces of a fixed size, in order; for sums, which depend on how they are cut."""
        return self._pieces(_BLOCK_ELEMENTS[self.device.type])

    def _pieces(self, size: int) -> Iterator[Chunk]:
        tensors = self.models if self.base is None else (self.base, *self.models)
        flat = [tensor.reshape(-1) for tensor in tensors]
        n_elements = flat[0].numel()
        for start in range(0, n_elements, max(1, size)):
            yield Chunk(self, flat, slice(start, min(start + size, n_elements)))

    def scratch(self, name: str, n_elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory, shape ``[n_elements]``; calls with the same ``name`` share it."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < n_elements:
            buffer = self.buffers[name] = torch.empty(n_elements, dtype=dtype, device=self.device)
        return buffer[:n_elements]


class Chunk:
    """A flat piece of a :class:`MergeInput`, in float32 on its device.

    Attributes:
        inputs: The whole tensor.
        span: The elements of the flat tensor that the piece holds.
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
        """The base, if there is one, and the sources, in the dtypes of the files, on the device.

        Shape ``[n]`` each; read only.
        """
        return tuple(tensor[self.span].to(self.inputs.device) for tensor in self._flat)

    def stored_pair(self, index: int) -> tuple[Tensor, Tensor]:
        """The base and one source, as from :meth:`stored`."""
        base, model = (self._flat[position][self.span].to(self.inputs.device) for position in (0, index + 1))
        return base, model

    def scratch(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised memory, shape ``[n]``; all pieces share it by ``name``."""
        return self.inputs.scratch(name, self.n_elements, dtype)

    @property
    def n_elements(self) -> int:
        """Elements in the piece."""
        n_elements: int = self.span.stop - self.span.start
        return n_elements

    def zeros(self, name: str) -> Tensor:
        """Memory as from :meth:`scratch`, filled with zeros."""
        return self.scratch(name).zero_()

    def direction(self, index: int) -> Tensor:
        """The task vector of a source, or the source if there is no base; as :meth:`task_vector`, but read only."""
        return self.model(index) if self.inputs.base is None else self.task_vector(index)

    def _load(self, position: int, name: str) -> Tensor:
        stored = self._flat[position][self.span]
        if stored.dtype == torch.float32 and stored.device == self.inputs.device:
            return stored
        return self.scratch(name).copy_(stored)


def float32_sum(numbers: Sequence[float]) -> float:
    """The sum, added in float32 as in mergekit; dual if the numbers are."""
    total: float = torch.tensor([value_of(number) for number in numbers], dtype=torch.float32).sum().item()
    return with_value(sum(numbers), total)


def numbers_on(device: torch.device, values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """A small tensor of numbers on a device, shape ``[n]``; read only.

    It is cached by value, and copied without waiting, so that a merge of many tensors stays ahead of its GPU.
    """
    return _numbers_on(device, array("d", values).tobytes(), dtype)


@functools.lru_cache(maxsize=_N_NUMBERS)
def _numbers_on(device: torch.device, packed: bytes, dtype: torch.dtype) -> Tensor:
    numbers = torch.tensor(array("d", packed), dtype=dtype)  # cached by their bits: as keys, 0 and -0 are equal
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


class MergeFunction(Protocol):
    """The tensor function of a merge method."""

    def __call__(self, inputs: MergeInput, out: Tensor) -> None:
        """Merge one tensor.

        Args:
            inputs: The tensor of each model; read only.
            out: Result; contiguous, of the tensor's shape, on ``inputs.device``, uninitialised. The function must write
                every element, computed in float32; ``out`` rounds it to its own dtype.

        Raises:
            MethodError: If a parameter is outside its range.
        """
        ...
