from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optuna_merge.config.read import load_study
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import RecipeError
from optuna_merge.recipe import PASSTHROUGH, ParameterSet, Recipe
from optuna_merge.search.build import best_uniform
from optuna_merge.search.space import ModelRefs, SearchSpace, model_labels
from optuna_merge.storage import attributes


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("studies")

    def make(n_layers: int = 5, **changes: Any) -> SearchSpace:
        genome = {"models": ["org/math", "org/code"], "merge_method": "task_arithmetic", "base_model": "org/base"}
        genome.update(changes.pop("genome", {}))
        path = folder / "study.yaml"
        path.write_text(yaml.safe_dump({"genome": genome, "tasks": ["letters"], **changes}))
        config = load_study(path)
        return SearchSpace(config, refs(config, n_layers))

    return make


def refs(config: StudyConfig, n_layers: int) -> ModelRefs:
    sources = tuple(f"/models/{reference}" for reference in config.sources)
    base = None if config.genome.base_model is None else f"/models/{config.genome.base_model}"
    return ModelRefs(sources, base, n_layers, "bfloat16", base if config.genome.tokenizer_source == "base" else None)


def bounds(space: SearchSpace) -> set[tuple[float, float]]:
    return {(d.low, d.high) for d in space.distributions.values()}


# --- names


def test_a_granularity_that_does_not_divide_the_depth(make: Any) -> None:
    space = make(5, genome={"layer_granularity": 2})
    assert list(space.distributions) == [
        "layers_00_01.code.weight",
        "layers_00_01.math.weight",
        "layers_02_03.code.weight",
        "layers_02_03.math.weight",
        "layers_04_04.code.weight",
        "layers_04_04.math.weight",
    ]
    assert space.labels == ("math", "code")
    assert bounds(space) == {(0.0, 1.5)}
    recipe = space.decode(space.uniform())
    assert [group.layers for group in recipe.groups] == [(0, 2), (2, 4), (4, 5)]
    assert [group.roles for group in recipe.groups] == [("embedding",), (), ("head",)]


def test_no_granularity_is_one_group_for_everything(make: Any) -> None:
    space = make(5)
    assert list(space.distributions) == ["layers_00_04.code.weight", "layers_00_04.math.weight"]
    (group,) = space.decode(space.uniform()).groups
    assert (group.layers, group.roles) == ((0, 5), ("embedding", "head"))


def test_each_filter_and_the_rest_have_their_own(make: Any) -> None:
    space = make(2, genome={"filters": ["self_attn", "mlp.up"]})
    assert list(space.distributions) == [
        "layers_00_01.code.mlp.up.weight",
        "layers_00_01.code.rest.weight",
        "layers_00_01.code.self_attn.weight",
        "layers_00_01.math.mlp.up.weight",
        "layers_00_01.math.rest.weight",
        "layers_00_01.math.self_attn.weight",
    ]
    params = {name: i / 10 for i, name in enumerate(space.distributions)}
    (group,) = space.decode(params).groups
    # Sets stand in the order of the file, models too.
    assert group.parameter_sets == (
        ParameterSet("self_attn", {"lambda": 1.0}, {"weight": (0.5, 0.2)}),
        ParameterSet("mlp.up", {"lambda": 1.0}, {"weight": (0.3, 0.0)}),
        ParameterSet(None, {"lambda": 1.0}, {"weight": (0.4, 0.1)}),
    )


def test_embeddings_and_head_as_groups_of_their_own(make: Any) -> None:
    space = make(3, genome={"layer_granularity": 2, "filters": ["mlp"]}, search={"embed_group": "own"})
    names = list(space.distributions)
    assert names == sorted(names)
    assert [name for name in names if ".math." in name] == [
        "embedding.math.weight",  # outside the layers there is nothing to filter
        "layers_00_01.math.mlp.weight",
        "layers_00_01.math.rest.weight",
        "layers_02_02.math.mlp.weight",
        "layers_02_02.math.rest.weight",
        "norm_head.math.weight",
    ]
    recipe = space.decode({name: float(name == "norm_head.math.weight") for name in names})
    assert recipe.parameters_for("lm_head.weight", "head").per_model == {"weight": (1.0, 0.0)}
    assert recipe.parameters_for("model.embed_tokens.weight", "embedding").per_model == {"weight": (0.0, 0.0)}
    assert [recipe.group_for("layer", i).name for i in range(3)] == ["layers_00_01", "layers_00_01", "layers_02_02"]


