from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.files import TensorFiles
from optuna_merge.errors import EngineError
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.placement import free_host_bytes, merge_seconds, place_checkpoints, plan_placement
from optuna_merge.recipe import GroupRecipe, ParameterSet, Recipe
from optuna_merge.testing.models import write_tiny_models

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    base, paths = write_tiny_models(tmp_path_factory.mktemp("models"))
    return {n: Checkpoint.open(str(path)) for n, path in zip(("base", "math", "code"), (base, *paths), strict=True)}


class _Large:
    """Looks like a checkpoint of one tensor of 5 GiB, which no test can hold."""

    copied: frozenset[str] = frozenset()

    def shape(self, name: str) -> tuple[int, ...]:
        return (5 * GIB // 2,)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "device", "gpu_free", "host_free", "placement", "n_gib"),
    [
        ("auto", CUDA, 20, 20, "gpu", 10),
        ("auto", CUDA, 9, 40, "host", 16),  # page-locked memory comes in powers of two
        ("auto", CUDA, 9, 16, "disk", 10),
        ("auto", CPU, 20, 40, "disk", 10),
        ("gpu", CUDA, 10, 0, "gpu", 10),
        ("host", CUDA, 20, 20, "host", 16),
        ("host", CPU, 0, 13, "host", 10),
        ("disk", CUDA, 20, 20, "disk", 10),
    ],
)
def test_sources_live_where_they_fit(
    wanted: str, device: torch.device, gpu_free: int, host_free: int, placement: str, n_gib: int
) -> None:
    plan = plan_placement(
        wanted,  # type: ignore[arg-type]
        [_Large(), _Large()],  # type: ignore[list-item]
        ["t"],
        device,
        gpu_free=gpu_free * GIB,
        host_free=host_free * GIB,
    )
    assert (plan.placement, plan.n_bytes) == (placement, n_gib * GIB)


