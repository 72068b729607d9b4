from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from optuna_merge.config.read import load_study
from optuna_merge.recipe import Recipe, RecipeNumber
from optuna_merge.search.ascent_space import AscentSpace
from optuna_merge.search.profile import Profile, TensorPlace
from optuna_merge.search.space import ModelRefs, SearchSpace

N_LAYERS = 5
PARTS = ("mlp.up_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.weight", "norm.weight")
PLACES = (
    TensorPlace("model.embed_tokens.weight", "embedding", None),
    *(TensorPlace(f"model.layers.{i}.{part}", "layer", i) for i in range(N_LAYERS) for part in PARTS),
    TensorPlace("model.norm.weight", "head", None),
    TensorPlace("lm_head.weight", "head", None),
)

GENOMES: dict[str, dict[str, Any]] = {
    "groups": {"genome": {"layer_granularity": 2}},
    "smooth": {"genome": {"layer_granularity": 2, "smooth": True}},
    "filters": {"genome": {"layer_granularity": 3, "filters": ["self_attn", "layers.1."]}},
    "ends": {"genome": {"layer_granularity": 0}, "search": {"embed_group": "own"}},
    "shared": {"genome": {"layer_granularity": 2}, "search": {"lambda": [0.5, 2]}},
    "half": {"genome": {"layer_granularity": 1, "merge_method": "ties"}, "search": {"density": [0.2, 0.8]}},
}


@pytest.fixture(params=GENOMES)
def space(request: pytest.FixtureRequest, tmp_path: Path) -> SearchSpace:
    changes = dict(GENOMES[request.param])
    models = {"models": ["org/math", "org/code"], "merge_method": "task_arithmetic", "base_model": "org/base"}
    data = {"tasks": ["letters"], **changes, "genome": {**models, **changes["genome"]}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data))
    return SearchSpace(load_study(path), ModelRefs(("math", "code"), "base", N_LAYERS, "float32"))


def numbers(space: SearchSpace, recipe: Recipe) -> np.ndarray:
    """The numbers that an ascent moves, tensor by tensor, as the merge would read them."""
    found: list[float] = []
    for place in PLACES:
        own = recipe.parameters_for(*place)
        for name, parameter in space.smooth.items():
            found += own.per_model[name] if parameter.per_model else [own.shared[name]]
    return np.array(found)


def test_a_point_of_single_tensors_is_the_recipe_that_its_parameters_and_profile_decode_to(space: SearchSpace) -> None:
    own = AscentSpace(space, PLACES, "tensor")
    rng = np.random.default_rng(0)
    point = rng.uniform(own.low, own.high)
    point[::7] = own.low[::7]
    params, profile = own.split(point, space.uniform())
    assert profile is not None
    recipe = space.decode(params, profile)
    assert numbers(space, recipe) == pytest.approx(point, abs=1e-14)
    assert (numbers(space, recipe) >= own.low).all()
    assert Recipe.from_json(recipe.to_json()) == recipe
    again = Profile.from_json(profile.to_json())
    assert again == profile
    assert again.digest == profile.digest
    assert space.decode(params, again) == recipe
    # moving trial parameters moves every tensor with its group, until it meets a bound
    moved = {name: value + 0.01 * (name in own._names) for name, value in params.items()}
    difference = numbers(space, space.decode(moved, profile)) - point
    inside = point < own.high - 0.01
    assert difference[inside] == pytest.approx(0.01, abs=1e-12)
    assert (numbers(space, space.decode(moved, profile)) <= own.high).all()
    # what no ascent moves stays the trial's
    assert [group.parameter_sets[-1] for group in recipe.groups][1] == space.decode(params).group_for(
        "layer", 0
    ).parameter_sets[-1]


def test_parameters_are_nearest_to_the_tensors_numbers(space: SearchSpace) -> None:
    """So they are means over the layer groups: what is left is orthogonal to all that parameters could change."""
    own = AscentSpace(space, PLACES, "tensor")
    point = np.random.default_rng(1).uniform(0.3, 0.7, own.n) * (own.high - own.low) + own.low
    params, _ = own.split(point, space.uniform())
    rest = point - numbers(space, space.decode(params))
    assert own._matrix.T @ rest == pytest.approx(np.zeros(own._matrix.shape[1]), abs=1e-12)


def test_gradients_by_trial_parameters_follow_from_those_by_numbers(space: SearchSpace) -> None:
    """Against central differences of a function of the tensors' numbers."""
    fine, coarse = AscentSpace(space, PLACES, "tensor"), AscentSpace(space, PLACES, "group")
    params = {name: 0.4 * d.low + 0.6 * d.high for name, d in space.distributions.items()}
    recipe = space.decode(params)
    slopes = np.random.default_rng(2).normal(size=fine.n)

    def value(changed: dict[str, float]) -> float:
        return float(np.sin(numbers(space, space.decode(changed))) @ slopes)

    by_number = np.cos(numbers(space, recipe)) * slopes
    tensors: dict[str, dict[tuple[str, int | None], float]] = {}
    shared: dict[RecipeNumber, float] = {}
    for (place, name, model), slope in zip(fine._fine, by_number.tolist(), strict=True):
        tensors.setdefault(place.name, {})[name, model] = slope
        group, own = recipe.group_for(place.role, place.layer), recipe.parameters_for(*place)
        number = RecipeNumber(group.name, own.filter, name, model)
        shared[number] = shared.get(number, 0.0) + slope
    np.testing.assert_array_equal(fine.gradient(tensors, shared), by_number)
    expected = [
        (value({**params, name: params[name] + 1e-5}) - value({**params, name: params[name] - 1e-5})) / 2e-5
        for name in coarse._names
    ]
    assert coarse.gradient(tensors, shared) == pytest.approx(expected, abs=1e-8)
    found, profile = coarse.split(coarse.point(params), space.uniform())
    assert profile is None
    assert found == {**space.uniform(), **{name: params[name] for name in coarse._names}}
