"""Tensors on their way to the device: copied ahead, waited for, let go of. The CPU's streams stand in for a GPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.merging import staging
from optuna_merge.merging.merger import Merger
from optuna_merge.merging.staging import Stage
from optuna_merge.testing.models import write_tiny_models
from tests.merging.test_merger import recipe_of

CPU = torch.device("cpu")


def tensors() -> list[Tensor]:
    return [torch.arange(6.0).view(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)]


def never() -> list[Tensor]:
    raise AssertionError("read twice")


def test_what_was_started_is_taken_and_not_read_again() -> None:
    stage, given = Stage(CPU, is_ahead=True), tensors()
    stage.start("a", given)
    taken = stage.take("a", never)
    for copy, tensor in zip(taken, given, strict=True):
        assert torch.equal(copy, tensor)
        assert copy.dtype == tensor.dtype
        assert copy.data_ptr() != tensor.data_ptr()


def test_another_name_is_read() -> None:
    stage = Stage(CPU, is_ahead=True)
    stage.start("a", [torch.zeros(1)])
    (taken,) = stage.take("b", lambda: [torch.ones(1)])
    assert taken.item() == 1


@pytest.mark.parametrize("is_large", [False, True])
def test_what_is_here_or_too_large_stays_where_it_is(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGED_BYTES", 8)
    stage, given = Stage(CPU, is_ahead=is_large), tensors()
    stage.start("a", given)
    assert [tensor.data_ptr() for tensor in stage.take("a", never)] == [tensor.data_ptr() for tensor in given]


def test_once_stopped_nothing_is_copied() -> None:
    stage, given = Stage(CPU, is_ahead=True), tensors()
    stage.start("a", given)
    stage.stop()
    assert not stage.is_ahead
    assert stage.take("a", lambda: given)[0].data_ptr() == given[0].data_ptr()


class Streams:
    """What is asked of streams, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: torch.device) -> Streams._Stream:  # noqa: N802
        return self._Stream(self.log, "copies")

    def current_stream(self, device: torch.device) -> Streams._Stream:
        return self._Stream(self.log, "main")

    def stream(self, stream: Streams._Stream) -> Streams._Stream:
        return stream

    class _Stream:
        def __init__(self, log: list[str], name: str) -> None:
            self.log, self.name = log, name

        def wait_stream(self, other: Streams._Stream) -> None:
            self.log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: str) -> None:
            self.log.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            return f"what {self.name} had to do"

        def __enter__(self) -> None:
            self.log.append(f"{self.name} begins")

        def __exit__(self, *_: object) -> None:
            self.log.append(f"{self.name} goes on")


@pytest.mark.parametrize("end", ["take", "drop", "stop", "start"])
def test_copies_wait_for_memory_and_memory_waits_for_copies(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a copy ends, its memory is free for others only after it."""
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    stage = Stage(CPU, is_ahead=True)
    stage.start("a", tensors())
    begun = ["copies waits for main", "copies begins", "copies goes on"]
    assert streams.log == begun
    if end == "take":
        stage.take("a", never)
    elif end == "start":
        stage.start("b", [])
    else:
        getattr(stage, end)()
    assert streams.log[:4] == [*begun, "main waits for what copies had to do"]


def test_a_merge_that_is_staged_is_the_same_and_reads_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = write_tiny_models(tmp_path_factory.mktemp("models"), 2)
    references = (str(base), *map(str, models))
    recipe = recipe_of(references)
    expected = dict(Merger.open(references).merge(recipe))
    merger = Merger.open(references)
    merger._stage = Stage(CPU, is_ahead=True)
    read: list[tuple[str, str]] = []
    get = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: read.append((self.reference, name)) or get(self, name))
    merged = dict(merger.merge(recipe))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert len(read) == len(set(read))
