"""Derivatives through the merge and the search space, against central differences of the merge itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optuna_merge.config.read import load_study
from optuna_merge.errors import MergeError
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.pullback import MergeGradient, Pullback
from optuna_merge.methods import METHODS
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

STEP = 0.02  # of a range


@functools.cache
def target(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def value(merged: Mapping[str, Tensor]) -> float:
    """A smooth scalar function of the merged tensors: linear and quadratic, with random coefficients."""
    total = 0.0
    for name, tensor in merged.items():
        wide = tensor.double()
        total += float((target(name, tuple(wide.shape)) * (wide + wide**2)).sum())
    return total


def gradient_of(merger: Merger, recipe: Recipe) -> MergeGradient:
    pullback = Pullback(merger, recipe)
    for name, tensor in reversed(list(merger.merge(recipe))):  # as a backward pass gives them
        wide = tensor.double()
        pullback.add(name, (target(name, tuple(wide.shape)) * (1 + 2 * wide)).float())
    return pullback.result()


def with_firm_signs(folder: Path) -> Path:
    """Models whose task vectors share one sign at each element, so that no election hangs on a weight."""
    base = load_file(folder / "base" / "model.safetensors")
    for path in sorted(folder.glob("model_*")):
        model = load_file(path / "model.safetensors")
        for name, tensor in model.items():
            sign = torch.where(target(f"sign of {name}", tuple(tensor.shape)) < 0, -1.0, 1.0)
            model[name] = base[name] + (tensor - base[name]).abs() * sign
        save_file(model, path / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def firm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("firm")
    write_tiny_models(folder, 2, spread=0.5)  # far apart: differences are then large beside float32's rounding
    return with_firm_signs(folder)


def check(study: Path, seed: int = 0, n_checked: int = 2) -> None:
    """Each trial parameter has the derivative that central differences of decoding and merging have."""
    config = load_study(study)
    models = StudyModels.open(config)
    space = SearchSpace(config, models.refs)
    merger = Merger(models.checkpoints, tokenizer_source=config.genome.tokenizer_source)
    rng = np.random.default_rng(seed)
    params = {
        name: float(rng.uniform(0.7 * d.low + 0.3 * d.high, 0.3 * d.low + 0.7 * d.high))
        for name, d in space.distributions.items()
    }
    recipe = space.decode(params)
    slopes = space.pull_back(gradient_of(merger, recipe).numbers)
    smooth = {p.name for p in config.method.parameters if p.is_smooth}
    assert list(slopes) == [name for name in space.distributions if name.rpartition(".")[2] in smooth]
    scale = max(map(abs, slopes.values()))
    for name in rng.permutation(list(slopes))[:n_checked]:
        step = STEP * (space.distributions[name].high - space.distributions[name].low)

        def at(offset: float, name: str = name, step: float = step) -> float:
            return value(dict(merger.merge(space.decode(params | {name: params[name] + offset * step}))))

        # Five points: the error of three in an arc is of the second order in the step.
        difference = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
        assert abs(slopes[name] - difference) < 1e-4 * max(abs(difference), 0.1 * scale), (name, slopes[name])


APART = ("nearswap", "consensus_ta", "consensus_ties", "ramplus_tl")  # their masks move, or need models of their own

CASES = [
    (name, with_base, normalize)
    for name, method in METHODS.items()
    if any(parameter.is_smooth for parameter in method.parameters) and name not in APART
    for with_base in ((True,) if method.base == "required" else (True, False))
    for normalize in ((False, True) if ("normalize", True) in method.switches or name == "task_arithmetic" else (None,))
]


@pytest.mark.parametrize(("method", "with_base", "normalize"), CASES)
def test_each_smooth_method(
    method: str, with_base: bool, normalize: bool | None, firm: Path, study_file: Callable[..., Path]
) -> None:
    n_models = METHODS[method].n_models_for(with_base)[1] or 2
    genome = {"models": [str(firm / f"model_{i}") for i in range(min(2, n_models))], "merge_method": method}
    genome |= {"layer_granularity": 2}
    genome |= {"base_model": str(firm / "base")} if with_base else {}
    genome |= {} if normalize is None else {"normalize": normalize}
    search = {"lambda": [0.5, 1.5]} if any(p.name == "lambda" for p in METHODS[method].parameters) else {}
    check(study_file(genome=genome, search=search))


def test_nearswap_while_no_element_reaches_the_model(firm: Path, study_file: Callable[..., Path]) -> None:
    """Elements that take the model's value have no slope; the others have one over the distance."""
    merger = Merger.open([str(firm / "base"), str(firm / "model_0")])
    genome = {"models": [str(firm / "model_0")], "merge_method": "nearswap", "base_model": str(firm / "base")}
    config = load_study(study_file(genome=genome, search={"t": [0.01, 0.05]}))
    space = SearchSpace(config, StudyModels.open(config).refs)
    (name,) = space.distributions
    recipe = space.decode({name: 0.03})
    base, model = (checkpoint for checkpoint in merger.checkpoints.values())
    expected = 0.0
    for tensor_name, merged in merger.merge(recipe):
        task_vector = model.get(tensor_name).double() - base.get(tensor_name).double()
        own = torch.where(task_vector.abs() > 0.03, task_vector.sign(), 0.0)
        wide = merged.double()
        expected += float((target(tensor_name, tuple(wide.shape)) * (1 + 2 * wide) * own).sum())
    slopes = space.pull_back(gradient_of(merger, recipe).numbers)
    assert slopes == {name: pytest.approx(expected, rel=1e-4)}


