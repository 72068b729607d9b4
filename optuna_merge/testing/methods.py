"""Merge single tensors by a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor


def merge_tensors(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    name: str = "model.layers.0.mlp.up_proj.weight",
    seed: int = 0,
    dtype: str = "float32",
    identities: Sequence[str] | None = None,
    chunk_elements: int = 1 << 18,
    kernel_elements: int = 1 << 24,
    is_compiled: bool = False,
    **settings: bool | float | Sequence[float],
) -> Tensor:
    """Merge one tensor of each model, without checkpoints.

    Args:
        method: A name in ``METHODS``, or the import path of a user's method.
        models: One tensor of each source, of the same shape.
        base: The base's, if the method has one.
        name: What the tensor is called.
        seed: Seeds random masks.
        dtype: Of the result.
        identities: What tells the models' random masks apart; None: ``"0"``, ``"1"`` ...
        chunk_elements: Size of the pieces.
        kernel_elements: Likewise, of those for compiled arithmetic.
        is_compiled: Whether elementwise arithmetic is compiled.
        **settings: Switches and method parameters by name, ``lambda_`` for lambda; one number means the same for each
            model.
    """
    import torch

    from optuna_merge.methods import find_method
    from optuna_merge.methods.function import MergeInput

    declared = find_method(method)
    given = {key.rstrip("_"): value for key, value in settings.items()}
    values = {
        p.name: given.pop(p.name, 1 / len(models) if p.default is None else p.default) for p in declared.parameters
    }
    switches = {switch: bool(given.pop(switch, default)) for switch, default in declared.switches}
    assert not given, f"{method} has no {sorted(given)}"
    per_model = {
        p.name: tuple(value) if isinstance(value, Sequence) else (float(value),) * len(models)
        for p in declared.parameters
        if p.per_model
        for value in (values[p.name],)
    }
    out = torch.full(models[0].shape, torch.nan, dtype=getattr(torch, dtype), device=models[0].device)
    inputs = MergeInput(
        name=name,
        base=base,
        models=tuple(models),
        per_model=per_model,
        shared={p.name: cast(float, values[p.name]) for p in declared.parameters if not p.per_model},
        switches=switches,
        seed=seed,
        identities=tuple(identities or map(str, range(len(models)))),
        device=models[0].device,
        chunk_elements=chunk_elements,
        kernel_elements=kernel_elements,
        is_compiled=is_compiled,
    )
    declared.load()(inputs, out)
    return out
