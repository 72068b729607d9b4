from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from typer.testing import CliRunner

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.cli.app import app
from optuna_merge.errors import EngineError
from optuna_merge.evaluation.engines.hf import HFEngine, HFPrepared
from optuna_merge.evaluation.engines.live_bytes import LiveBytes
from optuna_merge.merging import staging
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.sizes import KERNEL_ELEMENTS, PIECE_ELEMENTS
from optuna_merge.merging.staging import Stage
from optuna_merge.study import memory
from optuna_merge.study.memory import MemoryPlan, parse_size, plan_hf, plan_vllm
from optuna_merge.testing.models import write_tiny_models
from tests.merging.test_merger import recipe_of

GB = 10**9
SEVEN_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def llama_shapes(n_layers: int = 32, hidden: int = 4096, inner: int = 11008) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32000, hidden),
        "lm_head.weight": (32000, hidden),
    }
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,)}


def seven_b(**changes: Any) -> MemoryPlan:
    given: dict[str, Any] = {"itemsize": 2, "n_models": 4, "card": 24 * GB, "options": {}, **changes}
    return plan_vllm(llama_shapes(), SEVEN_B, **given)


def test_three_models_of_7_b_fit_into_24_gb() -> None:
    plan = seven_b()
    assert plan.weights == 6_738_415_616 * 2
    assert plan.kv_token == 2 * 32 * 4096 * 2
    # a feed-forward part twice; one of its tensors from four models; a piece of an embedding from each; scratch
    tensor = 11008 * 4096 * 2
    assert plan.merge_buffer == 2 * 3 * tensor + 4 * tensor + 4 * KERNEL_ELEMENTS * 2 + 6 * PIECE_ELEMENTS * 4
    plan.check(longest=4097)
    assert plan.kv_cache > 4097 * plan.kv_token
    assert 0 <= plan.left < GB
    assert plan.sources == 0
    assert plan.used + plan.left == plan.card


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    for card in (8, 12, 16):
        with pytest.raises(EngineError, match=r"must fit into the card's .* GiB, needs .* GiB: 12.55 GiB weights \+ "):
            seven_b(card=card * GB).check(longest=1000)
    thirteen = plan_vllm(
        llama_shapes(40, 5120, 13824), {**SEVEN_B, "hidden_size": 5120}, itemsize=2, n_models=4, card=24 * GB
    )
    with pytest.raises(EngineError, match=r"24.24 GiB weights .* engine.vllm.quantization: fp8"):
        thirteen.check()
    plan = seven_b()
    plan.check(longest=plan.kv_cache // plan.kv_token)
    with pytest.raises(EngineError, match="KV cache"):
        plan.check(longest=20_000)


def test_what_makes_it_smaller() -> None:
    plan = seven_b()
    halves = seven_b(options={"tensor_parallel_size": 2})
    assert halves.weights == plan.weights // 2
    assert halves.kv_token == plan.kv_token // 2
    eighths = seven_b(options={"quantization": "fp8"})
    matrices = 32 * (4 * 4096 * 4096 + 3 * 11008 * 4096)
    assert eighths.weights == plan.weights - matrices
    fourths = seven_b(options={"quantization": "mxfp4"})
    assert fourths.weights == eighths.weights - matrices * 15 // 32  # a byte for each becomes 17 bytes for 32
    assert seven_b(options={"quantization": "unknown"}).weights == plan.weights
    assert seven_b(options={"kv_cache_memory_bytes": 10**9}).kv_cache == 10**9
    assert seven_b(options={"gpu_memory_utilization": 0.8}).kv_cache < plan.kv_cache
    assert seven_b(options={"gpu_memory_utilization": 0.5}).kv_cache == 0
    assert plan_vllm(llama_shapes(), {}, itemsize=2, n_models=2).kv_token == 0  # a config.json with unknown keys


def test_experts_of_a_layer_are_loaded_together() -> None:
    experts = {
        f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight": (64, 32) for i in range(8) for j in (1, 2, 3)
    }
    plan = plan_vllm({**experts, "model.norm.weight": (32,)}, {}, itemsize=4, n_models=2)
    assert plan.merge_buffer == 2 * 24 * 64 * 32 * 4
    plan = plan_hf({**experts, "model.norm.weight": (32,)}, {}, itemsize=4, n_models=2, n_padded=1, n_scored=1)
    assert plan.merge_buffer == 2 * 24 * 64 * 32 * 4


def test_the_transformers_engine() -> None:
    plan = plan_hf(llama_shapes(), SEVEN_B, itemsize=2, n_models=4, n_padded=8192, n_scored=27, card=24 * GB)
    assert plan.scoring == 8192 * (4 * 4096 + 3 * 11008) * 2
    assert plan.kv_cache == 0
    assert plan.used == plan.weights + max(plan.merge_buffer, plan.scoring) + plan.runtime
    assert "merging, then scoring" in plan.describe()
    plan.check(longest=4097)
    texts = plan_hf(llama_shapes(), SEVEN_B, itemsize=2, n_models=4, n_padded=8192, n_scored=8192, card=24 * GB)
    assert texts.scoring == 8192 * 32000 * 8
    answers = plan_hf(
        llama_shapes(),
        SEVEN_B,
        itemsize=2,
        n_models=4,
        n_padded=8192,
        n_scored=27,
        n_cached=8192,
        card=24 * GB,
    )
    assert answers.scoring - plan.scoring == 8192 * 2 * 32 * 4096 * 2
    with pytest.raises(EngineError, match=r"37.25 GiB sources .*; use a larger card, a smaller engine.batch_size"):
        replace(plan, sources=40 * GB).check()
    with pytest.raises(EngineError, match=r"use a larger card, engine.dtype: bfloat16, a smaller"):
        replace(plan, sources=40 * GB, itemsize=4).check()


@pytest.mark.parametrize(("hidden", "inner"), [(256, 896), (512, 512)])
def test_scoring_takes_what_is_planned(hidden: int, inner: int, tmp_path: Path) -> None:
    """Compared with the tensors that live at once on a CPU, where attention needs no more memory than on a GPU."""
    base, _ = write_tiny_models(tmp_path, 0)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 8, "num_key_value_heads": 2}
    config |= {"head_dim": hidden // 8, "num_hidden_layers": 2, "max_position_embeddings": 512}
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").unlink()
    engine = HFEngine(base, dtype="bfloat16", device="cpu", batch_tokens=4096)
    shapes = {name: tuple(tensor.shape) for name, tensor in engine._weights.model.state_dict().items()}
    engine.load_weights((name, torch.full(shape, 0.01)) for name, shape in shapes.items())
    words = ["the cat sat on the mat " * 40 + str(number) for number in range(64)]
    prepared = engine.prepare([Instance("loglikelihood", {}, (text, " dog"), 0) for text in words])
    plan = plan_hf(
        shapes,
        config,
        itemsize=2,
        n_models=4,
        n_padded=prepared.n_padded,
        n_scored=prepared.n_scored,
    )
    engine.respond(prepared)  # moves its batches to the device
    with LiveBytes() as live:
        engine.respond(prepared)
    assert plan.scoring == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("n_most_cached", [10**6, 3000])
def test_generating_takes_what_is_planned(n_most_cached: int, tmp_path: Path) -> None:
    """Texts that are as long as they may be, with room for all keys and values and for those of some rows."""
    base, _ = write_tiny_models(tmp_path, 0)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    config |= {"head_dim": 32, "num_hidden_layers": 12, "max_position_embeddings": 512}
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").unlink()
    engine = HFEngine(base, device="cpu", batch_tokens=512)
    engine._generator._n_most_cached = n_most_cached
    shapes = {name: tuple(tensor.shape) for name, tensor in engine._weights.model.state_dict().items()}
    engine.load_weights((name, torch.full(shape, 0.01)) for name, shape in shapes.items())
    options = {"until": ["no such text"], "max_gen_toks": 70}
    texts = ["the cat sat on the mat " * 4 + str(number) for number in range(60)]
    prepared = engine.prepare([Instance("generate_until", {}, (text, options), 0) for text in texts])
    plan = plan_hf(
        shapes,
        config,
        itemsize=4,
        n_models=4,
        n_padded=prepared.n_padded,
        n_scored=prepared.n_scored,
        n_cached=prepared.n_cached,
    )
    engine.respond(prepared)
    with LiveBytes() as live:
        engine.respond(prepared)
    print(live.peak, plan.scoring, live.peak / plan.scoring)
    assert 0.8 * plan.scoring <= live.peak <= 1.05 * plan.scoring


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_gradient_takes_what_is_planned(tmp_path: Path, recomputes: bool) -> None:
    base, _ = write_tiny_models(tmp_path, 0)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "num_hidden_layers": 6, "max_position_embeddings": 512}
    (base / "config.json").write_text(json.dumps(config))
    (base / "model.safetensors").unlink()
    engine = HFEngine(base, device="cpu", batch_tokens=512)
    shapes = {name: tuple(tensor.shape) for name, tensor in engine._weights.model.state_dict().items()}
    torch.manual_seed(0)
    engine.load_weights((name, 0.1 * torch.randn(shape)) for name, shape in shapes.items())
    # one batch: rows as long as one another, each with two endings behind one beginning
    texts = [f"{number} " + "the cat sat on the mat " * 10 for number in range(8)]
    asked = [Instance("loglikelihood", {}, (text, end), 0) for text in texts for end in (" dog", " the hat")]
    prepared = engine.prepare(asked)
    assert isinstance(prepared, HFPrepared)
    planned = HFEngine.tokenizer_only(base, batch_tokens=prepared.n_padded)
    kept, least = planned.gradient_bytes(prepared.longest, prepared.n_scored)
    assert least < 0.3 * kept
    plan = plan_hf(shapes, config, itemsize=4, n_models=4, n_padded=1, n_scored=1, gradient=(kept, least))
    assert plan.gradient > kept
    small = replace(plan, card=plan.used - 1)
    assert "or a step of the ascent" in small.describe()
    with pytest.raises(EngineError, match=r"use a larger card, .* search\.start: uniform"):
        small.check()
    tight = plan_hf(
        shapes, config, itemsize=4, n_models=4, n_padded=1, n_scored=1, gradient=(kept, least), card=small.card
    )
    assert plan.gradient - tight.gradient == kept - least

    class Sum:
        together: tuple[tuple[int, ...], ...] = ()

        def gradient(self, log_likelihoods: Any) -> Any:
            return log_likelihoods * 0 + 1

    engine._backward.recomputes = recomputes
    engine.respond_with_gradient(prepared, Sum(), lambda *_: None)
    with LiveBytes() as live:
        engine.respond_with_gradient(prepared, Sum(), lambda *_: None)
    if recomputes:
        assert live.peak < 0.5 * kept
    else:
        assert 0.9 * kept <= live.peak <= 1.05 * kept


