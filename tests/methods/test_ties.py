from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestTies(MethodConformance):
    method = "ties"


def test_numbers_by_hand() -> None:
    base = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    first = base + torch.tensor([[4.0, -3.0, 2.0], [1.0, 0.5, 0.25]])  # density 1/2 keeps 4, -3, 2
    second = base + torch.tensor([[-2.0, -1.0, 6.0], [8.0, 0.0, 0.0]])  # keeps -2, 6, 8
    merged = merge_tensors("ties", [first, second], base, density=0.5, weight=[1.0, 1.0], normalize=False)
    assert merged.tolist() == [[5.0, -2.0, 9.0], [9.0, 1.0, 1.0]]
    # normalized by the weights that took part; 0.5 * -2 and 1 * 4 elect plus
    merged = merge_tensors("ties", [first, second], base, density=0.5, weight=[1.0, 0.5], normalize=True)
    assert merged.tolist() == [[5.0, -2.0, pytest.approx(1 + 5 / 1.5)], [9.0, 1.0, 1.0]]


@pytest.mark.parametrize("weight", [[0.5, 0.8, 0.3], [0.5, -0.8, 0.3], [0.5, -0.8, 0.3000001]])
@pytest.mark.parametrize("density", [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.9, 0.1, 0.0001], [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("settings", [{}, {"rescale": True, "lambda_": 0.7}, {"normalize": False}])
def test_mergekit_gives_the_same(weight: list[float], density: list[float], settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator) for _ in range(4))
    settings = settings | {"weight": weight, "density": density}
    relative = 2e-6 if "rescale" in settings else 1e-6  # norms are sums, which mergekit adds in another order
    ours, theirs = merge_tensors("ties", models, base, **settings), mergekit_result("ties", models, base, **settings)
    assert_same(ours, theirs, relative)


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    task_vector = torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0, 0.0])
    for n_kept, expected in [(1, [2]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])]:
        for chunk_elements in (1, 2, 100):
            merged = merge_tensors(
                "ties",
                [task_vector.view(2, 3)],
                torch.zeros(2, 3),
                density=n_kept / 6 + 1e-9,
                weight=[1.0],
                chunk_elements=chunk_elements,
            )
            assert merged.view(-1).nonzero().view(-1).tolist() == expected


def test_of_bfloat16_models_mergekit_keeps_other_entries_only_among_equals() -> None:
    generator = torch.Generator().manual_seed(1)
    base = (0.02 * torch.randn(300, 400, generator=generator)).bfloat16()
    models = [(base.float() + 0.002 * torch.randn(300, 400, generator=generator)).bfloat16() for _ in range(2)]
    settings = {"weight": [0.4, 0.7], "density": 0.5}
    ours, theirs = (f("ties", models, base, **settings) for f in (merge_tensors, mergekit_result))
    differing = ~torch.isclose(ours, theirs, rtol=1e-6, atol=1e-8)
    at_the_threshold = torch.zeros(300, 400, dtype=torch.bool)
    for model in models:
        magnitude = (model.float() - base.float()).abs()
        at_the_threshold |= magnitude == magnitude.view(-1).sort(descending=True).values[60_000 - 1]
    assert not (differing & ~at_the_threshold).any()
