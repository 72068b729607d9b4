"""A profile: how far the numbers of each tensor are from those of its layer group.

A search of hundreds of trials can move a few dozen numbers, the gradient can move a number for each tensor and model.
So a trial has one number for each layer group, and a study has one profile, which its trials share. Knows recipes;
knows nothing of how a profile is found, and of tensors no more than their names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe, Role, group_name


class TensorPlace(NamedTuple):
    """Where a tensor is in a model.

    Attributes:
        name: Its name in the checkpoints.
        role: The part of the model.
        layer: Its layer if the role is ``layer``.
    """

    name: str
    role: Role
    layer: int | None


class Bounds(NamedTuple):
    """The range of a method parameter."""

    low: float
    high: float


@dataclass(frozen=True)
class Profile:
    """Deviations of tensors' numbers from those of their layer groups.

    Attributes:
        deviations: Place of a tensor to method parameter to what is added to the group's number: one for each model, or
            one if the models share the parameter.
    """

    deviations: Mapping[TensorPlace, Mapping[str, tuple[float, ...]]]

    def to_json(self) -> str:
        """JSON from which :meth:`from_json` makes an equal profile, with floats equal to the last bit."""
        entries = [[*place, {name: list(own) for name, own in by.items()}] for place, by in self.deviations.items()]
        return json.dumps(entries, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Read what :meth:`to_json` wrote."""
        return cls(
            {
                TensorPlace(tensor, role, layer): {name: tuple(own) for name, own in by.items()}
                for tensor, role, layer, by in json.loads(text)
            }
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def refine(recipe: Recipe, profile: Profile, bounds: Mapping[str, Bounds]) -> tuple[GroupRecipe, ...]:
    """The layer groups of a recipe, cut into one for each layer with a parameter set for each of its tensors.

    Args:
        recipe: The merge, with numbers for layer groups.
        profile: What is added to them.
        bounds: Method parameter to its range, to which sums are clipped.

    Returns:
        Groups for the embedding, each layer, and final norm with head. The last parameter set of each has the numbers
        of the layer group.
    """
    by_group: dict[tuple[Role, int | None], list[TensorPlace]] = {}
    for place in profile.deviations:
        by_group.setdefault((place.role, place.layer), []).append(place)

    def group(name: str, layers: tuple[int, int], role: Role, layer: int | None = None) -> GroupRecipe:
        # A filter selects every name that it is part of: a longer name comes first.
        places = sorted(by_group.get((role, layer), ()), key=lambda place: (-len(place.name), place.name))
        own = recipe.group_for(role, layer)
        sets = [_moved(recipe, place, profile.deviations[place], bounds) for place in places]
        return GroupRecipe(name, layers, () if role == "layer" else (role,), (*sets, own.parameter_sets[-1]))

    n = recipe.n_layers
    return (
        group("embedding", (0, 0), "embedding"),
        *(group(group_name((i, i + 1), n), (i, i + 1), "layer", i) for i in range(n)),
        group("norm_head", (n, n), "head"),
    )


def _moved(
    recipe: Recipe, place: TensorPlace, deviations: Mapping[str, Sequence[float]], bounds: Mapping[str, Bounds]
) -> ParameterSet:
    coarse = recipe.parameters_for(*place)
    shared, per_model = dict(coarse.shared), dict(coarse.per_model)
    for name, added in deviations.items():
        low, high = bounds[name]
        if name in shared:
            shared[name] = min(max(shared[name] + added[0], low), high)
        else:
            sums = zip(per_model[name], added, strict=True)
            per_model[name] = tuple(min(max(own + more, low), high) for own, more in sums)
    return ParameterSet(place.name, shared, per_model)