def test_a_merge_takes_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged as on a GPU: from each model the current tensor and the next, and scratch pieces."""
    base, models = write_tiny_models(tmp_path, 2)
    references = (str(base), *map(str, models))
    shapes = {name: Checkpoint.open(str(base)).shape(name) for name in Checkpoint.open(str(base)).names}
    largest = max(a * b for a, b in (shape for shape in shapes.values() if len(shape) == 2))
    for staged_bytes in (1 << 29, 3 * 4 * largest - 1):
        for module in (memory, staging):
            monkeypatch.setattr(module, "STAGED_BYTES", staged_bytes)
        for piece in ("PIECE_ELEMENTS", "KERNEL_ELEMENTS"):
            monkeypatch.setattr(memory, piece, 1 << 6)
        plan = plan_hf(shapes, {}, itemsize=4, n_models=3, n_padded=1, n_scored=1, card=24 * GB)
        merger = Merger({r: Checkpoint.open(r) for r in references}, chunk_elements=1 << 6, placement="host")
        dict(merger.merge(recipe_of(references)))  # so that the sources are read
        merger._stage = Stage(torch.device("cpu"), is_ahead=True)
        merger._buffers.clear()
        resident = {name: torch.empty(shapes[name]) for name in merger.names}
        with LiveBytes() as live:
            for _ in merger.merge(recipe_of(references), out=resident.get):
                pass
        assert live.peak <= plan.merge_buffer < 1.5 * live.peak


def test_sizes() -> None:
    assert parse_size("24GB") == 24 * GB
    assert parse_size("24 GiB") == parse_size("24") == parse_size("24g") == 24 * 2**30
    assert parse_size("79.1gib") == int(79.1 * 2**30)
    for text in ("", "0", "-1", "rtx", "24 TB", "nan"):
        with pytest.raises(EngineError, match=r"card must be a size such as 24GB, got"):
            parse_size(text)


@pytest.fixture
def seven_b_models(tmp_path: Path, tiny_models: Path) -> list[Path]:
    """Four model folders whose weight files are sparse: of the right size, but empty on disk."""
    shapes, offset, header = llama_shapes(), 0, {}
    for name, shape in shapes.items():
        n_bytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folders = [tmp_path / name for name in ("base", "math", "code", "chat")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(SEVEN_B))
        for file in tiny_models.glob("base/tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
    return folders


def test_check_plans_it_from_the_command_line(seven_b_models: list[Path], study_file: Callable[..., Path]) -> None:
    base, *models = map(str, seven_b_models)
    genome = {"models": models, "base_model": base, "merge_method": "task_arithmetic", "layer_granularity": 8}
    file = study_file(genome=genome, engine={"backend": "vllm", "dtype": "bfloat16"})
    result = CliRunner().invoke(app, ["check", str(file), "--card", "24GB"])
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stdout.splitlines() if line.startswith("device")]
    assert "cuda: " in line
    assert "12.55 GiB weights + " in line
    assert " of 22.35 GiB left" in line
    assert "50.21 GiB of model files" in result.stdout
    refused = CliRunner().invoke(app, ["check", str(file), "--card", "12GB"])
    assert refused.exit_code == 1
    assert "error: engine: the study must fit into the card's 11.18 GiB, needs " in refused.stderr
    assert CliRunner().invoke(app, ["check", str(file), "--card", "big"]).exit_code == 1
