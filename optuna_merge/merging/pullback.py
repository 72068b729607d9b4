"""From the gradient of a scalar by each merged tensor to its derivative by each number of the recipe.

Knows recipes and the merge; knows nothing of what the scalar is, of how its gradient is made, and of trials. Gradients
that come again and again are added up as far as a bounded memory goes, so that the models are read once; those of large
tensors are multiplied with the models at once. The arithmetic holds a few float32 pieces of bounded size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.duals import dual
from optuna_merge.errors import MergeError
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.plan import MergePlan, MergeStep, Numbers
from optuna_merge.merging.sizes import HELD_BYTES, SLOPE_ELEMENTS
from optuna_merge.methods import MethodParameter
from optuna_merge.methods.slope import Slope
from optuna_merge.recipe import Recipe, RecipeNumber

TensorNumber = tuple[str, int | None]
"""A method parameter of one tensor, and the index of its model in the recipe (None: it is shared by all)."""


@dataclass(frozen=True)
class MergeGradient:
    """The derivatives of a scalar by the numbers of a merge.

    Only parameters in which the method is smooth have one (``MethodParameter.is_smooth``). Thresholds, masks, elected
    signs and the choice of models are held fixed.

    Attributes:
        recipe: The merge.
        tensors: Tensor name to the derivatives by its own numbers, as if no other tensor shared them; in the order of
            the stream, without tensors that are copied. A tensor whose gradient was not given has zeros.
        numbers: The derivatives by the numbers of the recipe: sums over the tensors that share one.
    """

    recipe: Recipe
    tensors: Mapping[str, Mapping[TensorNumber, float]]
    numbers: Mapping[RecipeNumber, float]


class Pullback:
    """Takes the gradient by one merged tensor after another, in any order, and carries them back to the recipe.

    :meth:`add` waits for no device, so that a backward pass stays ahead of it.

    Args:
        merger: Merges the recipe.
        recipe: The merge whose gradients are given.

    Raises:
        MergeError: If the recipe does not fit the checkpoints.
        CheckpointError: If a file of weights was overwritten since it was opened.
    """

    def __init__(self, merger: Merger, recipe: Recipe) -> None:
        plan = MergePlan.make(recipe, merger.checkpoints)
        plan.refuse_overwritten()
        self._merger = merger
        self._plan = plan
        self._steps = {name: MergeStep.of(plan, name, None) for name in merger.names}
        method = plan.method
        self._smooth: tuple[MethodParameter, ...] = ()
        if method is not None:
            applied = method.parameters_for(has_base=plan.base is not None)
            self._smooth = tuple(parameter for parameter in applied if parameter.is_smooth)
        self._slopes: dict[str, list[Slope]] = {}
        self._held: dict[str, Tensor] = {}
        self._n_free = HELD_BYTES
        self._last: str | None = None

    def add(self, name: str, gradient: Tensor) -> None:
        """Take the gradient by a merged tensor; gradients of one tensor that are given again are added up.

        Args:
            name: The tensor's name in the stream of :meth:`.merger.Merger.merge`.
            gradient: Of the tensor's shape, of any floating dtype, on any device; it is handed over, nobody else may
                use it after the call.

        Raises:
            MergeError: If there is no such tensor, or it has another shape; and as :meth:`result`.
        """
        step = self._steps.get(name)
        if step is None:
            raise MergeError(f"{name}: a gradient must be of a merged tensor, got a name that the models do not have")
        shape = self._plan.template.shape(name)
        if tuple(gradient.shape) != tuple(shape):
            raise MergeError(f"{name}: gradient must have shape {list(shape)}, got {list(gradient.shape)}")
        if step.numbers is None or not self._smooth or not gradient.numel():
            return
        if name in self._held:
            self._held[name] += gradient
        elif (n_bytes := 4 * gradient.numel()) <= self._n_free:
            self._n_free -= n_bytes
            self._held[name] = gradient.detach().float()
        else:
            self._pull(name, step.numbers, gradient)

    def result(self) -> MergeGradient:
        """The derivatives by everything that was given; waits for the device.

        Raises:
            MergeError: If the method fails, or cannot be differentiated by a parameter that it declares smooth.
            CheckpointError: If a file of weights was overwritten since it was opened.
        """
        for name, step in self._steps.items():
            if name in self._held and step.numbers is not None:
                self._pull(name, step.numbers, self._held.pop(name))
        self._merger.end(self._plan)
        recipe, stack = self._plan.recipe, self._plan.template.layer_stack
        tensors: dict[str, dict[TensorNumber, float]] = {}
        numbers: dict[RecipeNumber, float] = {}
        for name, step in self._steps.items():
            if step.numbers is None:
                continue
            own = tensors[name] = self._zeros()
            for slope in self._slopes.get(name, ()):
                for key, value in slope.totals().items():
                    own[cast(TensorNumber, key)] += value
            place = place_of(name, stack)
            group = recipe.group_for(place.role, place.layer).name
            part = recipe.parameters_for(name, place.role, place.layer).filter
            for (parameter, model), value in own.items():
                number = RecipeNumber(group, part, parameter, model)
                numbers[number] = numbers.get(number, 0.0) + value
        return MergeGradient(recipe, tensors, numbers)

    def _pull(self, name: str, numbers: Numbers, gradient: Tensor) -> None:
        """Multiply a gradient with the models."""
        own = self._dual(numbers)
        tensors = self._merger.take(self._plan, name)
        if (following := self._expected_after(name)) is not None:
            self._merger.begin(self._plan, following)
        slope = self._merger.fitting(name, lambda: self._slope(name, gradient, own, tensors))
        self._slopes.setdefault(name, []).append(slope)

    def _zeros(self) -> dict[TensorNumber, float]:
        """0 for each number of a tensor, also of a base among the models, whose numbers have no influence."""
        models = range(len(self._plan.recipe.models))
        return {(p.name, model): 0.0 for p in self._smooth for model in (models if p.per_model else (None,))}

    def _expected_after(self, name: str) -> str | None:
        """The tensor whose gradient came after this one last time."""
        followers = self._merger.followers
        if self._last is not None:
            followers[self._last] = name
        self._last = name
        return followers.get(name)

    def _dual(self, numbers: Numbers) -> Numbers:
        """The same numbers, those of smooth parameters as dual numbers."""
        shared, per_model = dict(numbers.shared), dict(numbers.per_model)
        for parameter in (p.name for p in self._smooth):
            if parameter in shared:
                shared[parameter] = dual(shared[parameter], (parameter, None))
            else:
                values = zip(self._plan.used, per_model[parameter], strict=True)
                per_model[parameter] = tuple(dual(value, (parameter, model)) for model, value in values)
        return Numbers(shared, per_model)

    def _slope(self, name: str, gradient: Tensor, numbers: Numbers, tensors: list[Tensor]) -> Slope:
        slope = Slope(gradient, self._merger.device)
        inputs = self._merger.inputs(self._plan, name, numbers, tensors)
        n_elements = min(inputs.chunk_elements, SLOPE_ELEMENTS[inputs.device.type])
        inputs = dataclasses.replace(inputs, slope=slope, chunk_elements=n_elements, is_compiled=False)
        nowhere = torch.empty(gradient.shape, device="meta")  # a slope is collected, not written
        self._merger.run(self._plan, inputs, tensors, nowhere)
        slope.finish(name, self._plan.recipe.method)
        return slope
