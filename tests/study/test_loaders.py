"""The two ways of putting a recipe into the resident model, without real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from optuna_merge.errors import EngineError
from optuna_merge.recipe import Recipe, passthrough
from optuna_merge.study.loaders import LocalLoader, WorkerLoader

RECIPE = passthrough("base", n_layers=2, dtype="float32")


class Merger:
    """Yields one tensor, or raises; keeps the destination that it was given."""

    def __init__(self, device: str, error: Exception | None = None) -> None:
        self.device = torch.device(device)
        self._error = error

    def merge(self, recipe: Recipe, out: Callable[[str], Any] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        self.recipe, self.out = recipe, out
        if self._error is not None:
            raise self._error
        yield "w", torch.ones(1)


class Engine:
    """Keeps what it is asked to load."""

    device = "cpu"
    is_open = True

    def resident(self, name: str) -> None: ...

    def load_weights(self, tensors: Any) -> None:
        self.loaded = dict(tensors)

    def load_made(self, request: str) -> None:
        self.loaded = request

    def close(self) -> None:
        self.is_open = False


def local_loader(merger: Any, engine: Any) -> LocalLoader:
    return LocalLoader(merger, engine)


@pytest.mark.parametrize(("device", "is_in_place"), [("cpu", True), ("cuda:0", False)])
def test_a_local_merge_writes_into_the_resident_model_of_its_device(device: str, is_in_place: bool) -> None:
    merger, engine = Merger(device), Engine()
    loader = local_loader(merger, engine)
    loader.load(RECIPE)
    assert merger.recipe == RECIPE
    assert merger.out == (engine.resident if is_in_place else None)
    assert list(engine.loaded) == ["w"]
    assert loader.device == "cpu"
    loader.close()
    assert not engine.is_open


def test_memory_that_runs_out_in_the_engine_is_said() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee documentation")
    loader = local_loader(Merger("cpu", error), Engine())
    message = (
        r"^engine: a merge must fit into the memory of cpu while it is loaded, got CUDA out of memory. Tried to"
        r" allocate 2 GiB.; use engine.sources: disk, .* and run the same command again$"
    )
    with pytest.raises(EngineError, match=message):
        loader.load(RECIPE)
    with pytest.raises(RuntimeError, match=r"^another error$"):
        local_loader(Merger("cpu", RuntimeError("another error")), Engine()).load(RECIPE)


def test_workers_get_the_recipe_as_text() -> None:
    engine: Any = Engine()
    loader = WorkerLoader(engine)
    loader.load(RECIPE)
    assert Recipe.from_json(engine.loaded) == RECIPE
    assert loader.device == "cpu"
    loader.close()
    assert not engine.is_open