def test_names_sort_by_depth_beyond_a_hundred_layers(make: Any) -> None:
    space = make(126, genome={"layer_granularity": 9}, search={"embed_group": "own"})
    groups = list(dict.fromkeys(name.split(".")[0] for name in space.distributions))
    assert groups[:3] == ["embedding", "layers_000_008", "layers_009_017"]
    assert groups[-3:] == ["layers_108_116", "layers_117_125", "norm_head"]
    assert len(groups) == 16


def test_a_shared_parameter_has_no_model_in_its_name(make: Any) -> None:
    space = make(2, search={"lambda": [0.5, 2]})
    assert list(space.distributions) == [
        "layers_00_01.code.weight",
        "layers_00_01.lambda",
        "layers_00_01.math.weight",
    ]
    recipe = space.decode(dict.fromkeys(space.distributions, 0.75))
    assert recipe.groups[0].parameter_sets[0].shared == {"lambda": 0.75}


def test_a_constant_is_not_searched_but_is_in_the_recipe(make: Any) -> None:
    space = make(2, search={"weight": 0.4, "lambda": [0, 2]})
    assert list(space.distributions) == ["layers_00_01.lambda"]
    recipe = space.decode({"layers_00_01.lambda": 1.5})
    assert recipe.groups[0].parameter_sets == (ParameterSet(None, {"lambda": 1.5}, {"weight": (0.4, 0.4)}),)


def test_ranges(make: Any) -> None:
    assert bounds(make(genome={"allow_negative_weights": True})) == {(-0.75, 1.5)}
    assert bounds(make(genome={"allow_negative_weights": True}, search={"weight": [-0.1, 2]})) == {(-0.1, 2.0)}
    assert bounds(make(search={"weight": [0.1, 0.9]})) == {(0.1, 0.9)}


# --- labels


