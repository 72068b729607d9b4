from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engines.hf_weights import ResidentModel, _FiniteCheck
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

TOKENS = torch.arange(40).reshape(2, 20)


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> ResidentModel:
    return ResidentModel(folder, dtype=dtype, device=torch.device("cpu"))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2", "gemma", "gemma2", "gpt2", "gpt_neox", "mistral", "mixtral"]
)
def test_a_loaded_model_is_the_one_that_transformers_loads(
    tmp_path: Path, architecture: TinyArchitecture, tied: bool | None
) -> None:
    base, [other] = write_tiny_models(tmp_path, 1, architecture, tied=tied, max_shard_size="20KB")
    model = resident(base)
    with torch.no_grad():
        model.load(stored(other).items())
        expected = AutoModelForCausalLM.from_pretrained(other)(TOKENS).logits
        assert torch.equal(model.model(TOKENS).logits, expected)


def test_a_float32_merge_is_rounded_once(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    weights, model = stored(base), resident(base, torch.bfloat16)
    model.load(weights.items())
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.resident(name), weights[name].to(torch.bfloat16))  # type: ignore[arg-type]


def test_names_without_prefix_and_stored_masks_of_old_checkpoints(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "gpt2")
    weights, model = stored(base), resident(base)
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    logits = []
    for tensors in (weights, old):
        model.load(tensors.items())
        logits.append(model.model(TOKENS).logits)
    assert torch.equal(*logits)
    with pytest.raises(EngineError, match=r"h\.0\.attn\.mask: must belong to GPT2LMHeadModel"):
        model.load([*old.items(), ("h.0.attn.mask", old["h.0.attn.bias"])])


def test_rotary_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    model = resident(base)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model.load([*stored(base).items(), (name, torch.zeros(4))])
    assert model.resident(name) is None
    assert model.is_complete


def test_a_tie_that_the_checkpoint_breaks_is_no_tie(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, tied=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = resident(base)
    model.load(stored(base).items())
    expected = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert torch.equal(model.model(TOKENS).logits, expected)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, tied=True)
    weights, model = stored(base), resident(base)
    embedding = weights["model.embed_tokens.weight"]
    model.load([*weights.items(), ("lm_head.weight", embedding)])
    with pytest.raises(EngineError, match=r"lm_head\.weight: must equal model\.embed_tokens\.weight"):
        model.load([*weights.items(), ("lm_head.weight", embedding + 1)])


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "mixtral")
    weights, model = stored(base), resident(base)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert model.resident(name) is None
    del weights[name]
    with pytest.raises(EngineError, match=name):
        model.load(weights.items())
    assert not model.is_complete


def test_without_weights_in_the_folder_names_are_those_that_transformers_saves(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "mixtral")
    weights = stored(base)
    (base / "model.safetensors").unlink()
    model = resident(base)
    model.load(weights.items())
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(base)(TOKENS).logits
    assert torch.equal(model.model(TOKENS).logits, expected)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    (base / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError, match="the names of its tensors cannot be read"):
        resident(base)


def test_a_head_among_the_names_breaks_a_tie(tmp_path: Path) -> None:
    base, _ = write_tiny_models(tmp_path, 0, "qwen2", tied=True)
    weights = stored(base)
    names = [*weights, "lm_head.weight"]
    model = ResidentModel(base, dtype=torch.float32, device=torch.device("cpu"), names=names)
    model.load([*weights.items(), ("lm_head.weight", torch.ones(320, 16))])
    assert torch.equal(model.resident("lm_head.weight"), torch.ones(320, 16))  # type: ignore[arg-type]
    embedding = model.resident("model.embed_tokens.weight")
    assert torch.equal(embedding, weights["model.embed_tokens.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("n_together", [1, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_tensor_that_is_not_finite_is_named(tmp_path: Path, value: float, n_together: int | None) -> None:
    """One by one, as on a CPU, and all together, as on a GPU; the next load is right."""
    base, _ = write_tiny_models(tmp_path, 0)
    weights, model = stored(base), resident(base)
    model._finite = _FiniteCheck(n_together)
    first, second = list(weights)[2], list(weights)[5]
    broken = {**weights, first: weights[first].clone(), second: weights[second] * value}
    broken[first].view(-1)[-1] = value
    with pytest.raises(NonFiniteMergeError, match=f"^{first}: must be finite, got NaN or infinity"):
        model.load(broken.items())
    assert not model.is_complete
    model.load(weights.items())
    assert model.is_complete
    assert torch.equal(model.resident(first), weights[first])  # type: ignore[arg-type]
