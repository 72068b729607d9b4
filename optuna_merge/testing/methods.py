"""Single tensors merged by a method, without checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import Tensor

    from optuna_merge.methods import MergeMethod

Setting = bool | float | Sequence[float]
"""A switch, a number for all models, or one number for each model."""


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
    **settings: Setting,
) -> Tensor:
    """Merge one tensor of each model.

    Args:
        method: A name in ``METHODS``, or the import path of a user's method.
        models: One tensor of each source, all of the same shape.
        base: The base's tensor, if the method has a base.
        name: Name of the tensor in the checkpoint.
        seed: Seeds random masks.
        dtype: Dtype of the result.
        identities: What tells the models' random masks apart; None: ``"0"``, ``"1"`` ...
        chunk_elements: Elements that are merged at once.
        kernel_elements: The same for compiled arithmetic.
        is_compiled: Whether elementwise arithmetic is compiled.
        **settings: Switches and method parameters by name, ``lambda_`` for lambda; what is left out has its default.
    """
    import torch

    from optuna_merge.methods import find_method
    from optuna_merge.methods.function import MergeInput

    declared = find_method(method)
    per_model, shared, switches = _resolved(declared, len(models), settings)
    out = torch.full(models[0].shape, torch.nan, dtype=getattr(torch, dtype), device=models[0].device)
    inputs = MergeInput(
        name=name,
        base=base,
        models=tuple(models),
        per_model=per_model,
        shared=shared,
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


def _resolved(
    method: MergeMethod, n_models: int, settings: Mapping[str, Setting]
) -> tuple[dict[str, tuple[float, ...]], dict[str, float], dict[str, bool]]:
    """Parameters for each model, parameters for all, and switches."""
    given = {key.rstrip("_"): value for key, value in settings.items()}
    per_model: dict[str, tuple[float, ...]] = {}
    shared: dict[str, float] = {}
    for parameter in method.parameters:
        value = given.pop(parameter.name, 1 / n_models if parameter.default is None else parameter.default)
        if not parameter.per_model:
            shared[parameter.name] = cast(float, value)
        elif isinstance(value, Sequence):
            per_model[parameter.name] = tuple(value)
        else:
            per_model[parameter.name] = (float(value),) * n_models
    switches = {switch: bool(given.pop(switch, default)) for switch, default in method.switches}
    assert not given, f"{method.name} has no {sorted(given)}"
    return per_model, shared, switches
