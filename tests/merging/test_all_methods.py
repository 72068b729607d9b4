"""Every merge method from the study file to the merged tensors and to mergekit's file; and on real fine-tunes."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.config.read import load_study
from optuna_merge.errors import ConfigError, NonFiniteMergeError
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels
from optuna_merge.testing.models import write_tiny_models
from tests.methods.reference import assert_same, mergekit_result


def genome_of(method: str, models: Path, *, with_base: bool) -> dict:
    declared = METHODS[method]
    least, most = declared.n_models_for(with_base)
    n_models = min(max(2, least), most or 2)
    genome = {"models": [str(models / f"model_{i}") for i in range(n_models)], "merge_method": method}
    return genome | {"layer_granularity": 1} | ({"base_model": str(models / "base")} if with_base else {})


CASES = [
    (name, with_base)
    for name, method in METHODS.items()
    for with_base in (True, False)
    if not (with_base and method.base == "none") and not (not with_base and method.base == "required")
]


@pytest.mark.parametrize(("method", "with_base"), CASES)
def test_a_study_can_search_it(
    method: str, with_base: bool, study_file: Callable[..., Path], tiny_models: Path
) -> None:
    config = load_study(study_file(genome=genome_of(method, tiny_models, with_base=with_base)))
    models = StudyModels.open(config)
    space = SearchSpace(config, models.refs)
    merger = Merger(models.checkpoints)
    rng = np.random.default_rng(0)
    drawn = {name: float(rng.uniform(d.low, d.high)) for name, d in space.distributions.items()}
    for params in (space.uniform(1.0), drawn):
        recipe = space.decode(params)
        merged = dict(merger.merge(recipe))
        assert all(tensor.isfinite().all() for tensor in merged.values())
        again = dict(merger.merge(recipe))
        assert all(torch.equal(merged[name], again[name]) for name in merged)
        assert f"merge_method: {method}" in to_mergekit(recipe, names=merger.names, architecture="LlamaForCausalLM")
    assert not space.distributions or np.linalg.eigvalsh(space.covariance()).min() > 0
    assert [baseline.kind for baseline in space.baselines if baseline.kind == "uniform"]


def test_a_parameter_that_needs_a_base_is_not_searched_without(
    study_file: Callable[..., Path], tiny_models: Path
) -> None:
    config = load_study(study_file(genome=genome_of("slerp", tiny_models, with_base=False)))
    space = SearchSpace(config, StudyModels.open(config).refs)
    assert next(iter(space.distributions)) == "layers_00_00.model_0.weight"
    config = load_study(study_file(genome=genome_of("slerp", tiny_models, with_base=True)))
    space = SearchSpace(config, StudyModels.open(config).refs)
    assert list(space.distributions) == ["layers_00_00.t", "layers_01_01.t"]


def test_slerp_between_a_base_and_several_models_is_refused(study_file: Callable[..., Path], tiny_models: Path) -> None:
    genome = genome_of("task_arithmetic", tiny_models, with_base=True) | {"merge_method": "slerp"}
    with pytest.raises(ConfigError, match=r"genome.models must name 1 models for slerp, got 2; add or remove some"):
        load_study(study_file(genome=genome))


def test_rescale_reaches_the_recipe(study_file: Callable[..., Path], tiny_models: Path) -> None:
    genome = genome_of("ties", tiny_models, with_base=True) | {"rescale": True, "normalize": False}
    config = load_study(study_file(genome=genome))
    space = SearchSpace(config, StudyModels.open(config).refs)
    assert space.decode(space.uniform()).options == {"normalize": False, "rescale": True}
    with pytest.raises(ConfigError, match=r"genome.rescale must be absent for linear, got True; remove it"):
        load_study(study_file(genome=genome_of("linear", tiny_models, with_base=False) | {"rescale": True}))


FEW_TOKENS = torch.tensor([[7, 11, 7, 13, 11, 17, 7, 11]])
SPECIAL = {
    "model.layers.0.zero.weight": torch.zeros(3, 4),
    "model.layers.0.single.weight": torch.tensor([0.25]),
    "model.layers.0.scalar": torch.tensor(-1.5),
    "model.layers.0.empty.weight": torch.zeros(0),
    "model.layers.0.no_rows.weight": torch.zeros(0, 4),
    "model.layers.0.no_columns.weight": torch.zeros(4, 0),
}
"""Tensors that fine-tuning does not change."""


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def fine_tunes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two fine-tunes of it, a copy of the base and one of the first fine-tune, stored in one dtype.

    AdamW trained them for three steps. The rows of most tokens and the MLP of the second layer are those of the base.
    """
    folder = tmp_path_factory.mktemp(request.param)
    dtype = getattr(torch, request.param)
    path, _ = write_tiny_models(folder, 0, dtype=request.param)
    base = load_file(path / "model.safetensors")
    for seed, name in enumerate(("first", "second")):
        shutil.copytree(path, folder / name)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.model.layers[1].mlp.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        for _ in range(3):
            tokens = FEW_TOKENS.roll(seed) + seed
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tuned = {key: tensor.detach().to(dtype).clone() for key, tensor in model.state_dict().items()}
        unchanged = (tuned["model.embed_tokens.weight"] == base["model.embed_tokens.weight"]).all(1)
        assert 250 < unchanged.sum() < 320
        assert torch.equal(tuned["model.layers.1.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
        save_file(tuned, folder / name / "model.safetensors")
    for name in ("base", "first", "second"):
        file = folder / name / "model.safetensors"
        save_file(load_file(file) | {key: tensor.to(dtype) for key, tensor in SPECIAL.items()}, file)
    shutil.copytree(folder / "base", folder / "copy")
    shutil.copytree(folder / "first", folder / "twin")
    return {name: folder / name for name in ("base", "first", "second", "copy", "twin")}


SOURCES = [("first", "second"), ("first", "copy"), ("first", "twin"), ("copy", "copy")]
HALF = {"weight": 0.5, "density": 0.5, "mask_lambda": 0.5, "gamma": 0.1, "select_topk": 0.5, "t": 0.5, "lambda": 0.7}


def settings_of(method: str, *, with_base: bool, n_models: int) -> ParameterSet:
    """Parameters at which a method thins task vectors; all methods get weights that differ."""
    parameters = METHODS[method].parameters_for(with_base)
    values = {name: (value,) * n_models for name, value in HALF.items()} | {"weight": (0.4, 0.7)[:n_models]}
    return ParameterSet(
        None,
        {p.name: HALF[p.name] for p in parameters if not p.per_model and p.name in HALF},
        {p.name: values[p.name] for p in parameters if p.per_model and p.name in HALF},
    )


@pytest.fixture
def stable_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among equal elements, mergekit's sorts take any; a stable one takes those that we take."""
    sort, argsort = torch.sort, torch.argsort

    def topk(values: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        values, indices = sort(values, stable=True, descending=largest)
        return values[:k], indices[:k]

    monkeypatch.setattr(torch, "sort", functools.partial(sort, stable=True))
    monkeypatch.setattr(torch, "argsort", functools.partial(argsort, stable=True))
    monkeypatch.setattr(torch, "topk", topk)


@pytest.mark.parametrize(("method", "with_base"), CASES)
def test_fine_tunes_merge_as_in_mergekit(
    method: str, with_base: bool, fine_tunes: dict[str, Path], stable_sorts: None
) -> None:
    declared = METHODS[method]
    stored = {name: load_file(path / "model.safetensors") for name, path in fine_tunes.items()}
    merger = Merger({name: Checkpoint.open(str(path)) for name, path in fine_tunes.items()})
    is_comparable = declared.in_mergekit and not declared.is_random and (method != "slerp" or with_base)
    for sources in dict.fromkeys(pair[: declared.n_models_for(with_base)[1]] for pair in SOURCES):
        parameters = settings_of(method, with_base=with_base, n_models=len(sources))
        group = GroupRecipe("all", (0, 3), ("embedding", "head"), (parameters,))
        merged = dict(merger.merge(Recipe(method, sources, "base" if with_base else None, 3, (group,))))
        assert merged.keys() == stored["base"].keys()
        for name, tensor in merged.items():
            assert tensor.isfinite().all(), name
            base, *models = (stored[source][name].float() for source in ("base", *sources))
            if declared.base == "required":
                is_unchanged = torch.stack([model == base for model in models]).all(0)
                if declared.keeps != "nothing" and base.dim() == 2:  # which changes whole rows
                    is_unchanged = is_unchanged.all(1)
                torch.testing.assert_close(tensor[is_unchanged], base[is_unchanged], rtol=1e-6, atol=0)
            if tensor.numel() and is_comparable:
                uses_base = with_base and declared.base != "unused"
                theirs = theirs_of(method, models, base if uses_base else None, parameters)
                if theirs.isfinite().all():
                    assert_same(tensor, theirs)


def theirs_of(method: str, models: list[Tensor], base: Tensor | None, parameters: ParameterSet) -> Tensor:
    if method == "karcher":  # from float32 tensors, mergekit's angles between fine-tunes are mostly rounding
        from mergekit.merge_methods.karcher import karcher_merge_tensors

        return karcher_merge_tensors([model.double() for model in models], [1 / len(models)] * len(models)).float()
    return mergekit_result(method, models, base, **parameters.shared, **parameters.per_model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("method", "with_base"), CASES)
def test_a_source_that_is_not_finite_fails_the_merge_by_name(
    method: str, with_base: bool, value: float, tiny_models: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_models / "model_0", tmp_path / "broken")
    broken = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors[broken][2, 3:5] = value
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    most = METHODS[method].n_models_for(with_base)[1]
    models = (str(tmp_path / "broken"), str(tiny_models / "model_1"))[:most]
    references = (str(tiny_models / "base"), *models)
    parameters = settings_of(method, with_base=with_base, n_models=len(models))
    group = GroupRecipe("all", (0, 2), ("embedding", "head"), (parameters,))
    recipe = Recipe(method, models, references[0] if with_base else None, 2, (group,))
    reason = f"{broken}: every model must be finite, got NaN or infinity in {models[0]}; repair or leave out that model"
    try:
        merged = dict(Merger.open(references).merge(recipe))
        not_finite = [name for name, tensor in merged.items() if not tensor.isfinite().all()]
    except NonFiniteMergeError as exc:
        not_finite = [broken] if str(exc) == reason else [str(exc)]
    assert not_finite == [broken]
