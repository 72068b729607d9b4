from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from optuna_merge.errors import MethodError
from optuna_merge.merging.export import export
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.methods import METHODS, find_method
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.study.folder import BEST_CONFIG
from optuna_merge.study.loaders import LocalLoader
from optuna_merge.study.objective import MergeObjective
from optuna_merge.study.run import run_study
from optuna_merge.testing.methods import merge_tensors

OWN = """
from optuna_merge.methods import MergeMethod, MethodParameter

greatest = MergeMethod(
    name="greatest",
    summary="the greatest element of any model, shifted",
    reference="none",
    function="own_methods:greatest_of",
    parameters=(MethodParameter("shift", "added to each element", 0.0, -1.0, 1.0, per_model=False),),
    base="none",
)
not_a_method = 3

def greatest_of(inputs, out):
    flat = out.view(-1)
    for chunk in inputs.chunks():
        best = chunk.scratch("best").copy_(chunk.model(0))
        for index in range(1, len(inputs.models)):
            best = best.maximum(chunk.model(index))
        flat[chunk.span] = best + inputs.shared["shift"]
"""


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_methods", raising=False)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_declarations_are_sound(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert callable(method.load())
    assert method.summary
    assert method.reference
    for parameter in method.parameters:
        assert parameter.meaning
        assert parameter.low <= parameter.high
        if parameter.default is not None:
            assert parameter.low <= parameter.default <= parameter.high
        if parameter.search is not None:
            assert parameter.low <= parameter.search[0] < parameter.search[1] <= parameter.high


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.in_mergekit))
def test_defaults_and_names_are_those_of_mergekit(name: str) -> None:
    from mergekit import merge_methods

    theirs = {parameter.name: parameter for parameter in merge_methods.get(name).spec.parameters}
    ours = METHODS[name]
    if name == "slerp":  # weights choose the pair that mergekit is given
        return
    assert {p.name for p in ours.parameters} | dict(ours.switches).keys() <= theirs.keys()
    for parameter in ours.parameters:
        if parameter.name == "t":
            continue
        if parameter.default is None:
            assert theirs[parameter.name].required
        else:
            assert parameter.default == theirs[parameter.name].default
    for switch, default in ours.switches:
        assert default == theirs[switch].default


def test_a_method_of_ones_own(own_methods: None) -> None:
    first, second = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 2.0])
    assert merge_tensors("own_methods.greatest", [first, second], shift=0.5).tolist() == [3.5, 5.5]
    group = GroupRecipe("all", (0, 1), ("embedding", "head"), (ParameterSet(None, {"shift": 0.5}, {}),))
    merge_file = to_mergekit(Recipe("own_methods.greatest", ("/a", "/b"), None, 1, (group,)))
    says = "mergekit has no method own_methods.greatest: optuna-merge export writes the model"
    assert merge_file.startswith(f"# {says}\n")
    assert yaml.safe_load(merge_file)["merge_method"] == "own_methods.greatest"


def test_a_study_of_a_method_of_ones_own(own_methods: None, study_file: Callable[..., Path], tiny_models: Path) -> None:
    genome = {"models": [str(tiny_models / f"model_{i}") for i in range(2)], "merge_method": "own_methods.greatest"}
    file = study_file(
        genome=genome, study={"name": "tiny", "n_trials": 4, "n_chunks": 2}, search={"shift": [-0.1, 0.1]}
    )
    objective = MergeObjective.from_file(file)
    run_study(objective.config, objective)
    best_config = (objective.config.storage_path / BEST_CONFIG).read_text()
    assert "# mergekit has no method own_methods.greatest" in best_config
    with closing(objective):
        trials = open_study(storage_url(objective.config.storage_path, None), "tiny").trials
        [*_, last] = [trial for trial in trials if "baseline" not in trial.user_attrs]
        assert isinstance(objective.loader, LocalLoader)
        folder = export(objective.recipe(last), file.parent / "model", merger=objective.loader.merger)
    assert "it cannot make the model" in (folder / "README.md").read_text()
    assert len(load_file(folder / "model.safetensors")) == len(objective.models.names)


def test_a_method_that_cannot_be_found(own_methods: None) -> None:
    with pytest.raises(MethodError, match="unknown merge method 'tise'; did you mean 'ties'"):
        find_method("tise")
    with pytest.raises(MethodError, match=r"'own_methods.none' must be importable, got: .*; is its folder on"):
        find_method("own_methods.none")
    with pytest.raises(MethodError, match=r"'no_such_package.x' must be importable"):
        find_method("no_such_package.x")
    with pytest.raises(MethodError, match=r"'own_methods.not_a_method' must be a MergeMethod, got int"):
        find_method("own_methods.not_a_method")
