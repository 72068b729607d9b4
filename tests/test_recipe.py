from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optuna_merge.errors import RecipeError
from optuna_merge.recipe import PASSTHROUGH, GroupRecipe, ParameterSet, Recipe, passthrough

RECIPE = Recipe(
    method="task_arithmetic",
    models=("org/a", "org/b"),
    base_model="org/base",
    n_layers=3,
    groups=(
        GroupRecipe(
            "layers_00_01",
            (0, 2),
            ("embedding",),
            (
                ParameterSet("self_attn", {"lambda": 1.0}, {"weight": (0.1, 0.2)}),
                ParameterSet("mlp", {"lambda": 0.5}, {"weight": (0.3, 0.4)}),
                ParameterSet(None, {"lambda": 0.25}, {"weight": (0.5, -0.6)}),
            ),
        ),
        GroupRecipe("layers_02_02", (2, 3), (), (ParameterSet(None, {"lambda": 1.0}, {"weight": (0.7, 0.8)}),)),
        GroupRecipe("norm_head", (3, 3), ("head",), (ParameterSet("norm"), ParameterSet())),
    ),
    options={"normalize": False, "seeded": "yes", "epsilon": 0.1},
    dtype="bfloat16",
    tokenizer_source="union",
    seed=9163,
)


def test_group_for() -> None:
    assert [RECIPE.group_for("layer", i).name for i in range(3)] == ["layers_00_01", "layers_00_01", "layers_02_02"]
    assert RECIPE.group_for("embedding").name == "layers_00_01"
    assert RECIPE.group_for("head").name == "norm_head"


@pytest.mark.parametrize(
    ("role", "layer", "place"), [("layer", 3, "layer 3"), ("layer", -1, "layer -1"), ("layer", None, "layer None")]
)
def test_a_layer_that_no_group_covers(role: Any, layer: int | None, place: str) -> None:
    message = rf"recipe: no layer group covers {place}; groups: \['layers_00_01', 'layers_02_02', 'norm_head'\]$"
    with pytest.raises(RecipeError, match=message):
        RECIPE.group_for(role, layer)


def test_a_role_that_no_group_covers() -> None:
    with pytest.raises(RecipeError, match=r"recipe: no layer group covers embedding; groups: \[\]$"):
        dataclasses.replace(RECIPE, groups=()).group_for("embedding")


def test_parameters_are_those_of_the_first_filter_that_occurs_in_the_name() -> None:
    def weight(name: str, layer: int) -> tuple[float, ...]:
        return RECIPE.parameters_for(name, "layer", layer).per_model["weight"]

    assert weight("model.layers.0.self_attn.q_proj.weight", 0) == (0.1, 0.2)
    assert weight("model.layers.1.mlp.up_proj.weight", 1) == (0.3, 0.4)
    assert weight("model.layers.1.input_layernorm.weight", 1) == (0.5, -0.6)
    assert weight("self_attn.mlp", 0) == (0.1, 0.2)
    assert weight("model.layers.2.mlp.up_proj.weight", 2) == (0.7, 0.8)
    assert RECIPE.parameters_for("model.embed_tokens.weight", "embedding").shared == {"lambda": 0.25}
    assert RECIPE.parameters_for("model.norm.weight", "head").filter == "norm"
    assert RECIPE.parameters_for("lm_head.weight", "head").filter is None


def test_a_tensor_that_no_filter_selects() -> None:
    group = GroupRecipe("all", (0, 1), (), (ParameterSet("mlp"),))
    recipe = dataclasses.replace(RECIPE, groups=(group,))
    message = r"recipe: group all has no parameters for x\.norm; its last set must have no filter$"
    with pytest.raises(RecipeError, match=message):
        recipe.parameters_for("x.norm", "layer", 0)


def test_references_are_each_named_once_the_base_first() -> None:
    assert RECIPE.references == ("org/base", "org/a", "org/b")
    assert dataclasses.replace(RECIPE, base_model="org/b").references == ("org/b", "org/a")
    assert dataclasses.replace(RECIPE, base_model=None).references == ("org/a", "org/b")


def test_json_round_trip() -> None:
    again = Recipe.from_json(RECIPE.to_json())
    assert again == RECIPE
    assert isinstance(again.groups[0].layers, tuple)
    assert isinstance(again.groups[0].parameter_sets[0].per_model["weight"], tuple)
    assert again.to_json() == RECIPE.to_json()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4), st.text(max_size=5))