@pytest.mark.parametrize(
    ("wanted", "device", "message"),
    [
        ("gpu", CPU, r"engine\.sources must be auto, host or disk when cpu merges, got gpu"),
        ("gpu", CUDA, r"engine\.sources must fit: 10\.00 GiB of models, 9\.00 GiB free on the GPU; use auto, host or"),
        ("host", CUDA, r"engine\.sources must fit: 16\.00 GiB of models, 8\.00 GiB of host memory to spare; use auto"),
    ],
)
def test_where_they_do_not_fit_is_refused(wanted: str, device: torch.device, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        plan_placement(
            wanted,  # type: ignore[arg-type]
            [_Large(), _Large()],  # type: ignore[list-item]
            ["t"],
            device,
            gpu_free=9 * GIB,
            host_free=10 * GIB,
        )


def test_sources_in_host_memory_are_read_once(models: dict[str, Checkpoint]) -> None:
    placed = place_checkpoints(models, "host", CPU)
    for reference, checkpoint in models.items():
        for name in checkpoint.names:
            kept = placed[reference].get(name)
            assert torch.equal(kept, checkpoint.get(name))
            assert kept.data_ptr() != checkpoint.get(name).data_ptr()
            assert placed[reference].get(name) is kept
        assert placed[reference].weights_digest == checkpoint.weights_digest


def test_a_merge_is_the_same_from_anywhere(models: dict[str, Checkpoint]) -> None:
    recipe = make_recipe(models, [0.3, 0.9])
    from_disk = dict(Merger(models).merge(recipe))
    from_host = dict(Merger(models, placement="host").merge(recipe))
    assert all(torch.equal(from_disk[name], from_host[name]) for name in from_disk)


def test_the_expected_seconds_come_from_a_sample(models: dict[str, Checkpoint]) -> None:
    plan = plan_placement("auto", models.values(), models["base"].names, CPU, gpu_free=0, host_free=free_host_bytes())
    seconds = merge_seconds(plan, models.values(), CPU)
    assert 0 < seconds < 60
    assert plan.n_bytes == sum(c.get(name).nbytes for c in models.values() for name in c.names)


def make_recipe(models: dict[str, Checkpoint], weights: list[float], last: list[float] | None = None) -> Recipe:
    n_layers = models["base"].n_layers
    sets = [ParameterSet(None, {}, {"weight": tuple(values)}) for values in (weights, last or weights)]
    groups = (
        GroupRecipe("first", (0, n_layers - 1), ("embedding",), (sets[0],)),
        GroupRecipe("last", (n_layers - 1, n_layers), ("head",), (sets[1],)),
    )
    return Recipe("task_arithmetic", ("math", "code"), "base", n_layers, groups, dtype="float32")


def test_only_the_groups_that_changed_are_written(models: dict[str, Checkpoint]) -> None:
    merger = Merger(models)
    resident = {name: torch.empty(models["base"].shape(name)) for name in merger.names}
    dict(merger.merge(make_recipe(models, [0.3, 0.9]), out=resident.get))
    for tensor in resident.values():
        tensor.fill_(7.0)  # what is left as it is will be seen
    other = make_recipe(models, [0.3, 0.9], last=[0.5, 0.5])
    merged = dict(merger.merge(other, out=resident.get))
    expected = dict(Merger(models).merge(other))
    last_layer = f"model.layers.{models['base'].n_layers - 1}."
    for name, tensor in merged.items():
        assert tensor is resident[name]
        is_last = name.startswith((last_layer, "lm_head.", "model.norm."))
        assert torch.equal(tensor, expected[name] if is_last else torch.full_like(tensor, 7.0)), name


def test_a_merge_that_was_cut_short_is_written_again(models: dict[str, Checkpoint]) -> None:
    merger = Merger(models)
    resident = {name: torch.empty(models["base"].shape(name)) for name in merger.names}
    first, second = make_recipe(models, [0.3, 0.9]), make_recipe(models, [0.1, 0.2])
    dict(merger.merge(first, out=resident.get))
    stream = merger.merge(second, out=resident.get)
    for _ in range(3):
        next(stream)
    stream.close()
    merged = dict(merger.merge(first, out=resident.get))
    expected = dict(Merger(models).merge(first))
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_two_names_of_one_destination_are_not_mixed_up(models: dict[str, Checkpoint]) -> None:
    merger = Merger(models)
    shared = torch.empty(models["base"].shape("model.norm.weight"))
    twins = ("model.layers.0.input_layernorm.weight", "model.norm.weight")

    def merge(recipe: Recipe) -> torch.Tensor:
        dict(merger.merge(recipe, out=lambda name: shared if name in twins else None))
        return shared.clone()

    first, second = make_recipe(models, [0.3, 0.9]), make_recipe(models, [0.3, 0.9], last=[0.5, 0.5])
    once = merge(first)
    merge(second)
    assert torch.equal(merge(first), once)


@pytest.fixture
def is_resident() -> Callable[[torch.Tensor], bool]:
    """Tells whether each page of a mapped tensor is in memory."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None:
        pytest.skip("the operating system does not say which pages are in memory")

    def look(tensor: torch.Tensor) -> bool:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        assert mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), pages) == 0
        return all(page & 1 for page in pages)

    return look


def test_tensors_are_read_ahead(tmp_path: Path, is_resident: Callable[[torch.Tensor], bool]) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(4 << 20)}, file)
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    files = TensorFiles([file], "x")
    if is_resident(files.get("t")):
        pytest.skip("the file system keeps its pages in memory")
    files.prefetch("t")
    deadline = time.monotonic() + 300
    while not is_resident(files.get("t")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_resident(files.get("t"))


def test_what_the_page_cache_holds_is_not_read_ahead(
    models: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    n_reads = iter([0, 0, 0, 0, 5, 5])  # before each merge, and after those that did not read ahead
    monkeypatch.setattr(Checkpoint, "prefetch", lambda self, name: asked.append(name))
    monkeypatch.setattr("optuna_merge.merging.merger.count_disk_waits", lambda: next(n_reads))
    merger = Merger(models)
    group = GroupRecipe("all", (0, 3), ("embedding", "head"), (ParameterSet(None, {}, {"weight": (0.5, 0.5)}),))
    recipe = Recipe("task_arithmetic", ("math", "code"), "base", 3, (group,))

    def n_asked() -> int:
        asked.clear()
        list(merger.merge(recipe))
        return len(asked)

    everything = len(models) * (len(merger.names) - 1)
    assert [n_asked() for _ in range(4)] == [everything, 0, 0, everything]
    monkeypatch.setattr("optuna_merge.merging.merger.count_disk_waits", lambda: 0)
    monkeypatch.setattr("optuna_merge.merging.merger.free_host_bytes", lambda: 0)
    merger = Merger(models)
    assert [n_asked() for _ in range(3)] == [everything] * 3
