"""What a merge does, decided before any tensor is read: a recipe with its names resolved, and one step for each tensor.

Knows recipes, methods and which checkpoints are read. Runs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.tensor_names import Place, is_buffer, place_of
from optuna_merge.errors import MergeError
from optuna_merge.methods import MergeMethod, find_method
from optuna_merge.methods.function import MergeFunction, MergeInput
from optuna_merge.recipe import PASSTHROUGH, ParameterSet, Recipe


class MergePlan:
    """A recipe whose names are resolved to objects.

    Attributes:
        copied: Names of tensors that are copied from one model, whatever the recipe says.
        used: Indices of the recipe's models that enter the merge: all but the base, if the method has one.
        read: The checkpoints to read: the base, if the method has one, and the models that enter the merge.
    """

    def __init__(self, recipe: Recipe, models: list[Checkpoint], base: Checkpoint | None) -> None:
        self.recipe = recipe
        self.models = models
        self.template = base or models[0]
        self.method = None if recipe.method == PASSTHROUGH else find_method(recipe.method)
        self.base = None if self.method is None or self.method.base in ("none", "unused") else base
        self.used = tuple(i for i, m in enumerate(recipe.models) if self.base is None or m != recipe.base_model)
        self.read = [self.template] if self.method is None else [models[i] for i in self.used]
        if self.base is not None:
            self.read.insert(0, self.base)
        self.copied = self.template.copied
        self.function: MergeFunction = _no_function if self.method is None else self.method.load()

    @classmethod
    def make(cls, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> MergePlan:
        """Resolve the names of a recipe.

        Raises:
            MergeError: If the recipe does not fit the checkpoints or the method.
        """
        if unknown := [reference for reference in recipe.references if reference not in checkpoints]:
            raise MergeError(f"recipe: models must be among {sorted(checkpoints)}, got {unknown[0]!r}")
        models = [checkpoints[model] for model in recipe.models]
        plan = cls(recipe, models, None if recipe.base_model is None else checkpoints[recipe.base_model])
        if plan.template.n_layers != recipe.n_layers:
            raise MergeError(
                f"recipe: n_layers must be {plan.template.n_layers} as in the models, got {recipe.n_layers}"
            )
        if plan.method is not None:
            _check_models(plan.method, recipe)
        return plan

    def tensors(self, name: str) -> list[Tensor]:
        """The tensor ``name`` of every checkpoint that is read."""
        return [checkpoint.get(name) for checkpoint in self.read]

    def refuse_overwritten(self) -> None:
        """Refuse checkpoints whose files were overwritten since they were opened.

        Raises:
            CheckpointError: If one was.
        """
        for checkpoint in self.read:
            checkpoint.refuse_overwritten()

    def not_finite(self, tensors: list[Tensor]) -> list[str]:
        """References of the checkpoints whose tensor, of those from :meth:`tensors`, holds NaN or infinity."""
        references = [self.recipe.models[i] for i in self.used]
        if self.base is not None:
            assert self.recipe.base_model is not None
            references.insert(0, self.recipe.base_model)
        return [reference for reference, tensor in zip(references, tensors, strict=True) if not tensor.isfinite().all()]

    @cached_property
    def settings(self) -> tuple[Any, ...]:
        """What every tensor is made from, besides its method parameters."""
        recipe = self.recipe
        options = tuple(sorted(recipe.options.items()))
        return (recipe.method, recipe.dtype, recipe.seed, options, *(id(checkpoint) for checkpoint in self.read))

    @cached_property
    def identities(self) -> tuple[str, ...]:
        """A text for each model that stands for its content, so that a random mask moves with its model."""
        return tuple(model.weights_digest for model in self.models)


@dataclass(frozen=True)
class MergeStep:
    """The merge of one tensor.

    Attributes:
        name: The tensor's name.
        destination: Memory to write it into; None for a new tensor.
        dtype: Dtype of the result.
        numbers: Its method parameters; None if it is copied.
        record: Everything that it is made from; destinations with equal records hold equal tensors.
    """

    name: str
    destination: Tensor | None
    dtype: torch.dtype
    numbers: Numbers | None
    record: tuple[Any, ...]

    @classmethod
    def of(cls, plan: MergePlan, name: str, destination: Tensor | None) -> MergeStep:
        """The step that merges the tensor ``name``."""
        recipe, stored = plan.recipe, plan.template.dtype(name)
        dtype = getattr(torch, recipe.dtype) if stored.is_floating_point else stored
        if plan.method is None or not dtype.is_floating_point or is_buffer(name) or name in plan.copied:
            return cls(name, destination, dtype, None, (name, PASSTHROUGH, recipe.dtype, id(plan.template)))
        place = place_of(name, plan.template.layer_stack)
        shared, per_model = _parameters(plan.method, recipe, name, place)
        numbers = Numbers(shared, {p: tuple(values[i] for i in plan.used) for p, values in per_model.items()})
        return cls(name, destination, dtype, numbers, (name, plan.settings, numbers))


@dataclass(frozen=True)
class Numbers:
    """Method parameters of one tensor, shared ones and those with a value for each model that is used."""

    shared: dict[str, float]
    per_model: dict[str, tuple[float, ...]]


def _check_models(method: MergeMethod, recipe: Recipe) -> None:
    if method.base == "required" and recipe.base_model is None:
        raise MergeError(f"recipe: {method.name} must have a base_model, got none")
    least, greatest = method.n_models_for(recipe.base_model is not None)
    n_models = len([model for model in recipe.models if model != recipe.base_model or method.base != "required"])
    if n_models < least or (greatest is not None and n_models > greatest):
        rule = f"at least {least}" if greatest is None else f"{least} to {greatest}"
        raise MergeError(f"recipe: {method.name} must have {rule} models besides the base, got {n_models}")


def _parameters(
    method: MergeMethod, recipe: Recipe, name: str, place: Place
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    given: ParameterSet = recipe.parameters_for(name, place.role, place.layer)
    n_models = len(recipe.models)
    shared: dict[str, float] = {}
    per_model: dict[str, tuple[float, ...]] = {}
    for parameter in method.parameters:
        default = 1 / n_models if parameter.default is None else parameter.default
        if parameter.per_model:
            per_model[parameter.name] = given.per_model.get(parameter.name, (default,) * n_models)
        else:
            shared[parameter.name] = given.shared.get(parameter.name, default)
    return shared, per_model


def _no_function(inputs: MergeInput, out: Tensor) -> None:
    raise AssertionError("passthrough has no arithmetic")
