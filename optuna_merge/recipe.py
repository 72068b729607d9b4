"""A recipe: one fully decided merge, as plain data.

A recipe says which models are merged by which method with which numbers, for every layer. It knows nothing of
Optuna, of tensors or of files. Everything that happens after a trial's parameters are drawn (the merge, the
export, the mergekit file) is a function of the recipe and the checkpoints that it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna_merge.errors import RecipeError

Role = Literal["embedding", "layer", "head"]
Dtype = Literal["float32", "float16", "bfloat16"]

PASSTHROUGH = "passthrough"
"""The method of a recipe with one model and no arithmetic: how a source is scored as it stands."""

_WITH_ADAPTER = re.compile(r"(?P<model>.+?)\+(?P<adapter>/.+|[^/@+]+(?:/[^/@+]+)?@[^/@+]+)")


def split_reference(reference: str) -> tuple[str, str | None]:
    """A resolved model reference as model and adapter.

    Args:
        reference: An absolute path or ``org/name@commit``; or two of them, joined with ``+``.

    Returns:
        The reference and None, or both parts.
    """
    match = _WITH_ADAPTER.fullmatch(reference)
    return (reference, None) if match is None else (match["model"], match["adapter"])


@dataclass(frozen=True)
class ParameterSet:
    """The method parameters of the tensors that one filter selects within one layer group.

    Attributes:
        filter: A part of a tensor name that selects tensors (``"self_attn"``), or None for all that no
            earlier filter of the group selected.
        shared: Method parameter to its value, for parameters without a model axis (``t``, ``lambda``).
        per_model: Method parameter to one value for each model, in the order of ``Recipe.models``.
    """

    filter: str | None = None
    shared: Mapping[str, float] = field(default_factory=dict)
    per_model: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupRecipe:
    """The method parameters of one layer group.

    Attributes:
        name: As in the names of trial parameters, ``layers_00_07``, ``embedding`` or ``head``.
        layers: Half-open range of layer indices; ``(k, k)`` for a group without layers.
        roles: Which tensors outside the layers belong to the group, ``embedding`` or ``head``.
        parameter_sets: Tried in order; the last one has no filter.
    """

    name: str
    layers: tuple[int, int]
    roles: tuple[Role, ...]
    parameter_sets: tuple[ParameterSet, ...]


@dataclass(frozen=True)
class Recipe:
    """One fully decided merge.

    Attributes:
        method: A name in ``optuna_merge.methods.METHODS``, the import path of a user's method, or
            ``"passthrough"``.
        models: Resolved model references, in the order of the study file; the sources.
        base_model: Resolved reference of the common ancestor, if the method has one.
        n_layers: Number of layers of the models.
        groups: Together they cover every layer and both roles outside the layers exactly once.
        options: Switches and constants of the method that are no numbers of a search, such as ``normalize``.
        dtype: What every merged tensor is rounded to, once, from float32.
        tokenizer_source: ``base``, ``union`` or a model reference; None: all models have one vocabulary.
        seed: Seeds random masks.
    """

    method: str
    models: tuple[str, ...]
    base_model: str | None
    n_layers: int
    groups: tuple[GroupRecipe, ...]
    options: Mapping[str, bool | float | str] = field(default_factory=dict)
    dtype: Dtype = "float32"
    tokenizer_source: str | None = None
    seed: int = 0

    def group_for(self, role: Role, layer: int | None = None) -> GroupRecipe:
        """The group that decides over a tensor.

        Args:
            role: What the tensor is part of.
            layer: Index of its layer, in [0, ``n_layers``), if ``role`` is ``"layer"``.

        Raises:
            RecipeError: If no group covers it.
        """
        for group in self.groups:
            if role != "layer":
                if role in group.roles:
                    return group
            elif layer is not None and group.layers[0] <= layer < group.layers[1]:
                return group
        place = f"layer {layer}" if role == "layer" else role
        raise RecipeError(f"recipe: no layer group covers {place}; groups: {[g.name for g in self.groups]}")

    def parameters_for(self, name: str, role: Role, layer: int | None = None) -> ParameterSet:
        """The parameter set of the tensor ``name``: the first of its group whose filter occurs in it."""
        group = self.group_for(role, layer)
        for parameters in group.parameter_sets:
            if parameters.filter is None or parameters.filter in name:
                return parameters
        raise RecipeError(f"recipe: group {group.name} has no parameters for {name}; its last set must have no filter")

    @property
    def references(self) -> tuple[str, ...]:
        """Every checkpoint that the merge reads, the base first, each once."""
        base = () if self.base_model is None else (self.base_model,)
        return tuple(dict.fromkeys(base + self.models))

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal recipes, equal digests, on any machine."""
        canonical = json.dumps(self, default=vars, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """JSON text from which :meth:`from_json` makes an equal recipe, floats included to the last bit."""
        return json.dumps(self, default=vars, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what :meth:`to_json` wrote.

        Raises:
            RecipeError: If the text is no recipe.
        """
        try:
            return _from_dict(json.loads(text))
        except (ValueError, LookupError, TypeError, AttributeError) as exc:
            raise RecipeError(f"recipe: not readable ({exc!r}); it must be what Recipe.to_json wrote") from exc


def passthrough(model: str, *, n_layers: int, dtype: Dtype, tokenizer_source: str | None = None) -> Recipe:
    """The recipe that leaves one model as it is, apart from rounding to ``dtype``."""
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(),))
    return Recipe(PASSTHROUGH, (model,), None, n_layers, (group,), dtype=dtype, tokenizer_source=tokenizer_source)


def _from_dict(data: dict[str, Any]) -> Recipe:
    groups = tuple(
        GroupRecipe(
            name=group["name"],
            layers=(group["layers"][0], group["layers"][1]),
            roles=tuple(group["roles"]),
            parameter_sets=tuple(
                ParameterSet(
                    filter=parameters["filter"],
                    shared=parameters["shared"],
                    per_model={name: tuple(values) for name, values in parameters["per_model"].items()},
                )
                for parameters in group["parameter_sets"]
            ),
        )
        for group in data["groups"]
    )
    return Recipe(**{**data, "models": tuple(data["models"]), "groups": groups})


def layer_groups(n_layers: int, granularity: int) -> list[tuple[int, int]]:
    """Cut the layers into consecutive groups.

    Args:
        n_layers: Number of layers, at least 1.
        granularity: Layers in a group; 0 means all in one. The last group may be short.

    Returns:
        Half-open ranges that cover [0, ``n_layers``) in order.
    """
    step = granularity or n_layers
    return [(start, min(start + step, n_layers)) for start in range(0, n_layers, step)]


def group_name(layers: tuple[int, int], n_layers: int) -> str:
    """``layers_04_07`` for the half-open range (4, 8): inclusive, padded so that names sort by depth."""
    width = max(2, len(str(n_layers - 1)))
    return f"layers_{layers[0]:0{width}d}_{layers[1] - 1:0{width}d}"
