from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestRam(MethodConformance):
    method = "ram"


class TestRamPlus(MethodConformance):
    method = "ramplus_tl"


BASE = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
FIRST = BASE + torch.tensor([[4.0, 2.0, 0.0], [8.0, 0.25, -6.0]])
SECOND = BASE + torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, -2.0]])


def test_numbers_by_hand() -> None:
    # shared: the means 3 and -4; unique to the first: 2, 8 and 0.25; unchanged: the third
    assert merge_tensors("ram", [FIRST, SECOND], BASE).tolist() == [[4.0, 3.0, 1.0], [9.0, 1.25, -3.0]]
    # up to 0.25 counts as unchanged
    assert merge_tensors("ram", [FIRST, SECOND], BASE, epsilon=0.25).tolist() == [[4.0, 3.0, 1.0], [9.0, 1.0, -3.0]]
    # the first shares 2 and has 2 of its own: rho 1, and its own count 1 + 0.5 * min(1, 0.75)
    merged = merge_tensors("ramplus_tl", [FIRST, SECOND], BASE, epsilon=0.25, r=0.5, alpha=0.75)
    assert merged.tolist() == [[4.0, 3.75, 1.0], [12.0, 1.0, -3.0]]
    # without the first two rows of the second, nothing is shared, and nothing is scaled
    assert merge_tensors("ramplus_tl", [FIRST, BASE], BASE, r=0.5, alpha=9.0).equal(FIRST)


@pytest.mark.parametrize("n_models", [1, 2, 4])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ram", {}),
        ("ram", {"epsilon": 0.7}),
        ("ramplus_tl", {"epsilon": 0.7}),
        ("ramplus_tl", {"epsilon": 1.5, "r": 0.8, "alpha": 3.0}),
        ("ramplus_tl", {"epsilon": 0.001, "r": 0.8, "alpha": 30.0}),  # nothing is unique
    ],
)
def test_mergekit_gives_the_same(method: str, settings: dict[str, Any], n_models: int) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator) for _ in range(n_models + 1))
    ours, theirs = (f(method, models, base, **settings) for f in (merge_tensors, mergekit_result))
    assert not torch.equal(ours, base)
    assert_same(ours, theirs)
