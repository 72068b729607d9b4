"""The search space: which parameters a study searches, how they are named, and the recipe that they decode to.

Knows the study file and the number of layers of the models; opens neither models nor storages, and loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
from optuna.distributions import FloatDistribution

from optuna_merge.config.search import IsotropicPrior, Range
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.duals import dual, slopes_of
from optuna_merge.errors import RecipeError
from optuna_merge.methods import MethodParameter
from optuna_merge.recipe import (
    Dtype,
    GroupRecipe,
    ParameterSet,
    Recipe,
    RecipeNumber,
    Role,
    group_name,
    layer_groups,
    passthrough,
)
from optuna_merge.search.profile import Bounds, Profile, refine

if TYPE_CHECKING:
    import optuna


UNIFORM_TOTALS = (1.0, 1.5, 2.0)
"""Sums of weights of the uniform merges that are scored before the search. In the best published merges of three models
the weights sum to about 2."""

AFTER_ASCENT_SIGMA = 0.03
"""First standard deviation of CMA-ES around the end of an ascent, in units of weight."""

_ISOTROPIC_SIGMA = 1 / 6
_GROUP = r"(?:layers_\d+_\d+|embedding|norm_head)\."
_METHOD = re.compile(rf"(?!{_GROUP}).*?\.(?={_GROUP})")
_OTHER_BASELINES = frozenset({"base", "uniform"})


@dataclass(frozen=True)
class ModelRefs:
    """The resolved references of a study's checkpoints, and what they have in common.

    Attributes:
        sources: References of the sources, in the order of the study file.
        base: Reference of the base model; None if there is none.
        n_layers: Number of layers of each model.
        dtype: Data type of the merged model.
        tokenizer_source: Reference of the model whose vocabulary the merged model gets; None: all models share one.
    """

    sources: tuple[str, ...]
    base: str | None
    n_layers: int
    dtype: Dtype
    tokenizer_source: str | None = None


@dataclass(frozen=True)
class Baseline:
    """A model that is scored before the search, so that the study shows what it has to beat.

    Attributes:
        name: ``uniform``, ``uniform x1.5``, ``base``, or a source's label.
        kind: ``uniform``: a merge with equal weights, a point of the search space; ``source`` and ``base``: a model
            by itself.
        params: The trial parameters of a uniform merge; empty otherwise.
        reference: The checkpoint of a source or the base.
    """

    name: str
    kind: Literal["uniform", "source", "base"]
    params: Mapping[str, float]
    reference: str | None = None


@dataclass(frozen=True)
class _Slot:
    """One number of the space: its model (None: all of them), its method parameter and its range."""

    model: int | None
    parameter: MethodParameter
    interval: Range


class SearchSpace:
    """The float parameters of a study's trials, and what they mean.

    Args:
        config: The study file.
        models: Its checkpoints.
        prefix: First part of every parameter's name, and part of the uniform merges' names: the method, if the study
            file is that of one method of a race; "" if there is one method alone.

    Attributes:
        prefix: As given.
        labels: Short, unique names of the sources, as used in parameter names.
        distributions: Parameter name to distribution, sorted by name, without constants.
    """

    def __init__(self, config: StudyConfig, models: ModelRefs, prefix: str = "") -> None:
        self.prefix = prefix
        self._config = config
        self._models = models
        self.labels = model_labels(config.sources)
        self._parameters = config.method.parameters_for(has_base=models.base is not None)
        self._step_groups = self._make_groups()
        self._slots = dict(sorted(self._make_slots().items()))
        self.distributions = {
            name: FloatDistribution(slot.interval.low, slot.interval.high)
            for name, slot in self._slots.items()
            if not slot.interval.is_constant
        }

    def suggest(self, trial: optuna.Trial, profile: Profile | None = None) -> Recipe:
        """Draw every parameter of a trial, in the order of their names, and decode them."""
        params = {
            name: trial.suggest_float(name, distribution.low, distribution.high)
            for name, distribution in self.distributions.items()
        }
        return self.decode(params, profile)

    def decode(self, params: Mapping[str, float], profile: Profile | None = None) -> Recipe:
        """The recipe of a trial.

        Args:
            params: ``trial.params``, with exactly the names of ``distributions``.
            profile: How far each tensor's numbers are from those of its layer group; None: not at all.

        Raises:
            RecipeError: If a name is missing or unknown.
        """
        if params.keys() != self.distributions.keys():
            missing = sorted(self.distributions.keys() - params.keys())
            unknown = sorted(params.keys() - self.distributions.keys())
            raise RecipeError(f"trial parameters must be those of the study file; missing {missing}, unknown {unknown}")
        # Optuna gives a number of numpy where it has clipped a draw to the upper end of its range.
        values = {name: float(params.get(name, slot.interval.low)) for name, slot in self._slots.items()}
        genome = self._config.genome
        options: dict[str, bool | float | str] = dict(self._config.method.switches)
        given = {"normalize": genome.normalize, "rescale": genome.rescale}
        options |= {switch: value for switch, value in given.items() if value is not None}
        recipe = Recipe(
            method=self._config.method.name,
            models=self._models.sources,
            base_model=self._models.base,
            n_layers=self._models.n_layers,
            groups=self._group_recipes(values),
            options=options,
            dtype=self._models.dtype,
            tokenizer_source=self._models.tokenizer_source,
            seed=self._config.study.seed,
        )
        return recipe if profile is None else replace(recipe, groups=refine(recipe, profile, self.bounds))

    @cached_property
    def bounds(self) -> dict[str, Bounds]:
        """Method parameter to its range, constants included."""
        intervals = {parameter.name: self._interval(parameter) for parameter in self._parameters}
        return {name: Bounds(interval.low, interval.high) for name, interval in intervals.items()}

    @cached_property
    def smooth(self) -> dict[str, MethodParameter]:
        """Name to method parameter, of those that are searched and in which the method is smooth."""
        searched = [parameter for parameter in self._parameters if not self._interval(parameter).is_constant]
        return {parameter.name: parameter for parameter in searched if parameter.is_smooth}

    def parameter_of(self, name: str) -> str:
        """The method parameter of a trial parameter."""
        return self._slots[name].parameter.name

    def pull_back(self, slopes: Mapping[RecipeNumber, float]) -> dict[str, float]:
        """Carry derivatives by the numbers of a recipe back to the trial parameters that it was decoded from.

        Args:
            slopes: Derivatives of a scalar by the numbers of a recipe from :meth:`decode`; others are left out.

        Returns:
            Derivatives of that scalar by the trial parameters, in the order of ``distributions``, without those that
            decide no number of ``slopes``, such as a density.
        """
        found: dict[str, float] = {}
        for number, name, share in self._shares:
            if number in slopes:
                found[name] = found.get(name, 0.0) + share * slopes[number]
        return {name: found[name] for name in self.distributions if name in found}

    @cached_property
    def _shares(self) -> tuple[tuple[RecipeNumber, str, float], ...]:
        """For each number of a recipe and each trial parameter in it: its derivative by that, the same everywhere."""
        values = {name: dual(0.0, name) if name in self.distributions else 0.0 for name in self._slots}
        numbers = (number for group in self._group_recipes(values) for number in _numbers_of(group))
        return tuple((key, str(name), share) for key, value in numbers for name, share in slopes_of(value).items())

    def uniform(self, total: float = 1.0) -> dict[str, float]:
        """Trial parameters of a uniform merge: the same weight for each model, everything else at its default.

        Args:
            total: Sum of the models' weights. Each weight is clipped to its range.
        """
        values: dict[str, float] = {}
        for name in self.distributions:
            slot = self._slots[name]
            value = slot.parameter.default
            if value is None:
                value = total / len(self.labels)
            elif slot.interval.start is not None:
                value = slot.interval.start
            values[name] = min(max(value, slot.interval.low), slot.interval.high)
        return values

    @cached_property
    def baselines(self) -> tuple[Baseline, ...]:
        """The baselines in the order in which they are scored: uniform merges, sources, base."""
        totals = UNIFORM_TOTALS[:1] if self._is_scale_free else UNIFORM_TOTALS
        result: list[Baseline] = []
        for total in totals:
            params = self.uniform(total)
            if all(params != baseline.params for baseline in result):
                name = "uniform" if total == 1 else f"uniform x{total:g}"
                name += f" ({self.prefix})" if self.prefix else ""
                result.append(Baseline(name, "uniform", params))
        result += [
            Baseline(label, "source", {}, reference)
            for label, reference in zip(self.labels, self._models.sources, strict=True)
        ]
        if self._models.base is not None:
            result.append(Baseline("base", "base", {}, self._models.base))
        return tuple(result)

    def baseline_recipe(self, name: str) -> Recipe:
        """The recipe of the baseline of that name."""
        for baseline in self.baselines:
            if baseline.name == name:
                if baseline.reference is None:
                    return self.decode(baseline.params)
                return passthrough(
                    baseline.reference,
                    n_layers=self._models.n_layers,
                    dtype=self._models.dtype,
                    tokenizer_source=self._models.tokenizer_source,
                )
        known = ", ".join(baseline.name for baseline in self.baselines)
        raise RecipeError(f"baseline must be one of the study's, got {name!r}; known: {known}")

    def start(self, uniform: Mapping[str, float], rng: np.random.Generator) -> dict[str, float]:
        """The point where the search begins, in the parameters' units.

        Args:
            uniform: Parameters of the best uniform merge, used for parameters without a ``start`` in the study file.
            rng: Draws the point if the study file says ``random_init``.
        """
        if self._config.random_init:
            return {name: float(rng.uniform(d.low, d.high)) for name, d in self.distributions.items()}
        starts = {name: self._slots[name].interval.start for name in self.distributions}
        return {name: uniform[name] if start is None else start for name, start in starts.items()}

    def covariance(self, *, after_ascent: bool = False) -> np.ndarray:
        """First covariance of CMA-ES, with every range mapped to [0, 1].

        Args:
            after_ascent: Whether an ascent has found the start: parameters that it moves are then independent, with
                :data:`AFTER_ASCENT_SIGMA` as standard deviation.

        Returns:
            Shape ``[n_dimensions, n_dimensions]``, in the order of ``distributions``, positive definite. With the
            structured prior, weights share a common part and a part for each model (``search.prior``); any other
            parameter is independent, with a sixth of its range as standard deviation. With the isotropic prior or
            ``sampler.sigma0`` all are independent, with a sixth or that fraction of their range.
        """
        slots = [self._slots[name] for name in self.distributions]
        width = np.array([slot.interval.high - slot.interval.low for slot in slots])
        if after_ascent:
            moved = np.array([slot.parameter.name in self.smooth for slot in slots])
            return np.diag(np.where(moved, AFTER_ASCENT_SIGMA / width, _ISOTROPIC_SIGMA) ** 2)
        sigma0, prior = self._config.study.cmaes.sigma0, self._config.search.prior
        if sigma0 is not None or isinstance(prior, IsotropicPrior):
            return np.eye(len(slots)) * (sigma0 or _ISOTROPIC_SIGMA) ** 2
        is_weight = np.array([slot.parameter.name == "weight" for slot in slots])
        model = np.array([-1 if slot.model is None else slot.model for slot in slots])
        same_model = model[:, None] == model[None, :]
        covariance = prior.common**2 + same_model * prior.model**2 + np.eye(len(slots)) * prior.weight**2
        covariance = covariance / np.outer(width, width)
        both = np.outer(is_weight, is_weight)
        result: np.ndarray = np.where(both, covariance, np.eye(len(slots)) * _ISOTROPIC_SIGMA**2)
        return result

    @property
    def _is_scale_free(self) -> bool:
        """Whether the method normalizes weights, so that multiplying all of them by one number changes nothing."""
        normalize = self._config.genome.normalize
        return dict(self._config.method.switches).get("normalize", True) if normalize is None else normalize

    def _make_groups(self) -> list[GroupRecipe]:
        """The layer groups without their values."""
        n_layers = self._models.n_layers
        ranges = layer_groups(n_layers, self._config.genome.layer_granularity)
        own = self._config.search.embed_group == "own"
        groups = []
        for index, layers in enumerate(ranges):
            roles: list[Role] = []
            if not own:
                roles += ["embedding"] if index == 0 else []
                roles += ["head"] if index == len(ranges) - 1 else []
            groups.append(GroupRecipe(group_name(layers, n_layers), layers, tuple(roles), ()))
        if own:
            # These names are in order of depth when a dashboard sorts them: embedding < layers_... < norm_head.
            groups.insert(0, GroupRecipe("embedding", (0, 0), ("embedding",), ()))
            groups.append(GroupRecipe("norm_head", (n_layers, n_layers), ("head",), ()))
        return groups

    def _make_slots(self) -> dict[str, _Slot]:
        slots = {}
        for group in self._step_groups:
            for parameter in self._parameters:
                interval = self._interval(parameter)
                models = range(len(self.labels)) if parameter.per_model else (None,)
                for model in models:
                    for tensor_filter in self._filters_of(group):
                        name = self._name(group, model, tensor_filter, parameter.name)
                        slots[name] = _Slot(model, parameter, interval)
        return slots

    def _filters_of(self, group: GroupRecipe) -> tuple[str | None, ...]:
        """The study file's filters, then None for all other tensors; outside the layers only None."""
        return (*self._config.genome.filters, None) if group.layers[0] < group.layers[1] else (None,)

    def _name(self, group: GroupRecipe, model: int | None, tensor_filter: str | None, parameter: str) -> str:
        """A parameter's name, such as ``layers_00_07.math.self_attn.weight``; sorts by depth, model, then filter."""
        parts = [self.prefix, group.name] if self.prefix else [group.name]
        if model is not None:
            parts.append(self.labels[model])
        if len(self._filters_of(group)) > 1:
            parts.append(tensor_filter or "rest")
        return ".".join([*parts, parameter])

    def _interval(self, parameter: MethodParameter) -> Range:
        given = self._config.search.ranges.get(parameter.name)
        if given is not None:
            return given
        if parameter.search is None:
            constant = 1 / len(self.labels) if parameter.default is None else parameter.default
            return Range(low=constant, high=constant)
        low, high = parameter.search
        if parameter.name == "weight" and self._config.genome.allow_negative_weights:
            low = -high / 2
        return Range(low=low, high=high)

    def _group_recipe(self, group: GroupRecipe, values: Mapping[str, float]) -> GroupRecipe:
        sets = []
        for tensor_filter in self._filters_of(group):
            shared: dict[str, float] = {}
            per_model: dict[str, tuple[float, ...]] = {}
            for parameter in self._parameters:
                if parameter.per_model:
                    per_model[parameter.name] = tuple(
                        values[self._name(group, model, tensor_filter, parameter.name)]
                        for model in range(len(self.labels))
                    )
                else:
                    shared[parameter.name] = values[self._name(group, None, tensor_filter, parameter.name)]
            sets.append(ParameterSet(tensor_filter, shared, per_model))
        return GroupRecipe(group.name, group.layers, group.roles, tuple(sets))

    def _group_recipes(self, values: Mapping[str, float]) -> tuple[GroupRecipe, ...]:
        """The groups of a recipe, from the value of each slot; linear in them."""
        groups = [self._group_recipe(group, values) for group in self._step_groups]
        return tuple(self._interpolate(groups) if self._config.genome.smooth else groups)

    def _interpolate(self, groups: list[GroupRecipe]) -> list[GroupRecipe]:
        """One group for each layer, with values interpolated between the layer groups, like a mergekit gradient."""
        knots = [group for group in groups if group.layers[0] < group.layers[1]]
        n_layers = self._models.n_layers
        result = [group for group in groups if group.name == "embedding"]
        for layer in range(n_layers):
            position = layer / (n_layers - 1) * (len(knots) - 1) if n_layers > 1 else 0.0
            left = min(int(position), len(knots) - 1)
            right = min(left + 1, len(knots) - 1)
            sets = tuple(
                _between(a, b, position - left)
                for a, b in zip(knots[left].parameter_sets, knots[right].parameter_sets, strict=True)
            )
            roles: list[Role] = []
            roles += [role for role in knots[0].roles if role == "embedding" and layer == 0]
            roles += [role for role in knots[-1].roles if role == "head" and layer == n_layers - 1]
            result.append(GroupRecipe(group_name((layer, layer + 1), n_layers), (layer, layer + 1), tuple(roles), sets))
        return result + [group for group in groups if group.name == "norm_head"]