@pytest.mark.parametrize(
    ("references", "labels"),
    [
        (("org/math", "other/code-7b.v1"), ("math", "code-7b.v1")),
        (("a/model", "b/model"), ("a_model", "b_model")),
        (("x/a/model", "y/a/model"), ("x_a_model", "y_a_model")),
        (("/runs/a/", "../b"), ("a", "b")),
        (("org/m@v1", "org/m@v2"), ("m_v1", "m_v2")),
        (("one/m@v1", "two/m_v1"), ("one_m_v1", "two_m_v1")),  # alike once the @ is replaced
        (("m", "m/"), ("m_0", "m_1")),
        (("C:\\models\\math", "code"), ("math", "code")),
        ((".", "code"), (".", "code")),
        (("runs/base", "runs/code"), ("runs_base", "runs_code")),  # a baseline has that name
        (("uniform", "code"), ("uniform_0", "code_1")),
    ],
)
def test_labels(references: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert model_labels(references) == labels


@given(st.lists(st.text("ab/@_\\.:", min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_labels_are_unique_and_no_other_baseline_s(references: list[str]) -> None:
    labels = model_labels(tuple(references))
    assert len(set(labels)) == len(references)
    assert not {"base", "uniform"} & set(labels)


# --- decoding


def test_uniform_and_its_recipe(make: Any) -> None:
    space = make(4, genome={"models": ["m/a", "m/b", "m/c"], "layer_granularity": 2}, study={"seed": 7})
    assert set(space.uniform().values()) == {1 / 3}
    assert set(space.uniform(1.5).values()) == {0.5}
    assert set(space.uniform(9).values()) == {1.5}  # clipped to the range
    recipe = space.decode(space.uniform())
    assert recipe == Recipe(
        method="task_arithmetic",
        models=("/models/m/a", "/models/m/b", "/models/m/c"),
        base_model="/models/org/base",
        n_layers=4,
        groups=recipe.groups,
        options={"normalize": False},
        dtype="bfloat16",
        tokenizer_source=None,
        seed=7,
    )
    thirds = (1 / 3, 1 / 3, 1 / 3)
    assert [group.parameter_sets for group in recipe.groups] == [
        (ParameterSet(None, {"lambda": 1.0}, {"weight": thirds}),)
    ] * 2


def test_options_come_from_the_file(make: Any) -> None:
    space = make(genome={"normalize": True, "tokenizer_source": "base"})
    recipe = space.decode(space.uniform())
    assert (recipe.options, recipe.tokenizer_source) == ({"normalize": True}, "/models/org/base")


def test_every_parameter_reaches_its_own_tensors(make: Any) -> None:
    space = make(
        5,
        genome={"layer_granularity": 2, "filters": ["mlp"]},
        search={"embed_group": "own", "lambda": [0, 2]},
    )
    distinct = {name: (i + 1) / 100 for i, name in enumerate(space.distributions)}
    recipe = space.decode(distinct)
    found = {}
    for group in recipe.groups:
        for parameters in group.parameter_sets:
            part = [parameters.filter or "rest"] if len(group.parameter_sets) > 1 else []
            for index, label in enumerate(space.labels):
                name = ".".join([group.name, label, *part, "weight"])
                found[name] = parameters.per_model["weight"][index]
            found[".".join([group.name, *part, "lambda"])] = parameters.shared["lambda"]
    assert found == distinct


def test_the_recipe_survives_json_and_its_digest_follows_the_params(make: Any) -> None:
    space = make(5, genome={"layer_granularity": 2})
    params = dict(zip(space.distributions, np.random.default_rng(0).uniform(0, 1.5, 6).tolist(), strict=True))
    recipe = space.decode(params)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert space.decode(dict(reversed(params.items()))).digest() == recipe.digest()
    params["layers_04_04.math.weight"] += 1e-12
    assert space.decode(params).digest() != recipe.digest()


def test_wrong_names_are_refused(make: Any) -> None:
    space = make(2)
    with pytest.raises(
        RecipeError,
        match=r"trial parameters must be those of the study file;"
        r" missing \['layers_00_01.code.weight'\], unknown \['x'\]",
    ):
        space.decode({"layers_00_01.math.weight": 0.1, "x": 1.0})


def test_suggest_draws_every_parameter_in_sorted_order(make: Any) -> None:
    space = make(5, genome={"layer_granularity": 2}, search={"lambda": 0.5})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    recipe = space.suggest(trial)
    assert list(trial.params) == list(space.distributions)
    assert trial.distributions == space.distributions
    assert recipe == space.decode(trial.params)


# --- smooth


def test_smooth_interpolates_across_depth(make: Any) -> None:
    space = make(5, genome={"layer_granularity": 2, "smooth": True})  # three knots over layers 0 to 4
    params = dict.fromkeys(space.distributions, 0.0)
    params |= {"layers_00_01.math.weight": 0.2, "layers_02_03.math.weight": 1.0, "layers_04_04.math.weight": 0.4}
    recipe = space.decode(params)
    assert [group.name for group in recipe.groups] == [f"layers_0{i}_0{i}" for i in range(5)]
    weights = [group.parameter_sets[0].per_model["weight"] for group in recipe.groups]
    assert weights == [pytest.approx((w, 0.0)) for w in (0.2, 0.6, 1.0, 0.7, 0.4)]
    assert [group.parameter_sets[0].shared["lambda"] for group in recipe.groups] == [1.0] * 5
    assert [group.roles for group in recipe.groups] == [("embedding",), (), (), (), ("head",)]


def test_smooth_between_knots_that_do_not_meet_the_layers(make: Any) -> None:
    space = make(4, genome={"layer_granularity": 2, "smooth": True})  # two knots over layers 0 to 3
    params = {name: 0.3 if name.startswith("layers_00") else 1.2 for name in space.distributions}
    weights = [group.parameter_sets[0].per_model["weight"][0] for group in space.decode(params).groups]
    assert weights == pytest.approx([0.3, 0.6, 0.9, 1.2])


def test_smooth_keeps_filters_and_own_ends(make: Any) -> None:
    space = make(
        3,
        genome={"layer_granularity": 2, "smooth": True, "filters": ["mlp"]},
        search={"embed_group": "own"},
    )
    params = dict.fromkeys(space.distributions, 0.0)
    params |= {"embedding.math.weight": 0.9, "layers_00_01.math.mlp.weight": 1.0, "norm_head.code.weight": 0.8}
    recipe = space.decode(params)
    names = ["embedding", "layers_00_00", "layers_01_01", "layers_02_02", "norm_head"]
    assert [group.name for group in recipe.groups] == names
    assert recipe.group_for("embedding").parameter_sets[0].per_model == {"weight": (0.9, 0.0)}
    assert recipe.group_for("head").parameter_sets[0].per_model == {"weight": (0.0, 0.8)}
    mlp = [recipe.parameters_for("layers.x.mlp.up", "layer", i).per_model["weight"] for i in range(3)]
    assert mlp == [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0)]
    assert recipe.parameters_for("layers.1.self_attn", "layer", 1).per_model == {"weight": (0.0, 0.0)}


@pytest.mark.parametrize("n_layers", [1, 3])
def test_smooth_with_one_knot_is_constant(make: Any, n_layers: int) -> None:
    recipe = make(n_layers, genome={"smooth": True}).decode(
        {f"layers_00_0{n_layers - 1}.{label}.weight": 0.7 for label in ("math", "code")}
    )
    assert [group.parameter_sets[0].per_model["weight"] for group in recipe.groups] == [(0.7, 0.7)] * n_layers
    assert sorted(role for group in recipe.groups for role in group.roles) == ["embedding", "head"]


# --- baselines


def test_baselines(make: Any) -> None:
    space = make(2)
    assert [(b.name, b.kind, b.reference) for b in space.baselines] == [
        ("uniform", "uniform", None),
        ("uniform x1.5", "uniform", None),
        ("uniform x2", "uniform", None),
        ("math", "source", "/models/org/math"),
        ("code", "source", "/models/org/code"),
        ("base", "base", "/models/org/base"),
    ]
    assert [set(b.params.values()) for b in space.baselines[:3]] == [{0.5}, {0.75}, {1.0}]
    assert [b.params for b in space.baselines[3:]] == [{}] * 3


def test_where_only_relative_weights_matter_one_uniform_merge_is_enough(make: Any) -> None:
    linear = {"merge_method": "linear", "base_model": None}
    assert [b.name for b in make(genome=linear).baselines] == ["uniform", "math", "code"]
    assert [b.name for b in make(genome=linear | {"normalize": False}).baselines][:3] == [
        "uniform",
        "uniform x1.5",
        "uniform x2",
    ]
    assert make(genome={"normalize": True}).baselines[1].name == "math"


def test_equal_baselines_are_scored_once(make: Any) -> None:
    # 1.5 / 2 and 2 / 2 are both clipped to 0.6
    uniforms = [b for b in make(search={"weight": [0, 0.6]}).baselines if b.kind == "uniform"]
    assert [set(b.params.values()) for b in uniforms] == [{0.5}, {0.6}]
    assert [b.name for b in make(search={"weight": 0.4}).baselines] == ["uniform", "math", "code", "base"]


def test_recipes_of_baselines(make: Any) -> None:
    space = make(3, genome={"tokenizer_source": "base"})
    assert space.baseline_recipe("uniform x1.5") == space.decode(space.uniform(1.5))
    recipe = space.baseline_recipe("code")
    assert (recipe.method, recipe.models, recipe.base_model) == (PASSTHROUGH, ("/models/org/code",), None)
    assert (recipe.dtype, recipe.tokenizer_source, recipe.n_layers) == ("bfloat16", "/models/org/base", 3)
    assert space.baseline_recipe("base").models == ("/models/org/base",)
    with pytest.raises(RecipeError, match=r"baseline must be one of the study's, got 'x'; known: uniform, .*, base$"):
        space.baseline_recipe("x")


def test_a_source_called_base_is_told_from_the_base(make: Any) -> None:
    space = make(2, genome={"models": ["runs/base", "runs/code"]})
    assert [b.name for b in space.baselines][3:] == ["runs_base", "runs_code", "base"]
    assert space.baseline_recipe("runs_base").models == ("/models/runs/base",)
    assert space.baseline_recipe("base").models == ("/models/org/base",)


# --- where the search begins


def test_the_start_is_the_best_uniform_merge_unless_the_file_says_otherwise(make: Any) -> None:
    rng = np.random.default_rng(0)
    space = make(2, search={"lambda": [0.5, 2]})
    uniform = space.uniform(2.0)
    assert uniform == {
        "layers_00_01.code.weight": 1.0,
        "layers_00_01.lambda": 1.0,
        "layers_00_01.math.weight": 1.0,
    }
    assert space.start(uniform, rng) == uniform
    given_start = make(2, search={"weight": {"low": 0, "high": 2, "start": 0.3}, "lambda": [1.5, 2]})
    uniform = given_start.uniform(2.0)
    assert uniform["layers_00_01.lambda"] == 1.5  # the default, 1, clipped
    assert given_start.start(uniform, rng) == {
        "layers_00_01.code.weight": 0.3,
        "layers_00_01.lambda": 1.5,
        "layers_00_01.math.weight": 0.3,
    }
    assert make(2, search={"lambda": {"low": 0, "high": 2, "start": 0.7}}).uniform()["layers_00_01.lambda"] == 0.7


def test_a_uniform_merge_that_scored_zero_is_better_than_one_below(make: Any) -> None:
    """With negative weights every score may be 0 or below."""
    space, study = make(2), optuna.create_study(direction="maximize")
    assert best_uniform(study, space) == space.uniform()
    for scale, value in ((1.0, -0.25), (2.0, 0.0), (3.0, -0.5)):
        labels = {attributes.BASELINE: f"uniform x{scale:g}", attributes.BASELINE_KIND: "uniform"}
        study.add_trial(
            optuna.trial.create_trial(
                value=value, params=space.uniform(scale), distributions=space.distributions, user_attrs=labels
            )
        )
    assert best_uniform(study, space) == space.uniform(2.0)


def test_random_init_draws_the_start_from_the_given_generator(make: Any) -> None:
    space = make(5, genome={"layer_granularity": 1}, random_init=True, search={"weight": [0.2, 0.4]})
    first = space.start(space.uniform(), np.random.default_rng(1))
    assert first == space.start(space.uniform(), np.random.default_rng(1))
    assert first != space.start(space.uniform(), np.random.default_rng(2))
    assert len(set(first.values())) == 10
    assert all(0.2 <= value <= 0.4 for value in first.values())


# --- first covariance


def test_covariance_by_hand(make: Any) -> None:
    prior = {"common": 0.2, "model": 0.1, "weight": 0.3}
    space = make(2, search={"weight": [0, 2], "prior": prior})  # one weight for each of two models
    # (0.04 + 0.01 + 0.09) / 4 and 0.04 / 4
    np.testing.assert_allclose(space.covariance(), [[0.035, 0.01], [0.01, 0.035]], rtol=1e-12)
    one = make(2, genome={"models": ["m/a"], "layer_granularity": 1}, search={"weight": [0, 2], "prior": prior})
    # two weights of one model: (0.04 + 0.01) / 4 off the diagonal
    np.testing.assert_allclose(one.covariance(), [[0.035, 0.0125], [0.0125, 0.035]], rtol=1e-12)


def test_covariance_of_other_parameters_is_a_sixth_of_the_range(make: Any) -> None:
    space = make(2, search={"lambda": [0, 3]})
    assert [name.rpartition(".")[2] for name in space.distributions] == ["weight", "lambda", "weight"]
    covariance = space.covariance()
    np.testing.assert_allclose(covariance[1], [0, 1 / 36, 0])
    np.testing.assert_allclose(covariance[:, 1], [0, 1 / 36, 0])
    np.testing.assert_allclose(covariance[0, 2], 0.2**2 / 1.5**2)


def test_sigma0_replaces_the_prior(make: Any) -> None:
    space = make(2, study={"sampler": {"sigma0": 0.3}}, search={"lambda": [0, 2]})
    np.testing.assert_allclose(space.covariance(), np.eye(3) * 0.09)


@given(
    common=st.floats(0, 10),
    model=st.floats(0, 10),
    weight=st.floats(0.001, 10),
    granularity=st.integers(0, 5),
    high=st.floats(0.01, 100),
)
@settings(max_examples=40, deadline=None)
def test_covariance_is_positive_definite_over_all_that_a_file_may_say(
    make: Any, common: float, model: float, weight: float, granularity: int, high: float
) -> None:
    prior = {"common": common, "model": model, "weight": weight}
    space = make(
        6,
        genome={"layer_granularity": granularity, "models": ["m/a", "m/b", "m/c"]},
        search={"weight": [0, high], "lambda": [0, 1], "prior": prior},
    )
    covariance = space.covariance()
    assert covariance.shape == (len(space.distributions),) * 2
    np.testing.assert_array_equal(covariance, covariance.T)
    assert np.linalg.eigvalsh(covariance).min() > 0


def test_the_models_need_not_exist(make: Any) -> None:
    assert not Path("/models").exists()
    assert make(1).decode({"layers_00_00.code.weight": 0.0, "layers_00_00.math.weight": 0.0}).n_layers == 1
