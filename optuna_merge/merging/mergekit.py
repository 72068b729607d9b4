"""Recipes as mergekit's merge files, and back.

Writes a YAML from which ``mergekit-yaml`` makes the same model, and reads files of that kind. Knows how mergekit
assigns parameters to tensors; loads neither mergekit nor weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from optuna_merge.checkpoints.tensor_names import find_layer_stack, is_buffer, place_of
from optuna_merge.errors import MethodError, RecipeError
from optuna_merge.methods import MergeMethod, find_method
from optuna_merge.methods.choice import slerp_choice
from optuna_merge.recipe import PASSTHROUGH, Dtype, GroupRecipe, ParameterSet, Recipe, Role, group_name, split_reference

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
"""Architectures whose two ends mergekit 0.1.5 tells apart. Elsewhere it gives the head to the first slice."""

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # a file of 50 layers in 5 ms instead of 80

_Values = tuple[tuple[str | None, float], ...]  # (filter, value), in the order in which filters are tried


def to_mergekit(
    recipe: Recipe,
    *,
    names: Sequence[str] = (),
    architecture: str | None = None,
    references: Mapping[str, str] | None = None,
    comment: Sequence[str] = (),
) -> str:
    """The YAML of a merge, one slice for each run of equal layer groups.

    Args:
        recipe: What is merged.
        names: The checkpoint's tensor names. Needed where the embedding or the head has a layer group of its own, or
            where mergekit does not know the architecture: their parameters are then written as filters.
        architecture: ``architectures[0]`` of the models' ``config.json``; None: one that mergekit knows.
        references: Model reference of the recipe to how the file shall spell it, model and adapter apart; missing: as
            in the recipe.
        comment: Lines above the YAML, without ``#``.

    Raises:
        RecipeError: If mergekit cannot express the recipe.
    """
    if "." in recipe.method:
        raise RecipeError(f"recipe: mergekit has no method {recipe.method}; export the model itself instead")
    spell = _Speller(references or {})
    layer_groups = [group for group in recipe.groups if group.layers[0] < group.layers[1]]
    ends = _EndFilters(recipe, names, architecture)
    slices = []
    for position, group in enumerate(layer_groups):
        extra = ends.filters(first=position == 0, last=position == len(layer_groups) - 1)
        make = _slerp_slice if recipe.method == "slerp" and recipe.base_model is None else _slice
        slices.append(make(recipe, group, extra, spell))
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
    config["slices"] = _joined(slices)
    lines = [f"# {line}".rstrip() for line in comment]
    return "\n".join([*lines, yaml.dump(config, Dumper=_DUMPER, sort_keys=False, width=120, allow_unicode=True)])


def from_mergekit(text: str) -> Recipe:
    """Read a merge file of the kind that :func:`to_mergekit` writes.

    Parameters that were written as filters on the names of end tensors stay filters: the recipe then has other layer
    groups than the one that was written, and the same parameters for every tensor.

    Raises:
        RecipeError: If the file is of another kind; the message names the key.
    """
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise RecipeError(f"merge file: must be YAML, got {exc}") from exc
    if not isinstance(config, dict):
        raise RecipeError(f"merge file: must be a mapping, got {type(config).__name__}")
    _only_keys("merge file", config, _TOP_KEYS)
    method = _read_method(config.get("merge_method"))
    slices = _sequence(config.get("slices"), "slices")
    base = _reference(config.get("base_model"), "base_model", optional=True)
    models, groups, n_layers = _read_slices(slices, method, base)
    dtype: Any = config.get("out_dtype", config.get("dtype", "float32"))
    if dtype not in get_args(Dtype):
        raise RecipeError(f"merge file: out_dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    options = config.get("parameters") or {}
    if not isinstance(options, dict) or not all(isinstance(value, bool | int | float) for value in options.values()):
        raise RecipeError(f"merge file: parameters must be plain values, got {options!r}")
    return Recipe(
        method=PASSTHROUGH if method is None else method.name,
        models=models,
        base_model=base,
        n_layers=n_layers,
        groups=groups,
        options=options,
        dtype=dtype,
        tokenizer_source=_reference(config.get("tokenizer_source"), "tokenizer_source", optional=True),
    )


class _Speller:
    """Model references as mergekit reads them."""

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
        # in a plain string they would begin a revision or an adapter
        written: list[Any] = [{"path": part} if part.startswith("/") else part for part in parts]
        return dict(zip(("model", "lora"), written, strict=False))


class _EndFilters:
    """Which tensors outside the layers get parameters that the slices next to them would not give them."""

    def __init__(self, recipe: Recipe, names: Sequence[str], architecture: str | None) -> None:
        self._recipe = recipe
        stack = find_layer_stack(names, recipe.n_layers) if names else ""
        places = [(name, place_of(name, stack)) for name in names if not is_buffer(name)]
        self._ends = [(name, place.role) for name, place in places if place.role != "layer"]
        self._layers = [(name, place.layer) for name, place in places if place.layer is not None]
        self._head_is_first = architecture is not None and architecture not in KNOWN_ENDS
        self._first, self._last = recipe.group_for("layer", 0), recipe.group_for("layer", recipe.n_layers - 1)

    def filters(self, *, first: bool, last: bool) -> list[tuple[str, ParameterSet]]:
        """Tensor name and parameters to be written into the first slice, the last, or one that is both."""
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


def _slice(
    recipe: Recipe, group: GroupRecipe, ends: Sequence[tuple[str, ParameterSet]], spell: _Speller
) -> dict[str, Any]:
    sets = [*ends, *((parameters.filter, parameters) for parameters in group.parameter_sets)]
    written = _Written.of(recipe)

    def per_model(name: str, default: float, index: int) -> Any:
        values = [(filter_, s.per_model[name][index] if name in s.per_model else default) for filter_, s in sets]
        return _setting(values)

    sources = []
    for index, model in enumerate(recipe.models):
        if _is_plain_base(recipe, model):
            continue
        source: dict[str, Any] = {"model": spell(model), "layer_range": list(group.layers)}
        if written.per_model:
            source["parameters"] = {n: per_model(n, default, index) for n, default in written.per_model.items()}
        sources.append(source)
    if _needs_base_source(recipe):
        assert recipe.base_model is not None
        sources.append({"model": spell(recipe.base_model), "layer_range": list(group.layers)})
    shared = {
        name: _setting([(filter_, s.shared.get(name, default)) for filter_, s in sets])
        for name, default in written.shared.items()
    }
    return {"sources": sources} | ({"parameters": shared} if shared else {})


def _slerp_slice(
    recipe: Recipe, group: GroupRecipe, ends: Sequence[tuple[str, ParameterSet]], spell: _Speller
) -> dict[str, Any]:
    """A slice of its own two models: mergekit takes the first for the base, and a position instead of weights."""
    sets = [*ends, *((parameters.filter, parameters) for parameters in group.parameter_sets)]
    choices = [(filter_, *slerp_choice(parameters.per_model["weight"])) for filter_, parameters in sets]
    if len({chosen for _, chosen, _ in choices}) > 1:
        raise RecipeError(f"recipe: slerp must choose the same two models in all of group {group.name} for mergekit")
    chosen = choices[0][1]
    sources = [{"model": spell(recipe.models[index]), "layer_range": list(group.layers)} for index in chosen]
    return {
        "sources": sources,
        "base_model": spell(recipe.models[chosen[0]]),
        "parameters": {"t": _setting([(filter_, t) for filter_, _, t in choices])},
    }


@dataclass(frozen=True)
class _Written:
    """The method parameters that a merge file states, with what they are where a parameter set leaves them out."""

    per_model: dict[str, float]
    shared: dict[str, float]

    @classmethod
    def of(cls, recipe: Recipe) -> _Written:
        if recipe.method == PASSTHROUGH:
            return cls({}, {})
        sets = [parameters for group in recipe.groups for parameters in group.parameter_sets]
        given = {name for parameters in sets for name in (*parameters.per_model, *parameters.shared)}
        # mergekit has no default where ours depends on the number of models
        applying = [
            p for p in find_method(recipe.method).parameters if p.with_base in (None, recipe.base_model is not None)
        ]
        stated = [p for p in applying if p.name in given or p.default is None]
        defaults = [(p, 1 / len(recipe.models) if p.default is None else p.default) for p in stated]
        return cls(
            {p.name: default for p, default in defaults if p.per_model},
            {p.name: default for p, default in defaults if not p.per_model},
        )


def _needs_base_source(recipe: Recipe) -> bool:
    if recipe.method == PASSTHROUGH or recipe.base_model is None:
        return False
    return find_method(recipe.method).base in ("required", "optional")


def _is_plain_base(recipe: Recipe, model: str) -> bool:
    """Whether a source is the base of a method of task vectors, where it adds nothing and mergekit wants it once."""
    return model == recipe.base_model and _needs_base_source(recipe)


def _setting(values: Sequence[tuple[str | None, float]]) -> Any:
    if len(values) == 1:
        return values[0][1]
    return [{"value": value} if filter_ is None else {"filter": filter_, "value": value} for filter_, value in values]


def _joined(slices: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring slices with equal parameters, as one."""
    joined: list[dict[str, Any]] = []
    for current in slices:
        if joined and _without_range(joined[-1]) == _without_range(current):
            for before, now in zip(joined[-1]["sources"], current["sources"], strict=True):
                before["layer_range"] = [before["layer_range"][0], now["layer_range"][1]]
        else:
            joined.append(current)
    return joined


