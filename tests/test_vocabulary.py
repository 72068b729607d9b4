from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoint import Checkpoint
from optuna_merge.errors import CheckpointError
from optuna_merge.merge import Merger
from optuna_merge.mergekit import to_mergekit
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.vocabulary import AlignedCheckpoint, align

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def extend(source: Path, folder: Path, tokens: list[str], swap: tuple[str, str] | None = None) -> Path:
    """A copy of a model with more tokens at the end, each with a row of its own, and maybe two ids exchanged."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    n = tensors[VOCABULARY[0]].shape[0]
    for offset, token in enumerate(tokens):
        entry = {"id": n + offset, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append({**entry, "normalized": False, "special": True})
        for name in VOCABULARY:
            row = torch.full((1, tensors[name].shape[1]), float(len(token) + offset))
            tensors[name] = torch.cat([tensors[name], row])
    if swap is not None:
        vocab = tokenizer["model"]["vocab"]
        one, two = vocab[swap[0]], vocab[swap[1]]
        vocab[swap[0]], vocab[swap[1]] = two, one
        for name in VOCABULARY:
            tensors[name][[one, two]] = tensors[name][[two, one]]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": n + len(tokens)}))
    return folder


@pytest.fixture
def checkpoints(tiny_models: Path, tmp_path: Path) -> dict[str, Checkpoint]:
    paths = {
        "base": tiny_models / "base",
        "more": extend(tiny_models / "model_0", tmp_path / "more", ["<|im_start|>", "<|im_end|>"]),
        "swapped": extend(tiny_models / "model_1", tmp_path / "swapped", ["<|im_end|>"], swap=("!", "#")),
    }
    return {name: Checkpoint.open(str(path)) for name, path in paths.items()}


def recipe(base: str, models: tuple[str, ...], source: str | None) -> Recipe:
    weights = ParameterSet(None, {"lambda": 1.0}, {"weight": (0.6, 0.7)})
    groups = (GroupRecipe("layers_00_01", (0, 2), ("embedding", "head"), (weights,)),)
    return Recipe("task_arithmetic", models, base, 2, groups, {"normalize": False}, tokenizer_source=source)


def test_rows_follow_their_tokens(checkpoints: dict[str, Checkpoint]) -> None:
    aligned = align(checkpoints, "base")
    assert aligned["base"] is checkpoints["base"]
    tokens = checkpoints["base"].vocabulary()
    for name in VOCABULARY:
        theirs, ours = checkpoints["swapped"].get(name), aligned["swapped"].get(name)
        assert aligned["swapped"].shape(name) == tuple(ours.shape) == checkpoints["base"].shape(name)
        for token, row in tokens.items():
            assert torch.equal(ours[row], theirs[checkpoints["swapped"].vocabulary()[token]])
    assert torch.equal(aligned["more"].get("model.norm.weight"), checkpoints["more"].get("model.norm.weight"))


def test_a_token_that_a_model_lacks(checkpoints: dict[str, Checkpoint]) -> None:
    """By hand: from the only model that has it, or else the mean of those that have it."""
    aligned = align(checkpoints, "more")
    rows = checkpoints["more"].vocabulary()
    start, end = rows["<|im_start|>"], rows["<|im_end|>"]
    head = {name: checkpoint.get("lm_head.weight") for name, checkpoint in aligned.items()}
    assert all(tensor.shape[0] == 322 for tensor in head.values())
    assert torch.equal(head["base"][start], torch.full((16,), 12.0))
    assert torch.equal(head["swapped"][start], torch.full((16,), 12.0))
    assert torch.equal(head["swapped"][end], torch.full((16,), 10.0))
    assert torch.equal(head["more"][end], torch.full((16,), 11.0))
    assert torch.equal(head["base"][end], torch.full((16,), 10.5))


def test_equal_vocabularies_are_left_alone(tiny_models: Path) -> None:
    models = {name: Checkpoint.open(str(tiny_models / name)) for name in ("base", "model_0")}
    assert align(models, "base") == models
    assert not any(isinstance(checkpoint, AlignedCheckpoint) for checkpoint in align(models, "model_0").values())
    assert align(models, None) == models


@pytest.mark.parametrize("source", ["base", "more", "swapped"])
def test_the_merge_is_mergekits(checkpoints: dict[str, Checkpoint], source: str, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    ours = dict(Merger(checkpoints, tokenizer_source=source).merge(recipe("base", ("more", "swapped"), source)))
    references = {name: str(checkpoint.path) for name, checkpoint in checkpoints.items()}
    text = to_mergekit(recipe("base", ("more", "swapped"), source), references=references)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(tmp_path / "out"), MergeOptions(quiet=True))
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_without_a_source_they_are_refused(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(CheckpointError, match="set tokenizer_source"):
        Merger(checkpoints)


@pytest.mark.parametrize(
    ("source", "message"),
    [("union", "got union: it is not built yet"), ("nobody", "must be base or one of base, more, swapped, got nobody")],
)
def test_a_source_that_is_none(checkpoints: dict[str, Checkpoint], source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        align(checkpoints, source)


def test_a_model_without_a_tokenizer(checkpoints: dict[str, Checkpoint]) -> None:
    for file in checkpoints["more"].path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="must have a tokenizer for tokenizer_source, found none; add it"):
        align(checkpoints, "base")
