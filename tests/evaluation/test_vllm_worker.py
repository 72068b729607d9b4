from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.errors import EngineError, NonFiniteMergeError
from optuna_merge.evaluation.engines.vllm_worker import checked, open_folder, raise_first

SHAPES = {"a": (2, 3), "b": (4,)}


def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def test_tensors_pass_in_the_engines_dtype() -> None:
    passed = dict(checked(tensors().items(), SHAPES, torch.float16))
    assert {name: tensor.dtype for name, tensor in passed.items()} == {"a": torch.float16, "b": torch.float16}
    assert passed["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tensor_that_must_not_reach_the_engine_does_not() -> None:
    good = tensors()
    cases: list[tuple[type[Exception], str, Iterable[tuple[str, Tensor]]]] = [
        (NonFiniteMergeError, "b: must be finite", [("a", good["a"]), ("b", torch.tensor([1, 2, torch.nan, 4]))]),
        (NonFiniteMergeError, "a: must be finite", [("a", good["a"] + 1e6)]),  # infinite once it is rounded
        (EngineError, r"a: shape must be \[2, 3\], got \[6\]", [("a", good["a"].reshape(6))]),
        (EngineError, "b: must be delivered once", [("b", good["b"]), ("b", good["b"])]),
        (EngineError, "c: must be in the checkpoint", [("c", good["a"])]),
        (EngineError, r"b: must be delivered, got nothing \(1 missing\)", [("a", good["a"])]),
    ]
    for error, message, stream in cases:
        passed: list[tuple[str, Tensor]] = []
        with pytest.raises(error, match=message):
            passed.extend(checked(stream, SHAPES, torch.float16))
        assert all(tensor.isfinite().all() and tuple(tensor.shape) == SHAPES[name] for name, tensor in passed)
        assert len(passed) < 2


def test_tensors_without_floats_and_empty_ones_pass() -> None:
    stream = {"n": torch.tensor([3]), "e": torch.empty(0, 2)}
    passed = dict(checked(stream.items(), {"n": (1,), "e": (0, 2)}, torch.bfloat16))
    assert passed["n"].dtype == torch.int64


def test_a_folder_gives_its_tensors(tmp_path: Path) -> None:
    for name, tensor in tensors().items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    read = dict(open_folder("", "cpu")(str(tmp_path)))
    read["a"].zero_()  # its own memory: the file stays as it is
    again = dict(open_folder("", "cpu")(str(tmp_path)))
    assert again["a"].equal(tensors()["a"])
    assert again["b"].equal(tensors()["b"])


def test_an_error_of_a_worker_is_raised_as_what_it_was() -> None:
    raise_first([{}, {}])
    with pytest.raises(NonFiniteMergeError, match=r"^x: must be finite$"):
        raise_first([{}, {"error": "NonFiniteMergeError", "message": "x: must be finite"}])
