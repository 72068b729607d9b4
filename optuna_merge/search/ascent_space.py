"""The numbers that an ascent moves, and what they mean: trial parameters, or one number for each tensor and model.

Knows the search space and the names of tensors; knows neither gradients' origin nor how points climb.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from optuna_merge.recipe import Recipe
from optuna_merge.search.ascent import Array
from optuna_merge.search.profile import Profile, TensorPlace
from optuna_merge.search.space import SearchSpace

TensorNumber = tuple[str, int | None]
"""A method parameter of one tensor, and the index of its model (None: shared by all)."""

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

    def gradient(self, tensors: Mapping[str, Mapping[TensorNumber, float]]) -> Array:
        """Derivatives by the coordinates, ``[n]``.

        Args:
            tensors: Tensor to the derivatives by its own numbers; tensors that are missing have none.
        """
        fine = np.array([tensors.get(place.name, {}).get((name, model), 0.0) for place, name, model in self._fine])
        if self._has_profile:
            return fine
        coarse: Array = self._matrix.T @ fine
        return coarse

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
        for name, value in zip(self._names, nearest.tolist(), strict=True):
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
        lowest = self._space.uniform()
        for name in self._names:
            lowest[name] = self._space.distributions[name].low
        before = self._numbers_of(self._space.decode(lowest))
        columns = []
        for name in self._names:
            distribution = self._space.distributions[name]
            after = self._numbers_of(self._space.decode({**lowest, name: distribution.high}))
            columns.append((after - before) / (distribution.high - distribution.low))
        return np.array(columns).reshape(len(self._names), len(self._fine)).T

    def _numbers_of(self, recipe: Recipe) -> Array:
        sets = {place: recipe.parameters_for(*place) for place in self._places}
        return np.array(
            [
                sets[place].shared[name] if model is None else sets[place].per_model[name][model]
                for place, name, model in self._fine
            ]
        )
