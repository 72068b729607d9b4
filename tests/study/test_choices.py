from __future__ import annotations

import pytest

from optuna_merge.study.choices import (
    choose_backend,
    choose_dtype,
    choose_granularity,
    choose_limit,
    choose_n_trials,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("n_layers", "n_models", "n_documents", "granularity"),
    [
        (32, 3, 1000, 8),  # 4 groups x 3 models
        (6, 3, 600, 2),  # 3 groups: 4 would need 1.5 layers each
        (30, 2, 1000, 5),  # 6 groups
        (32, 1, 1000, 3),  # 11 groups; 12 would need 2.7 layers each
        (32, 3, 60, 16),  # 6 weights, one for every ten documents
        (32, 3, 20, 0),  # never less than one group
        (32, 20, 5000, 0),
        (2, 3, 1000, 1),  # no more groups than layers
    ],
)
def test_layers_in_a_group(n_layers: int, n_models: int, n_documents: int, granularity: int) -> None:
    choice = choose_granularity(n_layers, n_models, n_documents)
    assert choice.value == granularity
    assert (f"only {n_documents} documents" in choice.reason) == (n_documents < 120)


def test_trials_grow_with_the_weights() -> None:
    assert choose_n_trials(7, 12).value == 100  # 7 + 84
    assert choose_n_trials(7, 9).value == 70
    assert choose_n_trials(6, 0).value == 10


def test_dtype_by_device_and_memory() -> None:
    def dtype(stored: str, *, on_gpu: bool, host_free: int = 64 * GIB) -> str:
        return choose_dtype(stored, 2 * GIB, on_gpu=on_gpu, host_free=host_free).value

    assert dtype("float32", on_gpu=True) == "bfloat16"
    assert dtype("float16", on_gpu=True) == "float16"
    assert dtype("bfloat16", on_gpu=False) == "float32"
    assert dtype("bfloat16", on_gpu=False, host_free=16 * GIB) == "float32"  # 8 GiB are half of it
    assert dtype("bfloat16", on_gpu=False, host_free=15 * GIB) == "bfloat16"
    assert dtype("float32", on_gpu=False, host_free=1 * GIB) == "float32"


def test_vllm_where_it_pays() -> None:
    backends = {
        (generates, on_gpu, has_vllm): choose_backend(generates=generates, on_gpu=on_gpu, has_vllm=has_vllm).value
        for generates in (False, True)
        for on_gpu in (False, True)
        for has_vllm in (False, True)
    }
    assert [given for given, backend in backends.items() if backend == "vllm"] == [(True, True, True)]


def test_documents_are_left_out_of_a_study_that_takes_longer_than_a_night() -> None:
    assert choose_limit(0, 288, 100, [1000, 200]) is None  # 8 hours
    shorter = choose_limit(0, 576, 100, [1000, 200])  # 16 hours: 600 of 1200 documents
    assert shorter is not None
    assert shorter.value == 400
    assert "would take about 16 hours here, with these about 8" in shorter.reason
    slow_merges = choose_limit(144, 432, 100, [1000, 200])  # 4 hours of merging are left as they are: 400 documents
    assert slow_merges is not None
    assert slow_merges.value == 200
    longest = choose_limit(9000, 9000, 100, [1000, 200])
    assert longest is not None
    assert longest.value == 100
    assert choose_limit(0, 1e6, 100, [90, 100]) is None  # no task has more
