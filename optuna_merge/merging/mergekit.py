"""Recipes as mergekit's merge files: YAML from which ``mergekit-yaml`` makes the same model.

Knows how mergekit assigns parameters to tensors. Loads neither mergekit nor weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from optuna_merge.checkpoints.tensor_names import find_layer_stack, is_buffer, place_of
from optuna_merge.errors import RecipeError
from optuna_merge.methods import find_method
from optuna_merge.methods.choice import slerp_choice
from optuna_merge.recipe import PASSTHROUGH, GroupRecipe, ParameterSet, Recipe, Role, split_reference

KNOWN_ENDS = frozenset(
    """
    ApertusForCausalLM ArceeForCausalLM BaichuanForCausalLM Cohere2ForCausalLM CohereForCausalLM ExaoneForCausalLM
    FalconForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTNeoXForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM GraniteForCausalLM GraniteMoeHybridForCausalLM
    InternLM2ForCausalLM Lfm2ForCausalLM LlamaForCausalLM MambaForCausalLM MistralForCausalLM MixtralForCausalLM
    Olmo2ForCausalLM Phi3ForCausalLM Phi3SmallForCausalLM PhiForCausalLM QWenLMHeadModel Qwen2ForCausalLM
    Qwen3ForCausalLM Qwen3MoeForCausalLM SolarForCausalLM StableLmForCausalLM StableLMEpochForCausalLM
    Starcoder2ForCausalLM
    """.split()
)
"""Architectures whose embedding and head mergekit 0.1.5 tells apart. In others it gives the head to the first slice."""

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # writes a file of 50 layers in 5 ms instead of 80

_FilteredSets = Sequence[
    tuple[str | None, ParameterSet]
]  # (filter, parameters), in the order in which filters are tried


def to_mergekit(
    recipe: Recipe,
    *,
    names: Sequence[str] = (),
    architecture: str | None = None,
    whole: str | None = None,
    references: Mapping[str, str] | None = None,
    comment: Sequence[str] = (),
) -> str:
    """Write the merge file of a recipe, with one slice for each run of equal layer groups.

    Args:
        recipe: The merge.
        names: The checkpoint's tensor names. They are needed if the embedding or the head has a layer group of its
            own, or if mergekit does not know the architecture: those parameters are then written with filters.
        architecture: ``architectures[0]`` of the models' ``config.json``; None means one that mergekit knows.
        whole: The model that sees or hears, if language models are merged with it, which mergekit cannot do.
        references: Model reference of the recipe to its spelling in the file, model and adapter apart; references
            that are missing here are written as in the recipe.
        comment: Lines above the YAML, without ``#``.

    Returns:
        YAML. If mergekit cannot make the model, a comment above it says so: the file then only records the merge.

    Raises:
        RecipeError: If mergekit cannot express the recipe.
    """
    spell = _Speller(references or {})
    if (reason := why_not_mergekit(recipe, whole)) is not None:
        comment = [*comment, f"{reason}: optuna-merge export writes the model"]
    config: dict[str, Any] = {"merge_method": recipe.method}
    if recipe.base_model is not None:
        config["base_model"] = spell(recipe.base_model)
    if recipe.tokenizer_source is not None:
        config["tokenizer_source"] = spell(recipe.tokenizer_source)
    if recipe.method == PASSTHROUGH:
        config["dtype"] = recipe.dtype
    else:
        config["dtype"] = "float32"
        if recipe.dtype != "float32":
            config["out_dtype"] = recipe.dtype
    if recipe.options:
        config["parameters"] = dict(recipe.options)
    config["slices"] = _joined(_slices(recipe, _EndFilters(recipe, names, architecture), spell))
    lines = [f"# {line}".rstrip() for line in comment]
    return "\n".join([*lines, yaml.dump(config, Dumper=_DUMPER, sort_keys=False, width=120, allow_unicode=True)])


def why_not_mergekit(recipe: Recipe, whole: str | None = None) -> str | None:
    """Why mergekit cannot make the same model, in a few words; None if it can.

    Args:
        recipe: The merge.
        whole: As for :func:`to_mergekit`.
    """
    if recipe.method != PASSTHROUGH and not find_method(recipe.method).in_mergekit:
        return f"mergekit has no method {recipe.method}"
    return None if whole is None else "mergekit cannot merge language models with one that also sees or hears"


class _Speller:
    """Spells model references as mergekit reads them."""

    def __init__(self, references: Mapping[str, str]) -> None:
        self._references = references

    def __call__(self, reference: str) -> str | dict[str, Any]:
        model, adapter = (
            None if part is None else self._references.get(part, part) for part in split_reference(reference)
        )
        assert model is not None
        parts = [model] if adapter is None else [model, adapter]
        if not any(part.startswith("/") and ("@" in part or "+" in part) for part in parts):
            return "+".join(parts)
        # In a plain string, @ would start a revision and + an adapter.
        written: list[Any] = [{"path": part} if part.startswith("/") else part for part in parts]
        return dict(zip(("model", "lora"), written, strict=False))


class _EndFilters:
    """Filters for tensors outside the layers whose parameters differ from those of the slice that they belong to."""

    def __init__(self, recipe: Recipe, names: Sequence[str], architecture: str | None) -> None:
        self._recipe = recipe
        stack = find_layer_stack(names, recipe.n_layers) if names else ""
        places = [(name, place_of(name, stack)) for name in names if not is_buffer(name)]
        self._ends = [(name, place.role) for name, place in places if place.role != "layer"]
        self._layers = [(name, place.layer) for name, place in places if place.layer is not None]
        self._head_is_first = architecture is not None and architecture not in KNOWN_ENDS
        self._first, self._last = recipe.group_for("layer", 0), recipe.group_for("layer", recipe.n_layers - 1)

    def filters(self, *, first: bool, last: bool) -> _FilteredSets:
        """Tensor names and their parameters, to be written into the first slice, the last, or one that is both."""
        found: list[tuple[str, ParameterSet]] = []
        if first:
            found += self._of("embedding", self._first)
        if first and self._head_is_first:
            found += self._of("head", self._first)
        if last and not (first and self._head_is_first):
            found += self._of("head", self._last)
        for name, _ in found:
            self._check_unique(name, self._first if first else self._last)
        return found

    def _of(self, role: Role, neighbour: GroupRecipe) -> list[tuple[str, ParameterSet]]:
        if self._recipe.group_for(role) is neighbour:
            return []
        if not self._ends:
            raise RecipeError(
                f"recipe: a layer group of its own for the {role} must be written by tensor names; give names"
            )
        return [(name, self._recipe.parameters_for(name, role)) for name, its_role in self._ends if its_role == role]

    def _check_unique(self, name: str, group: GroupRecipe) -> None:
        for other, layer in self._layers:
            if layer is not None and group.layers[0] <= layer < group.layers[1] and name in other:
                raise RecipeError(
                    f"recipe: mergekit cannot give {name} a value of its own: {other} holds the same text"
                )


def _slices(recipe: Recipe, ends: _EndFilters, spell: _Speller) -> list[dict[str, Any]]:
    groups = [group for group in recipe.groups if group.layers[0] < group.layers[1]]
    make = _slerp_slice if recipe.method == "slerp" and recipe.base_model is None else _slice
    slices = []
    for position, group in enumerate(groups):
        own = [(parameters.filter, parameters) for parameters in group.parameter_sets]
        sets = [*ends.filters(first=position == 0, last=position == len(groups) - 1), *own]
        slices.append(make(recipe, group, sets, spell))
    return slices


def _slice(recipe: Recipe, group: GroupRecipe, sets: _FilteredSets, spell: _Speller) -> dict[str, Any]:
    stated = _StatedParameters.of(recipe)

    def per_model(name: str, default: float, index: int) -> Any:
        return _setting([(f, s.per_model[name][index] if name in s.per_model else default) for f, s in sets])

    entries = []
    for index, model in enumerate(recipe.models):
        if _is_plain_base(recipe, model):
            continue
        entry: dict[str, Any] = {"model": spell(model), "layer_range": list(group.layers)}
        if stated.per_model:
            entry["parameters"] = {name: per_model(name, default, index) for name, default in stated.per_model.items()}
        entries.append(entry)
    if _lists_base(recipe):
        assert recipe.base_model is not None
        entries.append({"model": spell(recipe.base_model), "layer_range": list(group.layers)})
    shared = {
        name: _setting([(f, s.shared.get(name, default)) for f, s in sets]) for name, default in stated.shared.items()
    }
    return {"sources": entries} | ({"parameters": shared} if shared else {})


def _slerp_slice(recipe: Recipe, group: GroupRecipe, sets: _FilteredSets, spell: _Speller) -> dict[str, Any]:
    """A slice with two models of its own: mergekit takes the first as base, and a position instead of weights."""
    choices = [(filter_, *slerp_choice(parameters.per_model["weight"])) for filter_, parameters in sets]
    if len({chosen for _, chosen, _ in choices}) > 1:
        raise RecipeError(f"recipe: slerp must choose the same two models in all of group {group.name} for mergekit")
    chosen = choices[0][1]
    return {
        "sources": [{"model": spell(recipe.models[i]), "layer_range": list(group.layers)} for i in chosen],
        "base_model": spell(recipe.models[chosen[0]]),
        "parameters": {"t": _setting([(filter_, t) for filter_, _, t in choices])},
    }


@dataclass(frozen=True)
class _StatedParameters:
    """The method parameters that a merge file states, each with its value where a parameter set leaves it out."""

    per_model: dict[str, float]
    shared: dict[str, float]

    @classmethod
    def of(cls, recipe: Recipe) -> _StatedParameters:
        if recipe.method == PASSTHROUGH:
            return cls({}, {})
        sets = [parameters for group in recipe.groups for parameters in group.parameter_sets]
        given = {name for parameters in sets for name in (*parameters.per_model, *parameters.shared)}
        applying = find_method(recipe.method).parameters_for(recipe.base_model is not None)
        # A default that depends on the number of models is always stated: mergekit has none.
        stated = [p for p in applying if p.name in given or p.default is None]
        defaults = [(p, 1 / len(recipe.models) if p.default is None else p.default) for p in stated]
        return cls(
            {p.name: default for p, default in defaults if p.per_model},
            {p.name: default for p, default in defaults if not p.per_model},
        )


def _lists_base(recipe: Recipe) -> bool:
    """Whether mergekit wants the base among the models of a slice."""
    if recipe.method == PASSTHROUGH or recipe.base_model is None:
        return False
    return find_method(recipe.method).base in ("required", "optional")


def _is_plain_base(recipe: Recipe, model: str) -> bool:
    """Whether a model is the base itself: its task vector is zero, and mergekit wants the base once."""
    return model == recipe.base_model and _lists_base(recipe)


def _setting(values: Sequence[tuple[str | None, float]]) -> Any:
    if len(values) == 1:
        return values[0][1]
    return [{"value": value} if filter_ is None else {"filter": filter_, "value": value} for filter_, value in values]


def _joined(slices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slices, with neighbours of equal parameters made one."""
    joined: list[dict[str, Any]] = []
    for current in slices:
        if joined and _without_range(joined[-1]) == _without_range(current):
            for before, now in zip(joined[-1]["sources"], current["sources"], strict=True):
                before["layer_range"] = [before["layer_range"][0], now["layer_range"][1]]
        else:
            joined.append(current)
    return joined


def _without_range(slice_: Mapping[str, Any]) -> Any:
    entries = [{key: value for key, value in entry.items() if key != "layer_range"} for entry in slice_["sources"]]
    return {**slice_, "sources": entries}
