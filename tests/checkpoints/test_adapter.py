from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import CheckpointError
from optuna_merge.testing.models import TinyArchitecture, write_tiny_models

NAMES = ("embed.weight", "layers.0.up.weight", "layers.0.up.bias", "layers.0.down.weight", "norm.weight")
PREFIX = "base_model.model."
UP_A = torch.tensor([[1.0, 2.0]])  # rank 1, 2 wide
UP_B = torch.tensor([[1.0], [0.0], [-1.0]])  # 3 wide


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = {"layers.0.up.lora_A.weight": UP_A, "layers.0.up.lora_B.weight": UP_B}
    save_file({PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 2} | config))
    return folder


def open_adapter(folder: Path) -> Adapter:
    return Adapter(folder, "it", NAMES)


def make_with_peft(base: Path, folder: Path, **config: Any) -> Any:
    """A LoRA with random factors, saved by peft; returns peft's own merge of it."""
    import warnings

    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config))
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        merged = again.merge_and_unload()
    merged.save_pretrained(folder.with_name(folder.name + "_merged"))
    return load_file(folder.with_name(folder.name + "_merged") / "model.safetensors")


def test_scaling_times_b_times_a_by_hand(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path))
    weight = torch.ones(3, 2)
    expected = torch.tensor([[3.0, 5.0], [1.0, 1.0], [-1.0, -3.0]])  # 1 + 2 / 1 * [1, 0, -1] x [1, 2]
    assert torch.equal(adapter.apply("layers.0.up.weight", weight), expected)
    assert torch.equal(weight, torch.ones(3, 2))
    assert adapter.apply("norm.weight", weight) is weight
    assert "layers.0.up.weight" in adapter
    assert "norm.weight" not in adapter


