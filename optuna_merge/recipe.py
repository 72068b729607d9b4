"""A recipe: one merge with every choice made, as plain data.

A recipe says which models are merged by which method with which numbers, for every layer. It knows nothing of
Optuna, tensors or files. Everything that follows once a trial's parameters are drawn (the merge, the export, the
mergekit file) is a function of the recipe and the checkpoints that it names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from optuna_merge.errors import RecipeError

Role = Literal["embedding", "layer", "head"]
Dtype = Literal["float32", "float16", "bfloat16"]
Number = int | float  # pydantic reads an int as a float where the type says float alone

PASSTHROUGH = "passthrough"
"""The method that copies one model, so that a source can be scored on its own."""

_STRICT = ConfigDict(extra="forbid", strict=True)  # types that read JSON refuse other keys and other types
_WITH_ADAPTER = re.compile(r"(?P<model>.+?)\+(?P<adapter>/.+|[^/@+]+(?:/[^/@+]+)?@[^/@+]+)")


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split a resolved model reference into model and adapter.

    Args:
        reference: An absolute path or ``org/name@commit``, or two of them joined with ``+``.

    Returns:
        Model and adapter; the adapter is None if there is none.
    """
    match = _WITH_ADAPTER.fullmatch(reference)
    return (reference, None) if match is None else (match["model"], match["adapter"])


@dataclass(frozen=True)
class ParameterSet:
    """Method parameters of the tensors that one filter selects in a layer group.

    Attributes:
        filter: Selects tensors whose name contains this text (``"self_attn"``); None selects all tensors that no
            earlier filter of the group selects.
        shared: Method parameter to its value, for parameters without a model axis (``t``, ``lambda``).
        per_model: Method parameter to one value for each model, in the order of ``Recipe.models``.
    """

    __pydantic_config__ = _STRICT

    filter: str | None = None
    shared: Mapping[str, Number] = field(default_factory=dict)
    per_model: Mapping[str, tuple[Number, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupRecipe:
    """Method parameters of one layer group.

    Attributes:
        name: As in the names of trial parameters: ``layers_00_07``, ``embedding`` or ``head``.
        layers: Half-open range of layer indices; ``(k, k)`` for a group without layers.
        roles: Which tensors outside the layers belong to the group, ``embedding`` or ``head``.
        parameter_sets: Tried in order; the last one has no filter.
    """

    __pydantic_config__ = _STRICT

    name: str
    layers: tuple[int, int]
    roles: tuple[Role, ...]
    parameter_sets: tuple[ParameterSet, ...]


class RecipeNumber(NamedTuple):
    """One number of a recipe.

    Attributes:
        group: Name of its layer group.
        filter: Filter of its parameter set.
        parameter: The method parameter.
        model: Index of its model in ``Recipe.models``; None if all models share the number.
    """

    group: str
    filter: str | None
    parameter: str
    model: int | None


@dataclass(frozen=True)
class Recipe:
    """One merge with every choice made.

    Attributes:
        method: A name in ``optuna_merge.methods.METHODS``, the import path of a user's method, or ``"passthrough"``.
        models: Resolved references of the sources, in the order of the study file.
        base_model: Resolved reference of the common ancestor; None if there is none.
        n_layers: Number of layers of each model.
        groups: Together they cover every layer, the embedding and the head exactly once.
        options: Switches and constants of the method that no search varies, such as ``normalize``.
        dtype: Dtype of the merged tensors, each rounded once from float32.
        tokenizer_source: ``base``, ``union`` or a model reference; None if all models have the same vocabulary.
        seed: Seed of random masks.
    """

    __pydantic_config__ = _STRICT

    method: str
    models: tuple[str, ...]
    base_model: str | None
    n_layers: int
    groups: tuple[GroupRecipe, ...]
    options: Mapping[str, bool | Number | str] = field(default_factory=dict)
    dtype: Dtype = "float32"
    tokenizer_source: str | None = None
    seed: int = 0

    def group_for(self, role: Role, layer: int | None = None) -> GroupRecipe:
        """Find the layer group of a tensor.

        Args:
            role: The part of the model that the tensor is in.
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
        """Find the parameter set of the tensor ``name``: the first of its group whose filter occurs in the name."""
        group = self.group_for(role, layer)
        for parameters in group.parameter_sets:
            if parameters.filter is None or parameters.filter in name:
                return parameters
        raise RecipeError(f"recipe: group {group.name} has no parameters for {name}; its last set must have no filter")

    @property
    def references(self) -> tuple[str, ...]:
        """Every checkpoint of the merge, the base first, each once."""
        base = () if self.base_model is None else (self.base_model,)
        return tuple(dict.fromkeys(base + self.models))

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON; equal recipes have equal digests on any machine."""
        canonical = json.dumps(self, default=vars, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """JSON from which :meth:`from_json` makes an equal recipe, with floats equal to the last bit."""
        return json.dumps(self, default=vars, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what :meth:`to_json` wrote.

        Raises:
            RecipeError: If the text is not a recipe.
        """
        try:
            recipe = _json_reader().validate_json(text)
        except ValidationError as exc:
            error = exc.errors()[0]
            problem = ": ".join(filter(None, [".".join(map(str, error["loc"])), error["msg"]]))
            raise _not_readable(problem) from exc
        if json.loads(recipe.to_json()) != json.loads(text):
            raise _not_readable("a key is missing")  # fields with a default are written too
        return recipe


def passthrough(model: str, *, n_layers: int, dtype: Dtype, tokenizer_source: str | None = None) -> Recipe:
    """The recipe that copies one model and rounds it to ``dtype``."""
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(),))
    return Recipe(PASSTHROUGH, (model,), None, n_layers, (group,), dtype=dtype, tokenizer_source=tokenizer_source)


def layer_groups(n_layers: int, granularity: int) -> list[tuple[int, int]]:
    """Cut the layers into consecutive groups.

    Args:
        n_layers: Number of layers, at least 1.
        granularity: Layers in a group; 0 puts all layers into one. The last group may be shorter.

    Returns:
        Half-open ranges that cover [0, ``n_layers``) in order.
    """
    step = granularity or n_layers
    return [(start, min(start + step, n_layers)) for start in range(0, n_layers, step)]


def group_name(layers: tuple[int, int], n_layers: int) -> str:
    """Name of a layer group: ``layers_04_07`` for the half-open range (4, 8), padded so that names sort by depth."""
    width = max(2, len(str(n_layers - 1)))
    return f"layers_{layers[0]:0{width}d}_{layers[1] - 1:0{width}d}"


@cache
def _json_reader() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _not_readable(problem: str) -> RecipeError:
    return RecipeError(f"recipe: not readable ({problem}); it must be what Recipe.to_json wrote")
