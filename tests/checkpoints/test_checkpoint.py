from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.compare import check_compatible, compare
from optuna_merge.checkpoints.reference import resolve
from optuna_merge.checkpoints.tokenizer import read_vocabulary
from optuna_merge.checkpoints.write import write_checkpoint
from optuna_merge.errors import CheckpointError
from optuna_merge.testing.models import write_tiny_models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, (model,) = write_tiny_models(tmp_path_factory.mktemp("tiny"), 1)
    return base, model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    return write_tiny_models(tmp_path, 0)[0]


def _checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 1, "vocab_size": 4} | config))
    return Checkpoint.open(str(folder))


def _tensors(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"embed.weight": torch.zeros(4, 2), "layers.0.up.weight": torch.ones(3, 2), "norm.weight": torch.ones(2)}
    return tensors | {name.replace("__", "."): tensor for name, tensor in changed.items()}


def test_reads_what_safetensors_reads(tiny: tuple[Path, Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny[0]))
    expected = load_file(tiny[0] / "model.safetensors")
    assert sorted(checkpoint.names) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.get(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
    assert checkpoint.n_layers == 3
    assert checkpoint.layer_stack == "model.layers."
    assert checkpoint.nbytes == (tiny[0] / "model.safetensors").stat().st_size


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "gemma2", "qwen2", "mixtral"])
def test_counts_layers_of_any_decoder(tmp_path: Path, architecture: str) -> None:
    base, _ = write_tiny_models(tmp_path, 0, architecture, n_layers=2)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(str(base))
    assert checkpoint.n_layers == 2
    stated = dict(checkpoint.config)
    for key in ("num_hidden_layers", "n_layer"):
        stated.pop(key, None)
    (base / "config.json").write_text(json.dumps(stated))
    assert Checkpoint.open(str(base)).n_layers == 2


def test_model_and_adapter_are_two_references(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tiny[0]))
    base, model = (str(path) for path in tiny)
    mixed = resolve("org/name@v1+./model_0", tiny[0].parent)
    assert (mixed.path, mixed.adapter.path) == (tiny[0], tiny[1])
    assert mixed.name == f"org/name@base+{model}"
    assert mixed.spellings == {"org/name@base": "org/name@v1", model: model}
    local = resolve("base+org/lora", tiny[0].parent)
    assert local.spellings == {base: base, "org/lora@base": "org/lora"}
    with pytest.raises(CheckpointError, match=r"model './nowhere' must be an existing folder"):
        resolve("base+./nowhere", tiny[0].parent)
    with pytest.raises(
        CheckpointError, match=r"model_0: adapter must hold adapter_config.json, found none in .*model_0"
    ):
        Checkpoint.open("base+model_0", tiny[0].parent)