@pytest.mark.parametrize("share", [0.6, 0.2])
def test_ramplus_tl_on_either_side_of_its_bound(share: float, tmp_path: Path, study_file: Callable[..., Path]) -> None:
    """Entries that one model changes alone are scaled; with few that both change, the bound has no influence."""
    base, models = write_tiny_models(tmp_path, 2, spread=0.5)
    original = load_file(base / "model.safetensors")
    for number, path in enumerate(models):
        model = load_file(path / "model.safetensors")
        for name, tensor in model.items():
            noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(number))
            model[name] = torch.where(noise < share, tensor, original[name])
        save_file(model, path / "model.safetensors", metadata={"format": "pt"})
    genome = {"models": list(map(str, models)), "merge_method": "ramplus_tl", "base_model": str(base)}
    check(study_file(genome=genome | {"layer_granularity": 3}), n_checked=6)


@pytest.mark.parametrize("embed_group", ["shared", "own"])
def test_smooth_filters_and_negative_weights(embed_group: str, firm: Path, study_file: Callable[..., Path]) -> None:
    genome = {
        "models": [str(firm / "model_0"), str(firm / "model_1")],
        "merge_method": "task_arithmetic",
        "base_model": str(firm / "base"),
        "layer_granularity": 2,
        "smooth": True,
        "filters": ["self_attn", "mlp.up"],
        "allow_negative_weights": True,
    }
    check(study_file(genome=genome, search={"embed_group": embed_group, "weight": [-1.5, 0.5]}), n_checked=4)


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("mixtral", None)])
def test_a_tied_head_and_experts(
    architecture: TinyArchitecture, tied: bool | None, tmp_path: Path, study_file: Callable[..., Path]
) -> None:
    base, models = write_tiny_models(tmp_path, 2, architecture, tied=tied, spread=0.5)
    genome = {"models": list(map(str, models)), "merge_method": "task_arithmetic", "base_model": str(base)}
    check(study_file(genome=genome))


def test_adapters(tmp_path: Path, study_file: Callable[..., Path]) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    for index in range(2):
        folder = tmp_path / f"adapter_{index}"
        folder.mkdir()
        generator = torch.Generator().manual_seed(index)
        module = "base_model.model.model.layers.1.mlp.up_proj"
        tensors = {
            f"{module}.lora_A.weight": torch.randn(2, 16, generator=generator),
            f"{module}.lora_B.weight": torch.randn(24, 2, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    models = [f"{base}+{tmp_path / f'adapter_{index}'}" for index in range(2)]
    genome = {"models": models, "merge_method": "task_arithmetic", "base_model": str(base), "layer_granularity": 3}
    check(study_file(genome=genome))


def test_each_tensor_has_its_own_derivatives(firm: Path) -> None:
    """They sum up to the recipe's; a base among the models has none; gradients given twice add up."""
    references = [str(firm / name) for name in ("base", "model_0", "model_1")]
    merger = Merger.open(references)
    group = GroupRecipe("all", (0, 3), ("embedding", "head"), (ParameterSet(None, {}, {"weight": (0.1, 0.4, 0.7)}),))
    recipe = Recipe("task_arithmetic", tuple(references), references[0], 3, (group,))
    name = "model.layers.1.mlp.up_proj.weight"
    base, model = (merger.checkpoints[reference].get(name) for reference in references[:2])
    ones = torch.ones_like(base)
    pullback = Pullback(merger, recipe)
    for _ in range(2):
        pullback.add(name, ones)
    found = pullback.result()
    assert found.tensors[name][("weight", 0)] == 0
    assert found.tensors[name][("weight", 1)] == pytest.approx(2 * float((model - base).sum()), rel=1e-4)
    for (_, _, parameter, index), total in found.numbers.items():
        assert total == sum(own[(parameter, index)] for own in found.tensors.values())
    with pytest.raises(MergeError, match=r"gradient must have shape \[24, 16\], got \[3\]"):
        pullback.add(name, torch.ones(3))
    with pytest.raises(MergeError, match="nonsense: a gradient must be of a merged tensor"):
        pullback.add("nonsense", ones)
