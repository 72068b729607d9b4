from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoints.tensor_names import find_layer_stack, is_buffer, place_of
from optuna_merge.errors import RecipeError
from optuna_merge.merging.mergekit import KNOWN_ENDS, to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS
from optuna_merge.recipe import Dtype, GroupRecipe, ParameterSet, Recipe, Role, layer_groups, passthrough
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

N_LAYERS = 3
ARCHITECTURES: list[TinyArchitecture] = ["llama", "qwen2", "gemma", "gpt2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[str, str], tuple[str, ...]] = {}

    def make(architecture: TinyArchitecture, dtype: Dtype) -> tuple[str, ...]:
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}_{dtype}")
            tied = True if architecture == "qwen2" else None
            base, others = write_tiny_models(folder, 2, architecture, n_layers=N_LAYERS, dtype=dtype, tied=tied)
            made[architecture, dtype] = tuple(map(str, (base, *others)))
        return made[architecture, dtype]

    return make


def make_recipe(
    references: tuple[str, ...],
    method: str,
    weights: list[tuple[float, ...]],
    *,
    granularity: int = 2,
    filters: tuple[str, ...] = (),
    own_ends: bool = False,
    shared: dict[str, float] | None = None,
    **fields: Any,
) -> Recipe:
    """A recipe whose n-th parameter set has the n-th of ``weights``, counted round."""
    counter = iter(range(1000))

    def sets(filters_: tuple[str, ...]) -> tuple[ParameterSet, ...]:
        return tuple(
            ParameterSet(filter_, shared or {}, {"weight": weights[next(counter) % len(weights)]})
            for filter_ in (*filters_, None)
        )

    ranges = layer_groups(N_LAYERS, granularity)
    groups = []
    for number, layers in enumerate(ranges):
        roles: list[Role] = []
        if not own_ends:
            roles += ["embedding"] if number == 0 else []
            roles += ["head"] if number == len(ranges) - 1 else []
        groups.append(GroupRecipe(f"layers_{layers[0]:02d}_{layers[1] - 1:02d}", layers, tuple(roles), sets(filters)))
    if own_ends:
        groups.append(GroupRecipe("embedding", (0, 0), ("embedding",), sets(())))
        groups.append(GroupRecipe("head", (N_LAYERS, N_LAYERS), ("head",), sets(())))
    return Recipe(method, references[1:], references[0], N_LAYERS, tuple(groups), **fields)


def run_mergekit(text: str, folder: Path) -> dict[str, torch.Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder), MergeOptions(quiet=True))
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_by_mergekit(text: str) -> Any:
    from mergekit.config import MergeConfiguration

    return MergeConfiguration.model_validate(yaml.safe_load(text))


def parameter_by_mergekit(config: Any, tensor: str, layer: int, parameter: str, model: str | None = None) -> Any:
    """The value that mergekit finds for a tensor, in the slice of a layer; ``model``: whose value."""
    from mergekit.common import ModelReference
    from mergekit.config import ConfigReader, evaluate_setting

    (slice_,) = (s for s in config.slices if s.sources[0].layer_range[0] <= layer < s.sources[0].layer_range[1])
    reader = ConfigReader(config=config, t=0).for_out_slice(slice_)
    reference = None if model is None else ModelReference.model_validate(model)
    for settings in reader.parameter_sources(reference):
        if settings and parameter in settings:
            return evaluate_setting(tensor, settings[parameter], validate=lambda value: value)
    return None


def tensor_names() -> list[str]:
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    parts = ("self_attn.q", "mlp.up", "input_norm")
    return names + [f"model.layers.{layer}.{part}.weight" for layer in range(N_LAYERS) for part in parts]


def check_every_parameter(recipe: Recipe, text: str) -> None:
    """mergekit finds each tensor's parameters as the recipe has them, to the last bit."""
    config = read_by_mergekit(text)
    assert config.merge_method == recipe.method
    for name in tensor_names():
        place = place_of(name, "model.layers.")
        layer = {"embedding": 0, "head": N_LAYERS - 1}.get(place.role, place.layer)
        assert layer is not None
        given = recipe.parameters_for(name, place.role, place.layer)
        for parameter, values in given.per_model.items():
            found = [parameter_by_mergekit(config, name, layer, parameter, model) for model in recipe.models]
            assert found == list(values), (name, parameter)
        for parameter, value in given.shared.items():
            assert parameter_by_mergekit(config, name, layer, parameter) == value, (name, parameter)


