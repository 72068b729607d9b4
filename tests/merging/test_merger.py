from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.errors import CheckpointError, MergeError
from optuna_merge.merging.merger import Merger
from optuna_merge.methods import METHODS, find_method
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe, passthrough
from optuna_merge.testing.models import write_tiny_models
from tests import processes


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    base, models = write_tiny_models(tmp_path_factory.mktemp("tiny"), 2)
    return tuple(map(str, (base, *models)))


def recipe_of(
    references: tuple[str, ...],
    method: str = "task_arithmetic",
    weights: tuple[float, ...] = (0.3, 0.9),
    **fields: object,
) -> Recipe:
    """A recipe of as many of the models as the method takes."""
    declared = find_method(method)
    models = references[1:][: declared.n_models[1]]
    per_model = {parameter.name for parameter in declared.parameters if parameter.per_model}
    values = {"weight": weights, "density": (0.5,) * len(models)}
    values = {name: value[: len(models)] for name, value in values.items() if name in per_model}
    group = GroupRecipe("all", (0, 3), ("embedding", "head"), (ParameterSet(None, {}, values),))
    base = None if declared.base == "none" or method == "slerp" else references[0]
    recipe = Recipe(method, models, base, 3, (group,))
    return dataclasses.replace(recipe, **fields)  # type: ignore[arg-type]


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def test_streams_every_tensor_in_the_order_of_the_base(references: tuple[str, ...]) -> None:
    merger = Merger.open(references)
    merged = list(merger.merge(recipe_of(references, dtype="bfloat16")))
    base = Checkpoint.open(references[0])
    assert [name for name, _ in merged] == list(base.names)
    assert all(tensor.dtype == torch.bfloat16 and tuple(tensor.shape) == base.shape(n) for n, tensor in merged)
    assert len({tensor.data_ptr() for _, tensor in merged}) == len(merged)