def test_one_rounding_to_the_models_dtype(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path))
    weight = torch.tensor([[0.3, 0.7], [0.1, 0.2], [5.5, 1 / 3]], dtype=torch.bfloat16)
    exact = adapter.apply("layers.0.up.weight", weight.float())
    assert torch.equal(adapter.apply("layers.0.up.weight", weight), exact.bfloat16())


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 1.5),
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"alpha_pattern": {"up": 8}}, 2.0),
        ({"alpha_pattern": {"wn": 8, "layers.1.up": 9}}, 0.5),
        ({"r": 99, "rank_pattern": {r"layers.\d+.up": 4}}, 0.5),
    ],
)
def test_scaling_of_patterns(config: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    tensors = {"layers.0.up.lora_A.weight": torch.ones(4, 2), "layers.0.up.lora_B.weight": torch.ones(3, 4)}
    adapter = open_adapter(write_adapter(tmp_path, tensors, **{"r": 4, **config}))
    torch.testing.assert_close(
        adapter.apply("layers.0.up.weight", torch.zeros(3, 2)), torch.full((3, 2), 4 * scaling), rtol=1e-6, atol=0
    )


def test_transposed_and_replaced_tensors(tmp_path: Path) -> None:
    bias, embed = torch.tensor([1.0, 2.0, 3.0]), torch.full((4, 2), 5.0)
    tensors = {
        "layers.0.up.lora_A.weight": UP_A,
        "layers.0.up.lora_B.weight": UP_B,
        "layers.0.up.base_layer.bias": bias,
        "embed.base_layer.weight": embed,
        "embed.lora_embedding_A": torch.tensor([[0.0, 0.0, 1.0, 0.0]]),
        "embed.lora_embedding_B": torch.tensor([[1.0], [2.0]]),
    }
    adapter = open_adapter(write_adapter(tmp_path, tensors, fan_in_fan_out=True, bias="lora_only"))
    product = torch.tensor([[2.0, 0.0, -2.0], [4.0, 0.0, -4.0]])
    assert torch.equal(adapter.apply("layers.0.up.weight", torch.zeros(2, 3)), product)
    assert torch.equal(adapter.apply("layers.0.up.bias", torch.zeros(3)), bias)
    rows = adapter.apply("embed.weight", torch.zeros(4, 2))
    assert rows.tolist() == [[5.0, 5.0], [5.0, 5.0], [7.0, 9.0], [5.0, 5.0]]
    assert adapter.replaced_shape("embed.weight") == (4, 2)
    assert adapter.replaced_shape("layers.0.up.weight") is None


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "model.norm"]}),
        (
            "llama",
            {"target_modules": ["q_proj", "up_proj"], "r": 4, "use_rslora": True, "rank_pattern": {"up_proj": 3}},
        ),
        ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "alpha_pattern": {"o_proj": 3}}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["wte"]}),
        ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_what_peft_makes_of_it(
    architecture: TinyArchitecture, config: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    base, _ = write_tiny_models(tmp_path, 0, architecture, n_layers=2, dtype=dtype)
    theirs = make_with_peft(base, tmp_path / "adapter", **config)
    ours = Checkpoint.open("base+adapter", tmp_path)
    plain = Checkpoint.open("base", tmp_path)
    assert set(ours.names) == set(theirs)
    changed = 0
    for name, tensor in theirs.items():
        mine = ours.get(name)
        assert mine.dtype == tensor.dtype == plain.dtype(name)
        assert ours.shape(name) == tuple(mine.shape)
        changed += not torch.equal(mine, plain.get(name))
        # PEFT rounds the product before it adds it: an error of half a unit of either
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == "float32" else {"rtol": 2**-7, "atol": 2**-9}
        torch.testing.assert_close(mine, tensor, **tolerance)
    assert changed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "it: peft_type must be LORA, got IA3; merge such an adapter with peft's merge_and"),
        ({"use_dora": True}, "it: use_dora must be off, got True; merge such an adapter"),
        ({"target_parameters": ["experts"]}, r"target_parameters must be off, got \['experts'\]"),
        ({"something_new": 1}, "something_new must be off, got 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must leave the model as it is, got pissa; convert"),
        ({"r": 3}, "rank of layers.0.up must be 3 as in adapter_config.json, got 1"),
    ],
)
def test_other_adapters_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write_adapter(tmp_path, **config))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.up.lora_A.weight": UP_A}, "layers.0.up must have both factors, got .*lora_A.weight alone"),
        ({"layers.9.up.lora_A.weight": UP_A, "layers.9.up.lora_B.weight": UP_B}, "layers.9.up.weight must be a tensor"),
        ({"layers.0.up.lora_magnitude_vector": UP_A}, "must be LoRA factors or whole tensors, got .*magnitude_vector"),
        ({"head.weight": UP_A}, "head.weight must be a tensor of the model, which has none of that name"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(write_adapter(tmp_path, tensors))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    adapter = open_adapter(write_adapter(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"shape of layers.0.up.weight must match the model \[4, 2\], got \[3, 2\]"
    ):
        adapter.apply("layers.0.up.weight", torch.zeros(4, 2))


def test_a_model_without_the_prefix_of_the_adapter(tmp_path: Path) -> None:
    tensors = {"transformer.layers.0.up.lora_A.weight": UP_A, "transformer.layers.0.up.lora_B.weight": UP_B}
    assert "layers.0.up.weight" in open_adapter(write_adapter(tmp_path, tensors))


def test_an_adapter_with_more_tokens(tmp_path: Path) -> None:
    """Its embedding, head and tokenizer take the place of the model's, and its row count that of config.json."""
    base, _ = write_tiny_models(tmp_path, 0)
    rows = {name: torch.ones(321, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder = write_adapter(tmp_path / "adapter", rows)
    assert Checkpoint.open("base+adapter", tmp_path).tokenizer_path == base
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 320, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    checkpoint = Checkpoint.open("base+adapter", tmp_path)
    assert (checkpoint.vocab_size, checkpoint.vocabulary()["<new>"]) == (321, 320)
    assert checkpoint.shape("lm_head.weight") == tuple(checkpoint.get("lm_head.weight").shape) == (321, 16)
    assert not checkpoint.is_as_stored
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write_description(out, "bfloat16", copy_code=False)
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"]) == (321, "bfloat16")
    assert (out / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()

    write_adapter(tmp_path / "wrong", {"model.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"shape of model.norm.weight must match the model \[16\], got \[3\]"):
        Checkpoint.open("base+wrong", tmp_path)


def test_content_is_that_of_model_and_adapter(tmp_path: Path) -> None:
    write_tiny_models(tmp_path, 0)
    names = ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight")
    tensors = dict(zip(names, (torch.ones(1, 16), torch.ones(16, 1)), strict=True))
    write_adapter(tmp_path / "one", tensors)
    write_adapter(tmp_path / "same", tensors)
    write_adapter(tmp_path / "scaled", tensors, lora_alpha=3)
    write_adapter(tmp_path / "other", {names[0]: torch.ones(1, 16), names[1]: torch.zeros(16, 1)})
    references = ("base", "base+one", "base+same", "base+scaled", "base+other")
    plain, one, same, scaled, other = (Checkpoint.open(r, tmp_path).content_digest() for r in references)
    assert one == same
    assert len({plain, one, scaled, other}) == 4


def test_a_study_of_adapters(study_file: Callable[..., Path], tiny_models: Path, tmp_path: Path) -> None:
    """Searched, exported and merged by mergekit from the best merge's file: one and the same model."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from optuna_merge.cli.options import open_started
    from optuna_merge.merging.export import export
    from optuna_merge.study.folder import BEST_CONFIG
    from optuna_merge.study.objective import MergeObjective
    from optuna_merge.study.run import run_study

    shutil.copytree(tiny_models / "base", tmp_path / "base")
    for number, modules in enumerate((["q_proj", "down_proj"], ["v_proj"])):
        make_with_peft(tmp_path / "base", tmp_path / f"lora_{number}", target_modules=modules, r=4, lora_alpha=40)
    genome = {"models": ["base+lora_0", "./base+./lora_1"], "base_model": "base", "merge_method": "task_arithmetic"}
    objective = MergeObjective.from_file(study_file(genome=genome, study={"n_trials": 7, "seed": 1, "n_chunks": 2}))
    run_study(objective.config, objective)
    assert objective.space.labels == ("lora_0", "lora_1")
    file = yaml.safe_load((objective.config.storage_path / BEST_CONFIG).read_text())
    assert file["slices"][0]["sources"][0]["model"] == f"{tmp_path / 'base'}+{tmp_path / 'lora_0'}"

    trial = open_started(objective.config).trials[-1]
    folder = export(
        objective.recipe(trial),
        tmp_path / "merged",
        merger=objective.loader.merger,
        references=objective.models.spelling,
    )
    assert f"- `{tmp_path / 'base'}+{tmp_path / 'lora_1'}`" in (folder / "README.md").read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load((folder / "mergekit_config.yml").read_text()))
    options = MergeOptions(quiet=True, lora_merge_cache=str(tmp_path / "cache"), lora_merge_dtype="float32")
    run_merge(config, str(tmp_path / "theirs"), options)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)
