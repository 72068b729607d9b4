"""Merges two language models with one architecture that also sees, and compares the result with transformers.

Which tensors are language is asked of transformers (its decoder and its output head), so no tensor name enters the
comparison.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import OptunaMergeError, first_line
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.merging.export import export
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from tests.architectures.examine import (
    TOLERANCE,
    WEIGHTS,
    Outcome,
    WrongResultError,
    by_lm_eval,
    compare_responses,
    compare_states,
    loaded,
    requests,
    said,
    silence,
    way_of,
)
from tests.architectures.tiny import write_vision_models


def examine_with_senses(model_type: str, folder: Path) -> Outcome:
    """Try one architecture in an empty folder."""
    name = ""
    try:
        with silence():
            whole, paths = write_vision_models(model_type, folder)
            seeing = loaded(whole, AutoModelForImageTextToText)
            name = type(seeing).__name__
            speaking = [loaded(path, AutoModelForCausalLM) for path in paths]
            by_lm_eval(whole, requests()[:1], seeing)
            assert all(language_of(model) for model in (seeing, *speaking))
    except Exception as exc:
        return Outcome(model_type, name, "not built", said(exc))
    try:
        with silence():
            way = merge_language(whole, paths, seeing, speaking)
        return Outcome(model_type, name, "works", notes=f"{type(speaking[0]).__name__}; {way}")
    except OptunaMergeError as exc:
        return Outcome(model_type, name, "refused", first_line(exc).replace(str(folder) + "/", ""))
    except Exception as exc:
        return Outcome(model_type, name, "wrong", said(exc))


def merge_language(whole: Path, paths: Sequence[Path], seeing: Any, speaking: Sequence[Any]) -> str:
    """Merge, score and export, and compare weights, scores and texts; returns how it is scored."""
    merger = Merger.open([str(whole), *map(str, paths)])
    n_layers = merger.checkpoints[str(whole)].n_layers
    group = GroupRecipe("all", (0, n_layers), ("embedding", "head"), (ParameterSet(per_model={"weight": WEIGHTS}),))
    models = tuple(map(str, paths))
    recipe = Recipe("linear", models, str(whole), n_layers, (group,), {"normalize": False}, dtype="float32")
    if lost := set(Checkpoint.open(str(whole)).names) - set(merger.names):
        raise WrongResultError(f"{sorted(lost)[0]} is not in the merge ({len(lost)} in all)")
    with tempfile.TemporaryDirectory() as described:
        merger.template(recipe).write_description(Path(described), "float32", copy_code=False)
        engine = HFEngine(described, device="cpu", names=merger.names, batch_tokens=64)
    engine.load_weights(merger.merge(recipe, engine.resident))
    asked = requests()
    engine.expect(asked)
    responses = engine.respond(engine.prepare(asked))
    way = way_of(engine)
    engine.close()
    exported = loaded(export(recipe, whole.parent / "merged", merger=merger), AutoModelForImageTextToText)
    first, second = (language_of(model) for model in speaking)
    expected = {
        key: sum(w * one.double() for w, one in zip(WEIGHTS, (first[key], second[key]), strict=True)) for key in first
    }
    compare_states("arithmetic", language_of(exported), expected, TOLERANCE)
    compare_states("whole model", others_of(exported), others_of(seeing), 0)
    compare_responses(responses, by_lm_eval(whole.parent / "merged", asked, exported), way)
    return way


def language_of(model: Any) -> dict[str, Tensor]:
    """The decoder's tensors and the output head's, by names that do not depend on the model around them."""
    head = model.get_output_embeddings().state_dict()
    return {**model.get_decoder().state_dict(), **{f"output head {name}": tensor for name, tensor in head.items()}}


def others_of(model: Any) -> dict[str, Tensor]:
    """All other tensors."""
    language = {tensor.data_ptr() for tensor in language_of(model).values()}
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.data_ptr() not in language}
