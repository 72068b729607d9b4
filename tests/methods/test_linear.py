from __future__ import annotations

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestLinear(MethodConformance):
    method = "linear"


def test_numbers_by_hand() -> None:
    first, second = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.full((2, 3), 2.0)
    merged = merge_tensors("linear", [first, second], weight=[1.0, 3.0])
    assert merged.tolist() == [[1.75, 2.0, 2.25], [2.5, 2.75, 3.0]]
    merged = merge_tensors("linear", [first, second], weight=[1.0, 3.0], normalize=False)
    assert merged.tolist() == [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]


@pytest.mark.parametrize("weight", [[0.3, 0.9, 0.1], [1.5, -0.7, 0.1], [0.0, 0.0, 1.0]])
@pytest.mark.parametrize("normalize", [True, False])
def test_mergekit_gives_the_same(weight: list[float], normalize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    models = [torch.randn(97, 211, generator=generator) for _ in range(3)]
    ours = merge_tensors("linear", models, weight=weight, normalize=normalize)
    assert_same(ours, mergekit_result("linear", models, None, weight=weight, normalize=normalize))


def test_weights_that_sum_to_zero_are_not_finite_as_in_mergekit() -> None:
    models = [torch.ones(2), torch.full((2,), 3.0)]
    assert merge_tensors("linear", models, weight=[0.5, -0.5]).tolist() == [-torch.inf, -torch.inf]
    assert mergekit_result("linear", models, None, weight=[0.5, -0.5]).tolist() == [-torch.inf, -torch.inf]