def test_a_folder_with_a_plus_is_a_folder(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a+b", "c+/d"):
        (tmp_path / name).mkdir(parents=True)
    assert resolve("a+b", tmp_path).adapter is None
    with pytest.raises(CheckpointError, match="path must not read like a model with an adapter; rename the folder"):
        resolve("c+/d", tmp_path)


def test_shard_layout_changes_no_tensor(tmp_path: Path) -> None:
    whole, _ = write_tiny_models(tmp_path / "whole", 0)
    shards, _ = write_tiny_models(tmp_path / "shards", 0, max_shard_size="20KB")
    one, many = Checkpoint.open(str(whole)), Checkpoint.open(str(shards))
    assert len(many.files) > 2
    assert sorted(one.names) == sorted(many.names)
    assert all(torch.equal(one.get(name), many.get(name)) for name in one.names)


def test_relative_reference_is_relative_to_the_file_that_holds_it(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    resolved = resolve(tiny[0].name, relative_to=tiny[0].parent)
    assert resolved.path == tiny[0].resolve()
    assert resolved.is_local
    assert resolved.name == str(tiny[0].resolve())


@pytest.mark.parametrize("reference", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_what_looks_like_a_path_is_never_fetched(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="must be an existing folder, found none at"):
        resolve(reference)


def test_unreachable_hub_names_both_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"'org/no-such-model' must be a folder or a model of the hub.*"
    ) as caught:
        resolve("org/no-such-model", tmp_path)
    assert str(tmp_path / "org/no-such-model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_reference_keeps_its_commit(tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tiny[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    resolved = resolve("org/name@v1", tiny[0])
    assert asked == [("org/name", "v1")]
    assert (resolved.name, resolved.reference) == ("org/name@base", "org/name@v1")
    assert not resolved.is_local


def test_digest_follows_content_and_not_the_folder(folder: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(str(folder)).content_digest()
    moved = folder.rename(tmp_path / "moved")
    assert Checkpoint.open(str(moved)).content_digest() == before
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(str(moved)).content_digest() != before


def test_digest_samples_a_large_tensor(tmp_path: Path) -> None:
    large = torch.zeros(3_000_000)
    one = _checkpoint(tmp_path / "a", _tensors(layers__0__up__weight=large)).content_digest()
    large[-1] = 1
    assert _checkpoint(tmp_path / "b", _tensors(layers__0__up__weight=large)).content_digest() != one


def test_digest_does_not_depend_on_shards(tmp_path: Path) -> None:
    whole, _ = write_tiny_models(tmp_path / "whole", 0)
    shards, _ = write_tiny_models(tmp_path / "shards", 0, max_shard_size="20KB")
    assert Checkpoint.open(str(whole)).content_digest() == Checkpoint.open(str(shards)).content_digest()


def test_missing_folder_and_missing_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must hold a config.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be readable JSON"):
        Checkpoint.open(str(tmp_path))


def test_pickle_is_refused_with_a_command_that_converts_it(folder: Path, tmp_path: Path) -> None:
    import subprocess

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"weights must be safetensors, got the pickle pytorch_model.bin"
    ) as caught:
        Checkpoint.open(str(folder))
    command = shlex.split(str(caught.value).partition("convert it once: ")[2].partition(" (a pickle")[0])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=900)
    converted = Checkpoint.open(command[-1])
    assert all(torch.equal(converted.get(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("n_bytes", [0, 5, 300, -1])
def test_truncated_weights_fail_at_open(folder: Path, n_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:n_bytes])
    with pytest.raises(CheckpointError, match=r"model.safetensors: must be a whole safetensors file, got: .*fetch it"):
        Checkpoint.open(str(folder))


def test_index_that_names_missing_files_or_tensors(tmp_path: Path) -> None:
    folder, _ = write_tiny_models(tmp_path, 0, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra.weight"] = content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"extra.weight must be in .*, which does not hold it"):
        Checkpoint.open(str(folder))
    next(iter(folder.glob("model-00002*"))).unlink()
    with pytest.raises(CheckpointError, match="must name existing files, missing: model-00002"):
        Checkpoint.open(str(folder))


def test_equal_models_have_no_problems(tiny: tuple[Path, Path]) -> None:
    assert compare([Checkpoint.open(str(path)) for path in tiny]) == []


def test_every_difference_of_tensors_is_found(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "a", _tensors(layers__0__a__weight=torch.ones(1)))
    second = _checkpoint(
        tmp_path / "b", _tensors(layers__0__b__weight=torch.ones(1), layers__0__up__weight=torch.ones(3, 5))
    )
    assert compare([first, second]) == [
        f"layers.0.a.weight: must be in every model, is in {first.reference} but not in {second.reference}",
        f"layers.0.up.weight: shape must match {first.reference} [3, 2], got [3, 5] in {second.reference}",
        f"layers.0.b.weight: must be in every model, is in {second.reference} but not in {first.reference}",
    ]


def test_vocabulary_rows_are_told_from_other_shapes(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "a", _tensors())
    second = _checkpoint(tmp_path / "b", _tensors(embed__weight=torch.zeros(6, 2)), vocab_size=6)
    with pytest.raises(CheckpointError, match=r"embed.weight: vocabulary rows must match .*; set tokenizer_source"):
        check_compatible([first, second])
    assert compare([first, second], tokenizer_source="base") == []


def test_architecture_and_depth_are_one_problem_each(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "a", _tensors(), model_type="llama")
    second = _checkpoint(tmp_path / "b", _tensors(), model_type="gpt2")
    third = _checkpoint(tmp_path / "c", _tensors(), model_type="llama", num_hidden_layers=2)
    problems = compare([first, second, third])
    assert len(problems) == 2
    assert "model_type must match" in problems[0]
    assert "number of layers must match" in problems[1]


def test_quantized_weights_are_refused_with_the_way_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_file(folder / "model.safetensors")
    stored = dict(plain)
    for name in [name for name in plain if "_proj." in name]:
        scale = plain[name].abs().max() / 448
        stored[name] = (plain[name] / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(
        CheckpointError, match=r"weights must not be quantized, got fp8; dequantize it once: "
    ) as caught:
        Checkpoint.open(str(folder))
    command = shlex.split(str(caught.value).partition("dequantize it once: ")[2])
    assert command[:2] == ["python", "-c"]
    monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
    exec(command[2], {})
    converted = Checkpoint.open(command[-1])
    assert converted.vocabulary() == read_vocabulary(folder, "")
    assert {name: converted.shape(name) for name in converted.names} == {n: tuple(t.shape) for n, t in plain.items()}
    for name, tensor in plain.items():
        assert (converted.get(name).float() - tensor).abs().max() <= 0.07 * tensor.abs().max()


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("mxfp4", r"t\.Mxfp4Config\(dequantize=True\)"),
        ("bitsandbytes", r"dtype='bfloat16'\)\.dequantize\(\)\.save_pretrained"),
        ("gptq", "merge the model from which it was made; transformers has no way back"),
    ],
)
def test_other_quantized_weights(tmp_path: Path, method: str, remedy: str) -> None:
    with pytest.raises(CheckpointError, match=rf"weights must not be quantized, got {method}; .*{remedy}"):
        _checkpoint(tmp_path / "a", _tensors(), quantization_config={"quant_method": method})


def test_eight_bit_weights_without_a_word_in_the_configuration(tmp_path: Path) -> None:
    eight_bit = _checkpoint(tmp_path / "b", _tensors(norm__weight=torch.ones(2).to(torch.float8_e4m3fn)))
    with pytest.raises(CheckpointError, match=r"dtype of norm.weight must be one of .* got F8_E4M3; merge the model"):
        eight_bit.dtype("norm.weight")


def test_stored_buffers_may_be_missing(tmp_path: Path) -> None:
    first = _checkpoint(tmp_path / "a", _tensors(layers__0__rotary_emb__inv_freq=torch.ones(2)))
    second = _checkpoint(tmp_path / "b", _tensors(layers__0__attn__masked_bias=torch.ones(2)))
    assert compare([first, second]) == []


def test_other_vocabulary_names_the_tokens(tmp_path: Path) -> None:
    base, (model,) = write_tiny_models(tmp_path, 1)
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"vocabulary of .* 2 tokens have another id: 'a' \(\d+ and \d+\), 'b'"):
        check_compatible([Checkpoint.open(str(base)), Checkpoint.open(str(model))])


def test_vocabulary_equals_that_of_transformers(tiny: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    assert Checkpoint.open(str(tiny[0])).vocabulary() == AutoTokenizer.from_pretrained(tiny[0]).get_vocab()


def test_written_shards_are_read_back(tmp_path: Path) -> None:
    tensors = {f"layers.0.t{number}.weight": torch.randn(10, 10) for number in range(5)}
    (tmp_path / "config.json").write_text("{}")
    files = write_checkpoint(tmp_path, iter(tensors.items()), max_shard_bytes=900)
    assert [file.name for file in files] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    read = Checkpoint.open(str(tmp_path))
    assert all(torch.equal(read.get(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    tensors = [("a", torch.zeros(2)), ("b", torch.zeros(100)), ("c", torch.zeros(2))]
    assert len(write_checkpoint(tmp_path, tensors, max_shard_bytes=16)) == 3
    with pytest.raises(CheckpointError, match="must hold at least one tensor"):
        write_checkpoint(tmp_path, [])
