"""Language models in the place of the language part of a model that also sees: names, refusals, and the merge."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.unify import unify
from optuna_merge.errors import CheckpointError
from optuna_merge.evaluation.engines.hf import HFEngine
from optuna_merge.merging.export import export
from optuna_merge.merging.merger import Merger
from optuna_merge.recipe import PASSTHROUGH, GroupRecipe, ParameterSet, Recipe
from tests.architectures.tiny import N_LAYERS, write_vision_models

# of a tensor of the language part: how it is called in a language model, and in the whole one
NAMES = {
    "llava": [
        (r"model\.", "language_model.model."),
        (r"lm_head", "language_model.lm_head"),
    ],
    "qwen2_5_vl": [],  # both begin with model.
    "qwen3_vl": [(r"model\.", "model.language_model.")],
}


def renamed(model_type: str, name: str) -> str:
    for pattern, replacement in NAMES[model_type]:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def recipe_of(method: str, models: list[Path], base: Path | None) -> Recipe:
    weights = {} if method == PASSTHROUGH else {"weight": (0.6, 0.3)[: len(models)]}
    group = GroupRecipe("all", (0, N_LAYERS), ("embedding", "head"), (ParameterSet(per_model=weights),))
    options = {"normalize": False} if method == "linear" else {}
    return Recipe(
        method,
        tuple(map(str, models)),
        None if base is None else str(base),
        N_LAYERS,
        (group,),
        options,
        dtype="float32",
    )


@pytest.mark.parametrize("model_type", NAMES)
@pytest.mark.parametrize("base_is_whole", [True, False])
def test_language_is_merged_and_the_rest_copied(model_type: str, base_is_whole: bool, tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models(model_type, tmp_path)
    base, models = (whole, [first, second]) if base_is_whole else (first, [whole, second])
    merger = Merger.open([str(base), *map(str, models)])
    folder = export(recipe_of("task_arithmetic", models, base), tmp_path / "merged", merger=merger)
    merged, stored = tensors_of(folder), tensors_of(whole)
    language = [
        {renamed(model_type, name): tensor for name, tensor in tensors_of(path).items()} for path in (first, second)
    ]
    assert merged.keys() == stored.keys() == set(merger.names)
    assert language[0].keys() < stored.keys()
    for name, tensor in merged.items():
        if name not in language[0]:
            assert torch.equal(tensor, stored[name]), name
            assert name in merger.checkpoints[str(whole)].copied
            continue
        a, b = (part[name] for part in language)
        start, sources = (stored[name], (a, b)) if base_is_whole else (a, (stored[name], b))
        expected = start + 0.6 * (sources[0] - start) + 0.3 * (sources[1] - start)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert json.loads((folder / "config.json").read_text())["model_type"] == model_type
    assert (folder / "preprocessor_config.json").read_bytes() == (whole / "preprocessor_config.json").read_bytes()
    assert "cannot merge language models with one that also sees" in (folder / "mergekit_config.yml").read_text()
    assert "it cannot make the model" in (folder / "README.md").read_text()


def test_a_language_model_alone_speaks_in_the_whole_one(tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("llava", tmp_path)
    merger = Merger.open([str(first), str(whole), str(second)])
    merged = dict(merger.merge(recipe_of(PASSTHROUGH, [second], None)))
    language = {renamed("llava", name): tensor for name, tensor in tensors_of(second).items()}
    stored = tensors_of(whole)
    assert all(torch.equal(tensor, language.get(name, stored[name])) for name, tensor in merged.items())


def test_models_that_all_see_are_merged_in_all_tensors(tmp_path: Path) -> None:
    first, _ = write_vision_models("llava", tmp_path / "a")
    second, _ = write_vision_models("llava", tmp_path / "b")
    changed = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in tensors_of(second).items()}
    save_file(changed, second / "model.safetensors", {"format": "pt"})
    merger = Merger.open([str(first), str(second)])
    recipe = recipe_of("linear", [first, second], None)
    stored = tensors_of(first)
    engine = HFEngine(first, device="cpu", names=merger.names)
    engine.load_weights(merger.merge(recipe, engine.resident))
    for name, tensor in merger.merge(recipe):
        torch.testing.assert_close(tensor, 0.6 * stored[name] + 0.3 * changed[name], rtol=0, atol=1e-6)
        resident = engine.resident(name)
        assert resident is not None
        assert torch.equal(resident, tensor)


def test_heads_are_untied_on_either_side(tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("llava", tmp_path / "a", tied=True)
    merged = dict(Merger.open([str(whole), str(first), str(second)]).merge(recipe_of("linear", [first, second], None)))
    a, b = (tensors_of(path)["model.embed_tokens.weight"] for path in (first, second))
    assert "lm_head.weight" not in tensors_of(first)
    torch.testing.assert_close(merged["language_model.lm_head.weight"], 0.6 * a + 0.3 * b)

    whole, (first, second) = write_vision_models("gemma3", tmp_path / "b", tied=False)
    assert not any("lm_head" in name for name in tensors_of(whole))
    merger = Merger.open([str(whole), str(first), str(second)])
    folder = export(recipe_of("task_arithmetic", [first, second], whole), tmp_path / "merged", merger=merger)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    start = tensors_of(whole)["language_model.model.embed_tokens.weight"]
    a, b = (tensors_of(path)["lm_head.weight"] for path in (first, second))
    expected = start + 0.6 * (a - start) + 0.3 * (b - start)
    torch.testing.assert_close(model.get_output_embeddings().weight, expected, rtol=0, atol=1e-6)


def test_the_vocabulary_is_that_of_the_model_that_sees(tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("gemma3", tmp_path)
    more = extended(whole, tmp_path / "more", "<image>")
    references = [str(first), str(more), str(second)]
    with pytest.raises(CheckpointError, match=r"1 tokens have another id: '<image>' \(.*; set tokenizer_source"):
        Merger.open(references)
    merger = Merger.open(references, tokenizer_source=str(more))
    recipe = recipe_of("linear", [first, second], first)
    recipe = dataclasses.replace(recipe, tokenizer_source=str(more))
    name = "language_model.model.embed_tokens.weight"
    merged = dict(merger.merge(recipe))[name]
    a, b = (tensors_of(path)["model.embed_tokens.weight"] for path in (first, second))
    torch.testing.assert_close(merged[:-1], 0.6 * a + 0.3 * b)
    torch.testing.assert_close(merged[-1], (0.6 + 0.3) * tensors_of(more)[name][-1])  # no other model has the token
    assert merger.template(recipe).config["text_config"]["vocab_size"] == 321


def extended(whole: Path, folder: Path, token: str) -> Path:
    """A copy with one more token, whose configuration does not state the size of the vocabulary."""
    shutil.copytree(whole, folder)
    tensors, name = tensors_of(whole), "language_model.model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones_like(tensors[name][:1])])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole, (first, second) = write_vision_models("llava", tmp_path)
    checkpoints = {path.name: Checkpoint.open(str(path)) for path in (first, whole, second)}
    for source in ("base", "union", "language_1"):
        with pytest.raises(CheckpointError, match=rf"tokenizer_source must be {whole}, .* got {source}; correct it"):
            unify(checkpoints, source)
    others = {**checkpoints, "other": Checkpoint.open(str(whole))}
    with pytest.raises(CheckpointError, match=f"only one model may see or hear if others, such as {first}"):
        unify(others, None)

    config = json.loads((second / "config.json").read_text())
    for changed, message in (
        ({"model_type": "mistral"}, rf"model_type must match the language part of {whole} \(llama\), got mistral"),
        ({"num_hidden_layers": 5}, rf"layers must match the language part of {whole} \(4\), got 5 in {second}"),
    ):
        (second / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(CheckpointError, match=message):
            unify({**checkpoints, "language_1": Checkpoint.open(str(second))}, None)
    (second / "config.json").write_text(json.dumps(config))

    tensors = tensors_of(second)
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(
        {**tensors, "model.layers.2.mlp.third.weight": lost, "score.weight": lost[:2].clone()},
        second / "model.safetensors",
    )
    with pytest.raises(CheckpointError) as caught:
        unify({**checkpoints, "language_1": Checkpoint.open(str(second))}, None)
    for name, has, lacks in (
        ("language_model.model.layers.2.mlp.up_proj.weight", first, second),
        ("language_model.model.layers.2.mlp.third.weight", second, first),
        ("language_model.score.weight", second, first),
    ):
        assert f"{name}: must be in every model, is in {has} but not in {lacks}" in str(caught.value)
