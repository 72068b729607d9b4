from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestTaskArithmetic(MethodConformance):
    method = "task_arithmetic"


def test_numbers_by_hand() -> None:
    base = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    first, second = base + torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]]), base - 1
    merged = merge_tensors("task_arithmetic", [first, second], base, weight=[0.5, 2.0])
    assert merged.tolist() == [[-0.5, 0.0, 0.5], [0.0, 0.0, 2.0]]
    merged = merge_tensors("task_arithmetic", [first, second], base, weight=[0.5, 1.5], normalize=True, lambda_=2.0)
    assert merged.tolist() == [[0.0, 0.5, 1.0], [0.5, 0.5, 2.5]]


@pytest.mark.parametrize("weight", [[0.3, 0.9, 0.1], [1.5, -0.7, 0.1], [0.5, -0.25, -0.25]])
@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"normalize": True, "lambda_": 0.3}])
def test_mergekit_gives_the_same(weight: list[float], settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator) for _ in range(4))
    ours = merge_tensors("task_arithmetic", models, base, weight=weight, **settings)
    assert_same(ours, mergekit_result("task_arithmetic", models, base, weight=weight, **settings))
