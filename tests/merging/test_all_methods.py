"""Every merge method from the study file to the merged tensors and to mergekit's file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optuna_merge.config.read import load_study
from optuna_merge.errors import ConfigError
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS
from optuna_merge.search.space import SearchSpace
from optuna_merge.study.models import StudyModels


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