def _without_range(slice_: Mapping[str, Any]) -> Any:
    sources = [{key: value for key, value in source.items() if key != "layer_range"} for source in slice_["sources"]]
    return {**slice_, "sources": sources}


_TOP_KEYS = ("merge_method", "base_model", "tokenizer_source", "dtype", "out_dtype", "parameters", "slices")


def _only_keys(where: str, mapping: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := [key for key in mapping if key not in known]:
        raise RecipeError(f"{where}: keys must be among {', '.join(known)}, got {unknown[0]!r}")


def _read_method(name: Any) -> MergeMethod | None:
    if name == PASSTHROUGH:
        return None
    try:
        return find_method(str(name))
    except MethodError as exc:
        raise RecipeError(f"merge file: merge_method: {exc}") from exc


def _read_slices(
    slices: Sequence[Any], method: MergeMethod | None, base: str | None
) -> tuple[tuple[str, ...], tuple[GroupRecipe, ...], int]:
    keep_base = method is None or method.base not in ("required", "optional")
    models: tuple[str, ...] | None = None
    read: list[tuple[tuple[int, int], tuple[ParameterSet, ...]]] = []
    end = 0
    for number, current in enumerate(slices):
        where = f"slices[{number}]"
        _only_keys(where, _mapping(current, where), ("sources", "parameters"))
        sources = [_mapping(source, where) for source in _sequence(current.get("sources"), f"{where}.sources")]
        for source in sources:
            _only_keys(f"{where}.sources", source, ("model", "layer_range", "parameters"))
        ranges = {tuple(_sequence(source.get("layer_range"), f"{where}.layer_range")) for source in sources}
        if len(ranges) != 1:
            raise RecipeError(f"{where}: all sources must have one layer_range, got {sorted(ranges)}")
        start, stop = next(iter(ranges))
        if start != end or stop <= start:
            raise RecipeError(
                f"{where}: layer_range must begin at {end}, where the last one ended, got {[start, stop]}"
            )
        end = stop
        kept = [(name, s) for s in sources if (name := _reference(s["model"], where)) != base or keep_base]
        its_models = tuple(str(name) for name, _ in kept)
        if models not in (None, its_models):
            raise RecipeError(f"{where}: every slice must have the models of the first, got {list(its_models)}")
        models = its_models
        read.append(((start, stop), _read_sets(where, [s for _, s in kept], current.get("parameters") or {})))
    if models is None:
        raise RecipeError("merge file: slices must not be empty")
    groups = []
    for number, (layers, sets) in enumerate(read):
        roles: list[Role] = []
        if number == 0:
            roles.append("embedding")
        if number == len(read) - 1:
            roles.append("head")
        groups.append(GroupRecipe(group_name(layers, end), layers, tuple(roles), sets))
    return models, tuple(groups), end


def _read_sets(where: str, sources: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> tuple[ParameterSet, ...]:
    per_source = [
        {name: _read_setting(f"{where}.{name}", value) for name, value in (source.get("parameters") or {}).items()}
        for source in sources
    ]
    slice_wide = {name: _read_setting(f"{where}.{name}", value) for name, value in shared.items()}
    names = list(per_source[0]) if per_source else []
    if any(sorted(values) != sorted(names) for values in per_source):
        raise RecipeError(f"{where}: all sources must have the same parameters, got {[sorted(v) for v in per_source]}")
    settings = [*slice_wide.values(), *(value for values in per_source for value in values.values())]
    filters = {tuple(filter_ for filter_, _ in values) for values in settings}
    if len(filters) > 1:
        raise RecipeError(f"{where}: all parameters must have the same filters, got {sorted(map(str, filters))}")
    order: tuple[str | None, ...] = next(iter(filters), (None,))
    return tuple(
        ParameterSet(
            filter=filter_,
            shared={name: values[position][1] for name, values in slice_wide.items()},
            per_model={name: tuple(values[name][position][1] for values in per_source) for name in names},
        )
        for position, filter_ in enumerate(order)
    )


def _read_setting(where: str, setting: Any) -> _Values:
    if isinstance(setting, int | float) and not isinstance(setting, bool):
        return ((None, float(setting)),)
    entries = [_mapping(entry, where) for entry in _sequence(setting, where)]
    values: list[tuple[Any, Any]] = [(entry.get("filter"), entry.get("value")) for entry in entries]
    if not values or values[-1][0] is not None:
        raise RecipeError(f"{where}: the last value must have no filter, got {setting!r}")
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for _, value in values):
        raise RecipeError(f"{where}: must be numbers, gradients are not read, got {setting!r}")
    return tuple((filter_, float(value)) for filter_, value in values)


def _reference(value: Any, where: str, *, optional: bool = False) -> str | None:
    if value is None and optional:
        return None
    if isinstance(value, dict) and "model" in value and value.keys() <= {"model", "lora"}:
        parts = [part.get("path") if isinstance(part, dict) else part for part in value.values()]
        value = "+".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str):
        raise RecipeError(f"{where}: must be a model reference, got {value!r}")
    return value


def _sequence(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"{where}: must be a list, got {value!r}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: must be a mapping, got {value!r}")
    return value