def merge_both(recipe: Recipe, folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    merger = Merger.open(recipe.references)
    architecture = merger.template(recipe).config["architectures"][0]
    theirs = run_mergekit(to_mergekit(recipe, names=merger.names, architecture=architecture), folder / "theirs")
    ours = dict(merger.merge(recipe))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        yield name, tensor, theirs[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_mergekit_makes_the_same_float32_model(
    architecture: TinyArchitecture, method: str, models: Any, tmp_path: Path
) -> None:
    weights = [(0.3, 0.9), (1.2, -0.4), (0.5, 0.7)]
    for number, settings in enumerate([{}, {"own_ends": True, "filters": ("attn", "mlp")}, {"granularity": 0}]):
        recipe = make_recipe(models(architecture, "float32"), method, weights, **settings)  # type: ignore[arg-type]
        (tmp_path / str(number)).mkdir()
        for name, ours, theirs in merge_both(recipe, tmp_path / str(number)):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_mergekit_rounds_to_the_same_bfloat16(
    architecture: TinyArchitecture, method: str, models: Any, tmp_path: Path
) -> None:
    recipe = make_recipe(models(architecture, "bfloat16"), method, [(0.31, 0.87), (1.2, -0.4)], dtype="bfloat16")
    pairs = [(ours, theirs) for _, ours, theirs in merge_both(recipe, tmp_path)]
    n_elements = sum(ours.numel() for ours, _ in pairs)
    steps = [(ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs() for ours, theirs in pairs]
    assert max(step.max().item() for step in steps) <= 1
    assert sum(step.count_nonzero().item() for step in steps) <= n_elements / 10_000


def test_mergekit_makes_the_same_experts(models: Any, tmp_path: Path) -> None:
    """mergekit merges the fused experts of transformers 5; we merge each expert as the checkpoint names it."""
    import shutil

    from transformers import AutoModelForCausalLM

    recipe = make_recipe(models("mixtral", "float32"), "task_arithmetic", [(0.3, 0.9), (1.2, -0.4)])
    merger = Merger.open(recipe.references)
    run_mergekit(to_mergekit(recipe), tmp_path / "theirs")
    shutil.copytree(recipe.models[0], tmp_path / "ours")
    save_file(dict(merger.merge(recipe)), tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


DETERMINISTIC = sorted(name for name, method in METHODS.items() if method.in_mergekit and not method.is_random)
BY_RANK = {"ties", "breadcrumbs", "breadcrumbs_ties", "sce"}
"""Of bfloat16 models, many differences have the same magnitude: which of them mergekit keeps is its sort's accident."""
BY_NORM = {"karcher", "multislerp", "nuslerp", "slerp"}
SETTINGS: dict[str, dict[str, tuple[float, ...] | float]] = {
    "density": {"ties": (0.5, 0.2), "breadcrumbs": (0.5, 0.2), "breadcrumbs_ties": (0.5, 0.2)},
    "gamma": {"breadcrumbs": (0.1, 0.0), "breadcrumbs_ties": (0.1, 0.0)},
    "select_topk": {"sce": 0.3},
    "t": {"slerp": 0.3, "nearswap": 0.02},
}


def recipe_of_method(method: str, references: tuple[str, ...], *, with_base: bool, dtype: Dtype) -> Recipe:
    declared = METHODS[method]
    weights = [(0.3, 0.9), (1.2, -0.4)]
    recipe = make_recipe(references, method, weights, dtype=dtype)
    models = references[1:][:1] if method == "slerp" and with_base else references[1:][: declared.n_models[1]]
    groups = []
    for group in recipe.groups:
        (given,) = group.parameter_sets
        per_model: Any = given.per_model | {
            name: values[method] for name, values in SETTINGS.items() if method in values
        }
        sets = ParameterSet(
            None,
            {p.name: per_model[p.name] for p in declared.parameters if not p.per_model and p.name in per_model},
            {
                p.name: per_model[p.name][: len(models)]
                for p in declared.parameters
                if p.per_model and p.name in per_model
            },
        )
        groups.append(dataclasses.replace(group, parameter_sets=(sets,)))
    base = references[0] if with_base else None
    return dataclasses.replace(recipe, models=models, groups=tuple(groups), base_model=base)


@pytest.mark.parametrize(
    ("method", "with_base"),
    [
        (name, with_base)
        for name in DETERMINISTIC
        for with_base in (True, False)
        if METHODS[name].base == "optional" or with_base == (METHODS[name].base in ("required", "unused"))
    ],
)
def test_mergekit_makes_the_same_model_by_every_method(
    method: str, with_base: bool, models: Any, tmp_path: Path
) -> None:
    dtypes = ("float32",) if method in BY_RANK else ("float32", "bfloat16")
    for dtype in dtypes:
        recipe = recipe_of_method(method, models("llama", dtype), with_base=with_base, dtype=dtype)  # type: ignore[arg-type]
        (tmp_path / dtype).mkdir()
        differing = n_elements = 0
        for name, ours, theirs in merge_both(recipe, tmp_path / dtype):
            if dtype == "float32":
                size = theirs.abs().mean().item()
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * size, msg=lambda m, n=name: f"{n}: {m}")
            else:
                steps = (ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
                differing += int(steps.count_nonzero())
                n_elements += ours.numel()
        # mergekit's own float32 norms and means are further from the exact result than that of ours
        assert differing <= n_elements / (1_000 if method in BY_NORM else 10_000), differing


def test_normalize_and_lambda_reach_mergekit(models: Any, tmp_path: Path) -> None:
    references = models("llama", "float32")
    for number, recipe in enumerate(
        [
            make_recipe(references, "linear", [(0.3, 0.9)], options={"normalize": False}),
            make_recipe(
                references, "task_arithmetic", [(0.3, 0.9)], shared={"lambda": 0.5}, options={"normalize": True}
            ),
            make_recipe(references, "task_arithmetic", [(0.5, -0.5)], options={"normalize": True}),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        for _, ours, theirs in merge_both(recipe, tmp_path / str(number)):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_passthrough_copies_one_model(models: Any, tmp_path: Path) -> None:
    references = models("gpt2", "float32")
    recipe = passthrough(references[1], n_layers=N_LAYERS, dtype="bfloat16")
    for _, ours, theirs in merge_both(recipe, tmp_path):
        assert torch.equal(ours, theirs)


def test_the_base_among_the_models_is_listed_once(models: Any, tmp_path: Path) -> None:
    references = models("llama", "float32")
    recipe = make_recipe(references, "task_arithmetic", [(0.4, 0.8, 0.6)], options={"normalize": True})
    recipe = dataclasses.replace(recipe, models=references)
    for _, ours, theirs in merge_both(recipe, tmp_path):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_path_with_signs_that_mergekit_splits_at(tmp_path: Path) -> None:
    base, (model,) = write_tiny_models(tmp_path / "a@b+c", 1, n_layers=N_LAYERS)
    recipe = make_recipe((str(base), str(model)), "task_arithmetic", [(0.4,)], granularity=0)
    for _, ours, theirs in merge_both(recipe, tmp_path):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    config = read_by_mergekit(to_mergekit(recipe))
    assert {reference.model.path for reference in config.referenced_models()} == {str(base), str(model)}


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("/m+/a", "/m+/a"),
        ("o/m@c0+/a", "o/m@v1+/a"),
        ("/m+o/a@c1", "/m+o/a"),
        ("/m@2+/a+b", {"model": {"path": "/m@2"}, "lora": {"path": "/a+b"}}),
        ("o/m@c0+/a+b", {"model": "o/m@v1", "lora": {"path": "/a+b"}}),
    ],
)
def test_a_model_with_an_adapter(source: str, written: Any) -> None:
    from mergekit.common import ModelReference

    recipe = make_recipe(("/base", source), "task_arithmetic", [(0.5,)])
    text = to_mergekit(recipe, references={"o/m@c0": "o/m@v1", "o/a@c1": "o/a"})
    slices = yaml.safe_load(text)["slices"]
    assert slices[0]["sources"][0]["model"] == written
    read = ModelReference.model_validate(written)
    spelled = source.replace("c0", "v1").replace("@c1", "")
    assert f"{read.model}+{read.lora}" == spelled
    whole = read_by_mergekit(text).slices[0].sources[0].model
    assert f"{whole.model}+{whole.lora}" == spelled


def test_unknown_architecture_gives_the_head_its_own_values(models: Any, tmp_path: Path) -> None:
    """mergekit infers the layout of such a model and puts the head into the first slice."""
    import json
    import shutil

    references = []
    for number, path in enumerate(models("llama", "float32")):
        copy = tmp_path / f"copy_{number}"
        shutil.copytree(path, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"architectures": ["LikeLlamaForCausalLM"]}))
        references.append(str(copy))
    recipe = make_recipe(tuple(references), "task_arithmetic", [(0.3, 0.9), (1.2, -0.4)])
    for name, ours, theirs in merge_both(recipe, tmp_path):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_written_file_is_as_somebody_would_write_it() -> None:
    recipe = make_recipe(
        ("/models/base", "org/a@0123", "org/b@4567"), "task_arithmetic", [(0.3, 0.9), (1.0, 1e-05)], dtype="bfloat16"
    )
    text = to_mergekit(
        recipe, references={"org/a@0123": "org/a", "org/b@4567": "org/b@v2"}, comment=["study 'x', trial 7", "", "0.5"]
    )
    assert text == (
        "# study 'x', trial 7\n#\n# 0.5\n"
        "merge_method: task_arithmetic\nbase_model: /models/base\ndtype: float32\nout_dtype: bfloat16\n"
        "slices:\n"
        "- sources:\n"
        "  - model: org/a\n    layer_range:\n    - 0\n    - 2\n    parameters:\n      weight: 0.3\n"
        "  - model: org/b@v2\n    layer_range:\n    - 0\n    - 2\n    parameters:\n      weight: 0.9\n"
        "  - model: /models/base\n    layer_range:\n    - 0\n    - 2\n"
        "- sources:\n"
        "  - model: org/a\n    layer_range:\n    - 2\n    - 3\n    parameters:\n      weight: 1.0\n"
        "  - model: org/b@v2\n    layer_range:\n    - 2\n    - 3\n    parameters:\n      weight: 1.0e-05\n"
        "  - model: /models/base\n    layer_range:\n    - 2\n    - 3\n"
    )


def test_equal_neighbours_become_one_slice() -> None:
    recipe = make_recipe(("/base", "/a", "/b"), "task_arithmetic", [(0.3, 0.9)], granularity=1)
    slices = yaml.safe_load(to_mergekit(recipe))["slices"]
    assert [source["layer_range"] for source in slices[0]["sources"]] == [[0, 3]] * 3
    assert len(slices) == 1


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("filters", [(), ("self_attn", "mlp")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mergekit_reads_what_was_written(method: str, filters: tuple[str, ...], dtype: Dtype) -> None:
    recipe = make_recipe(
        ("/base", "/a", "/b"),
        method,
        [(0.1 + 0.2, 1 / 3), (-1.5, 0.0), (1e-17, 2.0), (0.7, 0.8)],
        granularity=2,
        filters=filters,
        dtype=dtype,
        options={"normalize": False},
    )
    text = to_mergekit(recipe, comment=["x"])
    check_every_parameter(recipe, text)
    config = read_by_mergekit(text)
    assert (config.out_dtype or config.dtype, config.parameters) == (dtype, {"normalize": False})


def test_mergekit_reads_passthrough_and_a_single_group() -> None:
    recipe = make_recipe(("/base", "/a"), "task_arithmetic", [(0.5,)], granularity=0)
    check_every_parameter(recipe, to_mergekit(recipe))
    single = passthrough("/a", n_layers=N_LAYERS, dtype="bfloat16")
    read = read_by_mergekit(to_mergekit(single))
    assert [str(source.model) for source in read.slices[0].sources] == ["/a"]
    assert (read.merge_method, read.dtype, read.base_model) == ("passthrough", "bfloat16", None)


def test_mergekit_reads_own_ends_for_every_tensor() -> None:
    recipe = make_recipe(
        ("/base", "/a"), "task_arithmetic", [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)], filters=("mlp",), own_ends=True
    )
    check_every_parameter(recipe, to_mergekit(recipe, names=tensor_names()))


@pytest.mark.parametrize(
    ("method", "with_base"),
    [
        (name, with_base)
        for name, method in sorted(METHODS.items())
        for with_base in (True, False)
        if name != "slerp" and (method.base == "optional" or with_base == (method.base in ("required", "unused")))
    ],
)
def test_mergekit_reads_the_parameters_of_every_method(method: str, with_base: bool) -> None:
    declared = METHODS[method]
    references = ("/base", "/a", "/b")
    models = references[1:][: declared.n_models_for(with_base)[1]]
    applying = declared.parameters_for(with_base)
    groups = tuple(
        GroupRecipe(
            f"layers_{first:02d}",
            (first, last),
            ("embedding",) if first == 0 else ("head",),
            (
                ParameterSet(
                    None,
                    {p.name: 0.1 + first for p in applying if not p.per_model},
                    {p.name: tuple(0.2 + first + i for i in range(len(models))) for p in applying if p.per_model},
                ),
            ),
        )
        for first, last in ((0, 1), (1, 3))
    )
    options = {name: not default for name, default in declared.switches}
    recipe = Recipe(method, models, "/base" if with_base else None, N_LAYERS, groups, options, "bfloat16", seed=1)
    text = to_mergekit(recipe)
    check_every_parameter(recipe, text)
    config = read_by_mergekit(text)
    assert (config.parameters or {}) == options
    assert (config.dtype, config.out_dtype) == ("float32", "bfloat16")
    assert (None if config.base_model is None else str(config.base_model)) == recipe.base_model
    listed = [str(entry.model) for entry in config.slices[0].sources]
    assert listed == [*models, *(["/base"] if with_base and declared.base in ("required", "optional") else [])]


def test_mergekit_reads_slerp_with_and_without_a_base() -> None:
    """Without one it takes the two models of the highest weight, and the first of them as the base."""
    from optuna_merge.methods.choice import slerp_choice

    weights = (0.2, 0.9, 0.5)
    recipe = make_recipe(("/x", "/a", "/b", "/c"), "slerp", [weights], granularity=0)
    config = read_by_mergekit(to_mergekit(dataclasses.replace(recipe, base_model=None)))
    assert [str(entry.model) for entry in config.slices[0].sources] == ["/b", "/c"]
    assert str(config.slices[0].base_model) == "/b"
    assert parameter_by_mergekit(config, "lm_head.weight", 0, "t") == slerp_choice(weights)[1]

    group = GroupRecipe("all", (0, N_LAYERS), ("embedding", "head"), (ParameterSet(None, {"t": 0.3}),))
    recipe = Recipe("slerp", ("/a",), "/base", N_LAYERS, (group,))
    config = read_by_mergekit(to_mergekit(recipe))
    assert [str(entry.model) for entry in config.slices[0].sources] == ["/a", "/base"]
    check_every_parameter(recipe, to_mergekit(recipe))


def test_slerp_of_other_models_in_one_group_has_no_merge_file() -> None:
    recipe = make_recipe(("/x", "/a", "/b", "/c"), "slerp", [(0.2, 0.9, 0.5), (0.9, 0.2, 0.5)], filters=("mlp",))
    with pytest.raises(RecipeError, match=r"slerp must choose the same two models in all of group layers_00_01"):
        to_mergekit(dataclasses.replace(recipe, base_model=None))


@pytest.mark.parametrize(("source", "read"), [("base", "base"), ("union", "union"), ("o/m@c0", "o/m@v1")])
def test_mergekit_reads_the_tokenizer_source(source: str, read: str) -> None:
    recipe = make_recipe(("/base", "o/m@c0"), "task_arithmetic", [(0.5,)], tokenizer_source=source)
    config = read_by_mergekit(to_mergekit(recipe, references={"o/m@c0": "o/m@v1"}))
    assert str(config.tokenizer_source) == read


def test_own_ends_need_names() -> None:
    recipe = make_recipe(("/base", "/a"), "task_arithmetic", [(0.1,), (0.2,), (0.3,), (0.4,)], own_ends=True)
    with pytest.raises(RecipeError, match=r"a layer group of its own for the embedding .* give names"):
        to_mergekit(recipe)
    names = ["emb.weight", "norm.weight", *(f"layers.{layer}.norm.weight" for layer in range(N_LAYERS))]
    with pytest.raises(RecipeError, match=r"cannot give norm.weight a value of its own: layers.2.norm.weight holds"):
        to_mergekit(recipe, names=names)


def test_ends_of_a_model_are_those_of_mergekits_own_definitions() -> None:
    """For every decoder that mergekit describes; KNOWN_ENDS names them."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    outdated = {"MixFormerSequentialForCausalLM", "JAISLMHeadModel", "LLaMaForCausalLM", "_AfmoePartialForCausalLM"}
    for architecture, definitions in sorted(NAME_TO_ARCH.items()):
        if not architecture.endswith(("CausalLM", "LMHeadModel")) or architecture in outdated:
            continue
        for definition in definitions:
            if list(definition.modules) != ["default"] or definition.expected_model_type == "mixformer-sequential":
                continue
            assert architecture in KNOWN_ENDS
            module = definition.modules["default"].architecture.definition
            templates = [weight.name for weight in module.layer_templates.weights]
            layers = [name.replace("${layer_index}", str(i)) for name in templates for i in range(2)]
            stack = find_layer_stack(layers, 2)
            assert {place_of(name, stack).layer for name in layers} == {0, 1}
            for role, weights in (("embedding", module.pre_weights), ("head", module.post_weights)):
                for weight in weights:
                    assert place_of(weight.name, stack).role == role, (architecture, weight.name)
                    assert not is_buffer(weight.name)
    assert set(NAME_TO_ARCH) >= KNOWN_ENDS