def test_each_layer_group_and_filter_has_its_own_weights(references: tuple[str, ...]) -> None:
    def group(name: str, layers: tuple[int, int], roles: tuple[str, ...], *weights: float) -> GroupRecipe:
        sets = tuple(
            ParameterSet(f, {}, {"weight": (w, 0.0)})
            for f, w in zip(("mlp", None)[-len(weights) :], weights, strict=True)
        )
        return GroupRecipe(name, layers, roles, sets)  # type: ignore[arg-type]

    groups = (
        group("embedding", (0, 0), ("embedding",), 0.5),
        group("layers_00_01", (0, 2), (), 0.25, 0.75),
        group("layers_02_02", (2, 3), ("head",), 1.0),
    )
    recipe = Recipe("task_arithmetic", references[1:], references[0], 3, groups)
    merger = Merger.open(references)
    base, model = (merger.checkpoints[reference] for reference in references[:2])
    expected = {
        "model.embed_tokens.weight": 0.5,
        "model.layers.0.mlp.up_proj.weight": 0.25,
        "model.layers.1.self_attn.q_proj.weight": 0.75,
        "model.layers.2.mlp.up_proj.weight": 1.0,
        "lm_head.weight": 1.0,
        "model.norm.weight": 1.0,
    }
    merged = dict(merger.merge(recipe))
    for name, weight in expected.items():
        wanted = base.get(name) + weight * (model.get(name) - base.get(name))
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunk_size_threads_and_shards_change_no_bit(
    method: str, dtype: str, references: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = recipe_of(references, method, dtype=dtype)
    expected = bits(dict(Merger.open(references).merge(recipe)))
    checkpoints = {reference: Checkpoint.open(reference) for reference in references}
    for chunk_elements in (17, 97, 4096):
        merger = Merger(checkpoints, chunk_elements=chunk_elements)
        assert bits(dict(merger.merge(recipe))) == expected
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            assert bits(dict(Merger(checkpoints).merge(recipe))) == expected
    finally:
        torch.set_num_threads(before)
    base, models = write_tiny_models(tmp_path, 2, max_shard_size="20KB")
    sharded = {r: Checkpoint.open(str(path)) for r, path in zip(references, (base, *models), strict=True)}
    assert bits(dict(Merger(sharded).merge(recipe))) == expected


def test_hash_seed_changes_no_bit(references: tuple[str, ...]) -> None:
    script = (
        "import sys, hashlib; from optuna_merge.merging.merger import Merger; from optuna_merge.recipe import Recipe\n"
        "recipe = Recipe.from_json(sys.argv[1]); digest = hashlib.sha256()\n"
        "for name, tensor in Merger.open(recipe.references).merge(recipe):\n"
        "    digest.update(name.encode() + tensor.numpy().tobytes())\n"
        "print(digest.hexdigest())"
    )
    there = subprocess.run(
        [sys.executable, "-c", script, recipe_of(references).to_json()],
        env=os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    here = hashlib.sha256()
    for name, tensor in Merger.open(references).merge(recipe_of(references)):
        here.update(name.encode() + tensor.numpy().tobytes())
    assert there.strip() == here.hexdigest()


def test_writes_into_the_memory_it_is_given(references: tuple[str, ...]) -> None:
    merger = Merger.open(references)
    recipe = recipe_of(references)
    resident = {name: torch.full(merger.checkpoints[references[0]].shape(name), torch.nan) for name in merger.names}
    del resident["model.norm.weight"]
    merged = dict(merger.merge(recipe, out=resident.get))
    expected = dict(merger.merge(recipe))
    assert bits(merged) == bits(expected)
    assert all(merged[name] is tensor for name, tensor in resident.items())


@pytest.mark.parametrize(
    "destination", [torch.empty(320, 16, dtype=torch.float16), torch.empty(16, 320).T, torch.empty(5120)]
)
def test_a_destination_that_does_not_fit_is_refused(references: tuple[str, ...], destination: torch.Tensor) -> None:
    merger = Merger.open(references)
    with pytest.raises(MergeError, match=r"lm_head.weight: (destination must be contiguous|shape must be \[320, 16\])"):
        list(merger.merge(recipe_of(references), out=lambda name: destination if "lm_head" in name else None))


def test_sources_are_never_written(references: tuple[str, ...]) -> None:
    before = [Path(reference, "model.safetensors").read_bytes() for reference in references]
    merger = Merger.open(references)
    for method in METHODS:
        for _, tensor in merger.merge(recipe_of(references, method)):
            tensor.fill_(7)
    assert [Path(reference, "model.safetensors").read_bytes() for reference in references] == before
    assert (merger.checkpoints[references[1]].get("lm_head.weight") != 7).any()


def test_an_interrupted_merge_leaves_nothing_behind(references: tuple[str, ...]) -> None:
    merger = Merger.open(references)
    expected = bits(dict(merger.merge(recipe_of(references))))
    stream = merger.merge(recipe_of(references, weights=(5.0, 5.0)))
    next(stream)
    stream.close()
    assert bits(dict(merger.merge(recipe_of(references)))) == expected


def test_passthrough_copies_and_rounds(references: tuple[str, ...]) -> None:
    merger = Merger.open(references)
    for name, tensor in merger.merge(passthrough(references[2], n_layers=3, dtype="float16")):
        assert torch.equal(tensor, merger.checkpoints[references[2]].get(name).half())


def test_mixed_dtypes_are_merged_in_float32(references: tuple[str, ...], tmp_path: Path) -> None:
    _, models = write_tiny_models(tmp_path, 2, dtype="bfloat16")
    mixed = (references[0], references[1], str(models[1]))
    merger = Merger.open(mixed)
    merged = dict(merger.merge(recipe_of(mixed)))
    base, a, b = (merger.checkpoints[reference].get("lm_head.weight").float() for reference in mixed)
    torch.testing.assert_close(
        merged["lm_head.weight"], base + 0.3 * (a - base) + 0.9 * (b - base), rtol=1e-6, atol=1e-7
    )


def test_constants_are_copied_from_the_base(references: tuple[str, ...], tmp_path: Path) -> None:
    base, models = write_tiny_models(tmp_path, 2)
    for number, folder in enumerate((base, *models)):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float(number))
        tensors["model.position_ids"] = torch.arange(4)
        if number != 2:
            tensors["model.layers.0.self_attn.masked_bias"] = torch.ones(1)
        save_file(tensors, folder / "model.safetensors")
    own = tuple(map(str, (base, *models)))
    merged = dict(Merger.open(own).merge(recipe_of(own, dtype="bfloat16")))
    assert merged["model.layers.0.self_attn.rotary_emb.inv_freq"].tolist() == [0, 0, 0, 0]
    assert merged["model.position_ids"].tolist() == [0, 1, 2, 3]
    assert merged["model.position_ids"].dtype == torch.int64
    assert "model.layers.0.self_attn.masked_bias" not in merged


def test_weights_that_sum_to_zero_give_a_merge_that_is_not_finite(references: tuple[str, ...]) -> None:
    """As in mergekit; whoever scores the merge refuses it."""
    merged = dict(Merger.open(references).merge(recipe_of(references, "linear", (0.5, -0.5))))
    assert not merged["lm_head.weight"].isfinite().any()


def test_a_recipe_that_does_not_fit_is_refused(references: tuple[str, ...]) -> None:
    merger = Merger.open(references)
    for change, message in [
        ({"models": ("elsewhere",)}, "models must be among .*, got 'elsewhere'"),
        ({"base_model": None}, "task_arithmetic must have a base_model"),
        ({"models": references[:1]}, "must have at least 1 models besides the base, got 0"),
        ({"n_layers": 4}, "n_layers must be 3 as in the models, got 4"),
    ]:
        with pytest.raises(MergeError, match=message):
            next(merger.merge(dataclasses.replace(recipe_of(references), **change)))  # type: ignore[arg-type]


def test_models_of_other_shapes_are_refused(references: tuple[str, ...], tmp_path: Path) -> None:
    other, _ = write_tiny_models(tmp_path, 0, n_layers=2)
    with pytest.raises(CheckpointError, match="number of layers must match"):
        Merger.open([*references, str(other)])


def test_a_failing_method_names_the_tensor(references: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(inputs: object, out: torch.Tensor) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr("optuna_merge.methods.linear.linear", fails)
    with pytest.raises(MergeError, match=r"lm_head.weight: linear failed: no luck"):
        dict(Merger.open(references).merge(recipe_of(references, "linear")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; nothing installs one")
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_cuda_gives_what_the_cpu_gives(method: str, references: tuple[str, ...]) -> None:
    on_gpu = dict(Merger.open(references, device="cuda").merge(recipe_of(references, method)))
    for name, tensor in Merger.open(references).merge(recipe_of(references, method)):
        torch.testing.assert_close(on_gpu[name].cpu(), tensor, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def large(references: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The models, each with a tensor of 96 MiB more: larger than what an allocator keeps at hand."""
    folders = []
    for number, reference in enumerate(references):
        folder = tmp_path_factory.mktemp("large") / Path(reference).name
        shutil.copytree(reference, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[LARGE] = torch.full((6 << 10, 4 << 10), 1.0 + number)
        save_file(tensors, folder / "model.safetensors")
        folders.append(str(folder))
    return tuple(folders)


LARGE = "model.layers.0.mlp.large_proj.weight"


def test_sources_on_disk_take_none_of_the_process_s_own_memory(large: tuple[str, ...]) -> None:
    """So that several workers of one machine hold them once, in the page cache."""

    def own_bytes() -> int:
        rows = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith(("Anonymous:", "Private_Dirty:")))

    checkpoints = {reference: Checkpoint.open(reference) for reference in large}
    merger, recipe = Merger(checkpoints, placement="disk"), recipe_of(large)
    resident = {name: torch.zeros(checkpoints[large[0]].shape(name)) for name in merger.names}
    before = own_bytes()
    for _ in merger.merge(recipe, out=resident.get):
        pass
    n_bytes = sum(checkpoint.nbytes for checkpoint in checkpoints.values())
    assert n_bytes > 200 << 20
    assert own_bytes() - before < n_bytes / 4


def test_memory_that_is_out_is_said_and_the_merger_can_go_on(large: tuple[str, ...]) -> None:
    merger, recipe = Merger.open(large), recipe_of(large, dtype="float32")
    message = (
        rf"^{LARGE}: merging must fit into the memory of cpu, got .*allocate.*; use a smaller engine.batch_size or"
        r" fewer workers, and run the same command again$"
    )
    with processes.memory_up_to(16 << 20), pytest.raises(MergeError, match=message):
        for _ in merger.merge(recipe):
            pass
    merged = dict(merger.merge(recipe))
    assert torch.equal(merged[LARGE], torch.full((6 << 10, 4 << 10), 1 + 0.3 * 1 + 0.9 * 2))


def test_where_sources_do_not_fit_the_message_says_where_they_may_live(large: tuple[str, ...]) -> None:
    merger = Merger({reference: Checkpoint.open(reference) for reference in large}, placement="host")
    with processes.memory_up_to(16 << 20), pytest.raises(MergeError, match=r"; use engine.sources: disk, a smaller"):
        dict(merger.merge(recipe_of(large)))


def test_out_of_memory_merges_smaller_pieces_to_the_same_bits(large: tuple[str, ...]) -> None:
    recipe = recipe_of(large, "ties", dtype="bfloat16")
    checkpoints = {reference: Checkpoint.open(reference) for reference in large}
    merger = Merger(checkpoints, chunk_elements=1 << 24)
    resident = {name: torch.empty(checkpoints[large[0]].shape(name), dtype=torch.bfloat16) for name in merger.names}
    expected = bits(dict(Merger(checkpoints).merge(recipe)))
    with processes.memory_up_to(64 << 20):
        merged = dict(merger.merge(recipe, out=resident.get))
    assert merger._chunk_elements < 1 << 24
    assert bits(merged) == expected
