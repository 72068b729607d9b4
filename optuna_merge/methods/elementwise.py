"""Elementwise arithmetic: written once as plain torch, compiled into one pass over memory where that pays.

Compiled and plain give the same bits: what is compiled contracts no product and sum into one rounding, or, where an
expression is made of ``addcmul``, each of them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput, numbers_on

_LEAST_COMPILED = {"cpu": 1 << 14, "cuda": 2}  # elements; on a CPU the call of a kernel costs more than fewer do
_ELEMENTS_WITH_EXTRAS = 1 << 20  # in a piece: a call costs, and what leaves the cache costs too
_N_VARIANTS = 64  # of one kernel: dtypes, and whether a tensor has one element
_OPTIONS = {
    "emulate_precision_casts": True,  # on CUDA: no fused multiply-add
    "eager_numerics.division_rounding": True,  # likewise: no approximate division
    "cpp.dynamic_threads": True,
}
_FUSED = {"emulate_precision_casts": False, "cpp.enable_floating_point_contract_flag": "fast"}


class Expression(Protocol):
    """Elementwise arithmetic; equal ones share a kernel, so it must be hashable."""

    def __call__(
        self, sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
    ) -> Tensor:
        """Compute one piece.

        Args:
            sources: The base, if the method has one, and the models; shape ``[n]`` each, as stored.
            extras: Others of that shape.
            floats: float32 numbers, which may differ from call to call.
            integers: int32 numbers, likewise.

        Returns:
            Shape ``[n]``.
        """
        ...

    def __hash__(self) -> int: ...


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
    """Evaluate an expression over a whole tensor.

    Args:
        inputs: The tensor.
        out: Contiguous, of its shape, on ``inputs.device``; each element is rounded once to its dtype.
        expression: What is evaluated.
        floats: Its numbers; become float32.
        integers: Its int32 numbers for a piece, given which elements of the flat tensor that is.
        extras: Make its other tensors, each in memory of its own that lives until the next piece.
        is_fused: Whether every product in it is part of an ``addcmul``, which rounds once.
    """
    flat = out.view(-1)
    numbers = numbers_on(inputs.device, floats)
    whole_rows = inputs.chunks(_ELEMENTS_WITH_EXTRAS if inputs.is_compiled else 0)
    for chunk in whole_rows if extras else inputs.large_chunks():
        made = tuple(extra(chunk) for extra in extras)
        evaluate(inputs, flat[chunk.span], expression, chunk.stored(), made, numbers, integers(chunk.span), is_fused)


def evaluate(
    inputs: MergeInput,
    destination: Tensor,
    expression: Expression,
    sources: tuple[Tensor, ...],
    extras: tuple[Tensor, ...],
    floats: Tensor,
    integers: Iterable[int],
    is_fused: bool = False,
) -> None:
    """Write an expression's values for one piece into ``destination``, shape ``[n]``; see :class:`Expression`."""
    ints = numbers_on(inputs.device, integers, torch.int32)
    if inputs.is_compiled and destination.numel() >= _LEAST_COMPILED[inputs.device.type]:
        _kernel(expression, is_fused)(destination, sources, extras, floats, ints)
    else:
        destination.copy_(expression(sources, extras, floats, ints))


@functools.cache
def _kernel(expression: Expression, is_fused: bool) -> Callable[..., None]:
    def plain(
        destination: Tensor, sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
    ) -> None:
        destination.copy_(expression(sources, extras, floats, integers))

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _N_VARIANTS)
    options: dict[str, Any] = {**_OPTIONS, **(_FUSED if is_fused else {})}
    kernel: Callable[..., None] = torch.compile(plain, dynamic=True, fullgraph=True, options=options)
    has_failed = False

    def compiled(*arguments: Any) -> None:
        nonlocal has_failed
        if not has_failed:
            try:
                kernel(*arguments)
            except Exception as exc:  # whatever a compiler, or its absence, may raise
                has_failed = True
                reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
                warnings.warn(f"merging is slower than it could be, torch.compile failed: {reason}", stacklevel=2)
            else:
                return
        plain(*arguments)

    return compiled
