from __future__ import annotations

from typing import Any

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestBreadcrumbs(MethodConformance):
    method = "breadcrumbs"


class TestBreadcrumbsTies(MethodConformance):
    method = "breadcrumbs_ties"


def test_numbers_by_hand() -> None:
    task_vector = torch.tensor([[1.0, -9.0, 3.0, -4.0, 2.0]])
    base = torch.full((1, 5), 0.5)
    merged = merge_tensors("breadcrumbs", [base + task_vector], base, density=0.4, gamma=0.2, weight=[2.0])
    assert merged.tolist() == [[0.5, 0.5, 6.5, -7.5, 0.5]]
    merged = merge_tensors("breadcrumbs", [base + task_vector], base, density=0.4, gamma=0.0, weight=[2.0])
    assert merged.tolist() == [[0.5, -17.5, 0.5, -7.5, 0.5]]
    merged = merge_tensors("breadcrumbs", [base + task_vector], base, density=0.1, gamma=0.2, weight=[2.0])
    assert merged.equal(base)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("weight", [[0.5, 0.8, 0.3], [0.5, -0.8, 0.3]])
@pytest.mark.parametrize("density", [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.9, 0.1, 0.0001]])
@pytest.mark.parametrize("settings", [{}, {"gamma": [0.0, 0.3, 0.1], "normalize": True}, {"rescale": True}])
def test_mergekit_gives_the_same(
    method: str, weight: list[float], density: list[float], settings: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator) for _ in range(4))
    settings = settings | {"weight": weight, "density": density}
    relative = 2e-6 if "rescale" in settings else 1e-6  # norms are sums, which mergekit adds in another order
    ours, theirs = merge_tensors(method, models, base, **settings), mergekit_result(method, models, base, **settings)
    assert_same(ours, theirs, relative)
