from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optuna_merge.checkpoints.reference import resolve
from optuna_merge.errors import CheckpointError, RecipeError
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.worker import FACTORY, describe_merger, open_merger
from optuna_merge.recipe import passthrough


def test_a_recipe_as_text_merges_to_the_same_tensors(tiny_models: Path) -> None:
    models = [resolve(str(tiny_models / name)) for name in ("base", "model_0")]
    text = describe_merger(models, None, "auto")
    assert f"{open_merger.__module__}:{open_merger.__name__}" == FACTORY
    assert json.loads(text)["models"][0]["adapter"] is None
    recipe = passthrough(models[1].name, n_layers=2, dtype="float32")
    merged = dict(open_merger(text, "cpu")(recipe.to_json()))
    expected = dict(Merger.open(models).merge(recipe))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_what_cannot_be_opened_or_read(tiny_models: Path) -> None:
    gone = json.loads(describe_merger([resolve(str(tiny_models / "base"))], None, "cpu"))
    merge = open_merger(json.dumps(gone), "cpu")
    with pytest.raises(RecipeError, match="not readable"):
        list(merge("{}"))
    gone["models"][0]["path"] = str(tiny_models / "nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        open_merger(json.dumps(gone), "cpu")