@settings(max_examples=100, deadline=None)
def test_floats_survive_to_the_last_bit(values: list[float], name: str) -> None:
    group = GroupRecipe(
        "g", (0, 3), ("embedding", "head"), (ParameterSet(None, {name: values[0]}, {"w": tuple(values)}),)
    )
    recipe = dataclasses.replace(RECIPE, groups=(group,), tokenizer_source=name)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert repr(again) == repr(recipe)  # -0.0 equals 0.0
    assert again.digest() == recipe.digest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_json(bad: float) -> None:
    recipe = dataclasses.replace(RECIPE, options={"x": bad})
    for make in (recipe.to_json, recipe.digest):
        with pytest.raises(ValueError, match="not JSON compliant"):
            make()


def test_the_digest_changes_with_every_field() -> None:
    changes: dict[str, Any] = {
        "method": "linear",
        "models": ("org/b", "org/a"),
        "base_model": None,
        "n_layers": 4,
        "groups": RECIPE.groups[:2],
        "options": {**RECIPE.options, "normalize": True},
        "dtype": "float32",
        "tokenizer_source": None,
        "seed": 0,
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(Recipe)}
    digests = [dataclasses.replace(RECIPE, **{name: value}).digest() for name, value in changes.items()]
    assert len({RECIPE.digest(), *digests}) == len(changes) + 1
    swapped = dataclasses.replace(RECIPE, options=dict(reversed(list(RECIPE.options.items()))))
    assert swapped.digest() == RECIPE.digest()
    assert len(RECIPE.digest()) == 64


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "import sys; from optuna_merge.recipe import Recipe; print(Recipe.from_json(sys.stdin.read()).digest())"
    output = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        input=RECIPE.to_json(),
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == RECIPE.digest()


def without(*path: Any) -> str:
    data = json.loads(RECIPE.to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        without("groups"),
        without("models"),
        without("method"),
        without("groups", 0, "layers"),
        without("groups", 0, "parameter_sets", 0, "per_model"),
        json.dumps({**json.loads(RECIPE.to_json()), "new": 1}),
        json.dumps({**json.loads(RECIPE.to_json()), "groups": [3]}),
        json.dumps({**json.loads(RECIPE.to_json()), "groups": [{"name": "x", "layers": [0]}]}),
    ],
)
def test_what_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: not readable \(.*\); it must be what Recipe.to_json wrote$"):
        Recipe.from_json(text)


def changed(*path: Any, value: Any) -> str:
    data = json.loads(RECIPE.to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("[]", "Input should be an object"),
        (without("method"), "method: Field required"),
        (without("seed"), "a key is missing"),
        (without("groups", 0, "parameter_sets", 0, "shared"), "a key is missing"),
        (changed("new", value=1), "new: Unexpected keyword argument"),
        (changed("n_layers", value="3"), "n_layers: Input should be a valid integer"),
        (changed("dtype", value="int8"), "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        (changed("groups", 0, "layers", value=[0, 1, 2]), "groups.0.layers: "),
        (changed("groups", 0, "roles", value=["tail"]), "groups.0.roles.0: "),
        (changed("groups", 0, "parameter_sets", 0, "shared", "lambda", value="1"), "groups.0.parameter_sets.0.shared."),
    ],
)
def test_the_message_says_what_is_wrong(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(text)
    message = str(caught.value)
    assert message.startswith(f"recipe: not readable ({problem}")
    assert "\n" not in message


def test_types_of_options_survive() -> None:
    options = {"a": True, "b": 1, "c": 1.0, "d": "1", "e": -0.0, "f": 10**20}
    group = GroupRecipe("all", (0, 3), ("embedding", "head"), (ParameterSet(None, {"x": 3}, {"y": (1, 2.0)}),))
    recipe = dataclasses.replace(RECIPE, options=options, groups=(group,))
    again = Recipe.from_json(recipe.to_json())
    assert repr(again) == repr(recipe)
    assert (again.to_json(), again.digest()) == (recipe.to_json(), recipe.digest())


def test_a_digest_that_was_recorded_stays() -> None:
    assert RECIPE.digest() == "53587289fba2a16240147d1da0de9507c310168ab50e7576e37e0c78cc35c0a5"
    assert (
        passthrough("org/a", n_layers=2, dtype="float16").digest()
        == "ed86bf04b832dc3c8a034c30dabafb0b8388f97d0b628ddfb72ff20050c7b846"
    )


def test_passthrough_covers_everything_with_one_model() -> None:
    recipe = passthrough("org/a", n_layers=2, dtype="float16", tokenizer_source="base")
    assert (recipe.method, recipe.models, recipe.base_model) == (PASSTHROUGH, ("org/a",), None)
    assert (recipe.dtype, recipe.tokenizer_source, recipe.references) == ("float16", "base", ("org/a",))
    for role, layer in (("embedding", None), ("head", None), ("layer", 0), ("layer", 1)):
        assert recipe.parameters_for("any.weight", role, layer) == ParameterSet()  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no layer group covers layer 2"):
        recipe.group_for("layer", 2)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPE.seed = 1  # type: ignore[misc]
