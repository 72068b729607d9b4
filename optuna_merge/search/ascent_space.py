"""The numbers that an ascent moves, and what they mean: trial parameters, or one number for each tensor and model.

Knows the search space and the names of tensors; knows neither gradients' origin nor how points climb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from optuna_merge.recipe import Recipe, RecipeNumber
from optuna_merge.search.ascent import Array
from optuna_merge.search.profile import Profile, TensorPlace
from optuna_merge.search.space import SearchSpace

_USUAL_WIDTH = 1.5
"""Width of the default range of weights: other parameters move in proportion to their own range."""


class AscentSpace:
    """Coordinates of an ascent.

    Only searched parameters in which the method is smooth move (``SearchSpace.smooth``); all others stay as in the
    uniform merge, or as warm start and study file say.

    Args:
        space: The search space.
        places: The tensors that are merged.
        profile: ``tensor``: a coordinate for each number of each tensor; ``group``: the trial parameters.

    Attributes:
        low, high: Bounds of the coordinates, ``[n]``.
        scale: What counts as one unit of weight in each coordinate, ``[n]``.
    """

    def __init__(self, space: SearchSpace, places: Sequence[TensorPlace], profile: Literal["tensor", "group"]) -> None:
        self._space = space
        self._places = places
        self._has_profile = profile == "tensor"
        self._smooth = space.smooth
        models = range(len(space.labels))
        self._fine: list[tuple[TensorPlace, str, int | None]] = [
            (place, name, model)
            for place in places
            for name, parameter in self._smooth.items()
            for model in (models if parameter.per_model else (None,))
        ]
        self._names = [name for name in space.distributions if space.parameter_of(name) in self._smooth]
        self._matrix = self._decoding()
        owners = [name for _, name, _ in self._fine] if self._has_profile else map(space.parameter_of, self._names)
        bounds = [(name, space.bounds[name]) for name in owners]
        self.low = np.array([bound.low for _, bound in bounds])
        self.high = np.array([bound.high for _, bound in bounds])
        self.scale = np.array([1.0 if name == "weight" else (b.high - b.low) / _USUAL_WIDTH for name, b in bounds])

    @property
    def n(self) -> int:
        """Number of coordinates."""
        return len(self.low)

    def point(self, params: Mapping[str, float]) -> Array:
        """Coordinates of a merge of the search space, ``[n]``."""
        if self._has_profile:
            return self._numbers_of(self._space.decode(params))
        return np.array([params[name] for name in self._names])

    def gradient(
        self, tensors: Mapping[str, Mapping[tuple[str, int | None], float]], numbers: Mapping[RecipeNumber, float]
    ) -> Array:
        """Derivatives by the coordinates, ``[n]``.

        Args:
            tensors: Tensor to the derivatives by its own numbers: method parameter, and index of the model or None.
            numbers: Derivatives by the numbers of the recipe, which several tensors share.
        """
        if self._has_profile:
            return np.array([tensors[place.name][name, model] for place, name, model in self._fine])
        found = self._space.pull_back(numbers)
        return np.array([found.get(name, 0.0) for name in self._names])  # a filter may select no tensor of a group

    def slope(self, gradient: Array) -> dict[str, float]:
        """Derivatives by the trial parameters that move.

        Args:
            gradient: Derivatives by the coordinates, ``[n]``.
        """
        by_parameter = self._matrix.T @ gradient if self._has_profile else gradient
        return dict(zip(self._names, by_parameter.tolist(), strict=True))

    def split(self, point: Array, others: Mapping[str, float]) -> tuple[dict[str, float], Profile | None]:
        """Trial parameters and profile that stand for a point.

        Args:
            point: Coordinates, ``[n]``.
            others: Trial parameters; those that do not move are taken from here.

        Returns:
            The parameters that are nearest to the point, which are means over layer groups, and the deviations from
            them; no profile if the coordinates are trial parameters.
        """
        if not self._has_profile:
            return {**others, **dict(zip(self._names, point.tolist(), strict=True))}, None
        nearest, *_ = np.linalg.lstsq(self._matrix, point, rcond=None)
        params = dict(others)
        for name, value, column in zip(self._names, nearest.tolist(), self._matrix.T, strict=True):
            if column.any():  # else it has no influence
                distribution = self._space.distributions[name]
                params[name] = min(max(value, distribution.low), distribution.high)
        deviations = (point - self._numbers_of(self._space.decode(params))).tolist()
        found: dict[TensorPlace, dict[str, tuple[float, ...]]] = {}
        for (place, name, _), deviation in zip(self._fine, deviations, strict=True):
            own = found.setdefault(place, {})
            own[name] = (*own.get(name, ()), deviation)
        return params, Profile(found)

    def _decoding(self) -> Array:
        """Derivatives of the tensors' numbers by the trial parameters, ``[n_fine, n_names]``; decoding is linear."""
        recipe = self._space.decode(self._space.uniform())
        column = {name: number for number, name in enumerate(self._names)}
        matrix = np.zeros((len(self._fine), len(self._names)))
        rows: dict[RecipeNumber, Array] = {}
        for index, (place, parameter, model) in enumerate(self._fine):
            group, part = recipe.group_for(place.role, place.layer).name, recipe.parameters_for(*place).filter
            number = RecipeNumber(group, part, parameter, model)
            if number not in rows:
                rows[number] = np.zeros(len(self._names))
                for name, share in self._space.pull_back({number: 1.0}).items():
                    rows[number][column[name]] = share
            matrix[index] = rows[number]
        return matrix

    def _numbers_of(self, recipe: Recipe) -> Array:
        sets = {place: recipe.parameters_for(*place) for place in self._places}
        return np.array(
            [
                sets[place].shared[name] if model is None else sets[place].per_model[name][model]
                for place, name, model in self._fine
            ]
        )
