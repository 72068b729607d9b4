"""Elementwise arithmetic: written once in plain torch, and compiled into one pass over memory if that pays off.

Both give the same bits: compiled code does not fuse a product and a sum into one rounding, or, in an expression made of
``addcmul``, fuses each of them, as ``addcmul`` does.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optuna_merge.duals import value_of
from optuna_merge.errors import first_line
from optuna_merge.methods.function import Chunk, MergeInput, numbers_on
from optuna_merge.methods.slope import Slope

_LEAST_COMPILED = {"cpu": 1 << 14, "cuda": 2}  # elements; on a CPU, fewer take less time than the call of a kernel
_ELEMENTS_WITH_EXTRAS = 1 << 20  # in a piece: small enough for the cache, large enough for the cost of a call
_N_VARIANTS = 64  # of one kernel: one for each set of dtypes, and for tensors of one element
_OPTIONS = {
    "emulate_precision_casts": True,  # on CUDA: no fused multiply-add
    "eager_numerics.division_rounding": True,  # on CUDA: no approximate division
    "cpp.dynamic_threads": True,
}
_FUSED = {"emulate_precision_casts": False, "cpp.enable_floating_point_contract_flag": "fast"}


class Expression(Protocol):
    """Elementwise arithmetic. It must be hashable: equal expressions share a compiled kernel."""

    def __call__(
        self, stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
    ) -> Tensor:
        """Compute one piece.

        Args:
            stored: The base, if the method has one, and the models; shape ``[n]`` each, in the dtypes of the files.
            extras: Other tensors of that shape.
            floats: float32 numbers, which may differ between calls.
            integers: int32 numbers, which may differ between calls.

        Returns:
            Shape ``[n]``.
        """
        ...

    def __hash__(self) -> int: ...


class Differentiated(ABC):
    """Base of an expression whose derivatives are written out, at a fraction of autograd's time for small tensors."""

    @abstractmethod
    def derivatives(
        self,
        stored: tuple[Tensor, ...],
        extras: tuple[Tensor, ...],
        floats: Tensor,
        integers: Tensor,
        gradient: Tensor,
    ) -> Tensor | None:
        """Derivatives of a scalar by ``floats``.

        Args:
            stored: As for the expression.
            extras: As for the expression.
            floats: As for the expression.
            integers: As for the expression.
            gradient: Gradient of the scalar by the piece, float32, shape ``[n]``.

        Returns:
            float64, of the shape of ``floats``; None if this expression is left to autograd.
        """


def write(
    inputs: MergeInput,
    out: Tensor,
    expression: Expression,
    floats: Sequence[float],
    integers: Callable[[slice], Iterable[int]] = lambda span: (),
    extras: Sequence[Callable[[Chunk], Tensor]] = (),
    *,
    is_fused: bool = False,
) -> None:
    """Evaluate an expression over a whole tensor; or, if the input has a slope, differentiate it by its numbers.

    Args:
        inputs: The tensor.
        out: Result; contiguous, of the tensor's shape, on ``inputs.device``. Each element is rounded once to its dtype.
        expression: The arithmetic.
        floats: Its numbers, converted to float32; dual where a derivative is wanted.
        integers: Returns its int32 numbers for a piece, which is given as a slice of the flat tensor.
        extras: Make its other tensors for a piece, each in memory of its own that is valid until the next piece.
        is_fused: Whether every product in the expression is part of an ``addcmul``, which rounds once.
    """
    if inputs.slope is not None:
        _differentiate(inputs, inputs.slope, expression, floats, integers, extras)
        return
    flat = out.view(-1)
    numbers = numbers_on(inputs.device, floats)
    whole_rows = inputs.chunks(_ELEMENTS_WITH_EXTRAS if inputs.is_compiled else 0)
    for chunk in whole_rows if extras else inputs.large_chunks():
        made = tuple(extra(chunk) for extra in extras)
        evaluate(inputs, flat[chunk.span], expression, chunk.stored(), made, numbers, integers(chunk.span), is_fused)


def _differentiate(
    inputs: MergeInput,
    slope: Slope,
    expression: Expression,
    floats: Sequence[float],
    integers: Callable[[slice], Iterable[int]],
    extras: Sequence[Callable[[Chunk], Tensor]],
) -> None:
    """Add the derivatives by ``floats``; ``extras``, such as the chances of a random mask, are held fixed."""
    numbers = numbers_on(inputs.device, map(value_of, floats))
    total = torch.zeros(len(floats), dtype=torch.float64, device=inputs.device)
    for chunk in inputs.chunks():
        made = tuple(extra(chunk) for extra in extras)
        ints = numbers_on(inputs.device, integers(chunk.span), torch.int32)
        pieces = chunk.stored(), made, numbers, ints
        gradient = slope.gradient(chunk.span)
        own = expression.derivatives(*pieces, gradient) if isinstance(expression, Differentiated) else None
        total += _by_autograd(expression, pieces, gradient) if own is None else own
    slope.add(floats, total)


def _by_autograd(
    expression: Expression, pieces: tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor], gradient: Tensor
) -> Tensor:
    stored, extras, floats, integers = pieces
    leaves = floats.clone().requires_grad_()
    with torch.enable_grad():
        result = expression(stored, extras, leaves, integers)
    return torch.autograd.grad(result, leaves, gradient)[0] if result.requires_grad else torch.zeros_like(floats)


def evaluate(
    inputs: MergeInput,
    destination: Tensor,
    expression: Expression,
    stored: tuple[Tensor, ...],
    extras: tuple[Tensor, ...],
    floats: Tensor,
    integers: Iterable[int],
    is_fused: bool = False,
) -> None:
    """Write the values of an expression for one piece into ``destination``, shape ``[n]``; see :class:`Expression`."""
    ints = numbers_on(inputs.device, integers, torch.int32)
    if inputs.is_compiled and destination.numel() >= _LEAST_COMPILED[inputs.device.type]:
        _kernel(expression, is_fused)(destination, stored, extras, floats, ints)
    else:
        destination.copy_(expression(stored, extras, floats, ints))


@functools.cache
def _kernel(expression: Expression, is_fused: bool) -> Callable[..., None]:
    def plain(
        destination: Tensor, stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
    ) -> None:
        destination.copy_(expression(stored, extras, floats, integers))

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _N_VARIANTS)
    options: dict[str, Any] = {**_OPTIONS, **(_FUSED if is_fused else {})}
    kernel: Callable[..., None] = torch.compile(plain, dynamic=True, fullgraph=True, options=options)
    has_failed = False

    def compiled(*arguments: Any) -> None:
        nonlocal has_failed
        if not has_failed:
            try:
                kernel(*arguments)
            except Exception as exc:  # a compiler, or a missing one, may raise anything
                has_failed = True
                message = f"merging is slower than it could be, torch.compile failed: {first_line(exc)}"
                warnings.warn(message, stacklevel=2)
            else:
                return
        plain(*arguments)

    return compiled
