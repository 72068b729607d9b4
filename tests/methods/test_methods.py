from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from optuna_merge.errors import MethodError, RecipeError
from optuna_merge.merging.mergekit import to_mergekit
from optuna_merge.methods import METHODS, find_method
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
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


@pytest.mark.parametrize("name", sorted(METHODS))
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
    with pytest.raises(RecipeError, match=r"mergekit has no method own_methods.greatest"):
        to_mergekit(Recipe("own_methods.greatest", ("/a", "/b"), None, 1, (group,)))


def test_a_method_that_cannot_be_found(own_methods: None) -> None:
    with pytest.raises(MethodError, match="unknown merge method 'tise'; did you mean 'ties'"):
        find_method("tise")
    with pytest.raises(MethodError, match=r"'own_methods.none' must be importable, got: .*; is its folder on"):
        find_method("own_methods.none")
    with pytest.raises(MethodError, match=r"'no_such_package.x' must be importable"):
        find_method("no_such_package.x")
    with pytest.raises(MethodError, match=r"'own_methods.not_a_method' must be a MergeMethod, got int"):
        find_method("own_methods.not_a_method")
