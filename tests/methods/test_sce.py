from __future__ import annotations

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestSce(MethodConformance):
    method = "sce"


def test_numbers_by_hand() -> None:
    first, second = torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[1.0, 1.0, 4.0]])
    # variances 1, 0, 9; half of the two varying ones: the last; energies 4 and 16; plus is elected
    assert merge_tensors("sce", [first, second], torch.zeros(1, 3), select_topk=0.5).tolist() == [[0.0, 0.0, 4.0]]
    # all: energies 14 and 18
    merged = merge_tensors("sce", [first, second], torch.zeros(1, 3))
    assert merged.tolist() == [[pytest.approx((14 * 3 + 18) / 32), pytest.approx(1.0), pytest.approx(4.0)]]


@pytest.mark.parametrize("select_topk", [0.0, 1e-5, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n_models", [1, 2, 3])
def test_mergekit_gives_the_same(select_topk: float, n_models: int) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator) for _ in range(n_models + 1))
    settings = {"select_topk": select_topk}
    assert_same(merge_tensors("sce", models, base, **settings), mergekit_result("sce", models, base, **settings))
