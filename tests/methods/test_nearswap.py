from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestNearswap(MethodConformance):
    method = "nearswap"
    n_models = 1
    settings: ClassVar = {"t": 1e9}


def test_numbers_by_hand() -> None:
    base, model = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 4.0, 1.0]])
    assert merge_tensors("nearswap", [model], base, t=1.0).tolist() == [[0.5, 1.0, 1.0]]


@pytest.mark.parametrize("t", [0.0, 0.01, 0.5])
def test_mergekit_gives_the_same(t: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base, model = (torch.randn(97, 211, generator=generator) for _ in range(2))
    assert_same(merge_tensors("nearswap", [model], base, t=t), mergekit_result("nearswap", [model], base, t=t))