def model_labels(references: tuple[str, ...]) -> tuple[str, ...]:
    """Short, unique names for models: the last part of each reference, or more parts if these are not unique.

    The last part of a model with an adapter is the adapter. No label is the name of another baseline.
    """
    paths = [reference.replace("\\", "/").replace("@", "_").replace("+", "/") for reference in references]
    parts = [PurePosixPath(path).parts or (".",) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(part.strip("/") for part in path[-length:]) for path in parts]
        if len(set(labels)) == len(labels) and _OTHER_BASELINES.isdisjoint(labels):
            return tuple(labels)
    return tuple(f"{path[-1]}_{index}" for index, path in enumerate(parts))


def split_parameter(name: str) -> tuple[str, str]:
    """Split a parameter's name into its layer group and the rest; a trailing ``.weight`` is left out of the rest.

    The method with which names begin in a race is left out, too.
    """
    method = _METHOD.match(name)
    group, _, rest = name[method.end() if method else 0 :].partition(".")
    return group, rest.removesuffix(".weight")


def _numbers_of(group: GroupRecipe) -> Iterator[tuple[RecipeNumber, float]]:
    for part in group.parameter_sets:
        for parameter, value in part.shared.items():
            yield RecipeNumber(group.name, part.filter, parameter, None), value
        for parameter, values in part.per_model.items():
            for model, value in enumerate(values):
                yield RecipeNumber(group.name, part.filter, parameter, model), value


def _between(left: ParameterSet, right: ParameterSet, fraction: float) -> ParameterSet:
    def mix(a: float, b: float) -> float:
        return (1 - fraction) * a + fraction * b

    return ParameterSet(
        left.filter,
        {name: mix(value, right.shared[name]) for name, value in left.shared.items()},
        {
            name: tuple(mix(a, b) for a, b in zip(values, right.per_model[name], strict=True))
            for name, values in left.per_model.items()
        },
    )
