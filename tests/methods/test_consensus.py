from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same


class TestConsensusTaskArithmetic(MethodConformance):
    method = "consensus_ta"


class TestConsensusTies(MethodConformance):
    method = "consensus_ties"
    settings: ClassVar = {"density": 1.0}


BASE = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
FIRST = BASE + torch.tensor([[4.0, 8.0, 6.0, 0.0]])
SECOND = BASE + torch.tensor([[2.0, -1.0, -4.0, 0.0]])


def test_numbers_by_hand() -> None:
    settings = {"weight": [1.0, 1.0], "mask_lambda": 0.5, "k": 2.0}
    # sums 6, 7, 2, 0. |v_i| and half of |v - v_i|: 4, 1 and 2, 2; then 8, 0.5 but 1, 4; then both; then both
    assert merge_tensors("consensus_ta", [FIRST, SECOND], BASE, **settings).tolist() == [[7.0, 1.0, 3.0, 1.0]]
    # the second's entry of the first column is below 1.1 of the first's half; k = 1 drops only what matters to nobody
    strict = settings | {"mask_lambda": [0.5, 0.55]}
    assert merge_tensors("consensus_ta", [FIRST, SECOND], BASE, **strict).tolist() == [[1.0, 1.0, 3.0, 1.0]]
    strict["k"] = 1.0
    assert merge_tensors("consensus_ta", [FIRST, SECOND], BASE, **strict).tolist() == [[7.0, 8.0, 3.0, 1.0]]
    # ties of the 3 largest elects plus everywhere: sums 6, 8, 6; |v - v_2| is 4, 9, 10
    ties = settings | {"density": 0.75, "mask_lambda": 0.4}
    assert merge_tensors("consensus_ties", [FIRST, SECOND], BASE, **ties).tolist() == [[7.0, 1.0, 7.0, 1.0]]
    # normalized by the weights that took part: 2, 1 and 1
    merged = merge_tensors("consensus_ties", [FIRST, SECOND], BASE, normalize=True, **ties)
    assert merged.tolist() == [[4.0, 1.0, 7.0, 1.0]]


def papers(vectors: list[Tensor], total: Tensor, mask_lambda: list[float], k: float) -> Tensor:
    """The paper's formulas: the masks of the tasks, and the sum where at least ``k`` of them are 1."""
    masks = [v.abs() >= scale * (total - v).abs() for v, scale in zip(vectors, mask_lambda, strict=True)]
    return total * (torch.stack(masks).sum(0) >= k)


def trimmed(vector: Tensor, density: float) -> Tensor:
    least = vector.abs().view(-1).sort(descending=True).values[int(density * vector.numel()) - 1]
    return vector * (vector.abs() >= least)


@pytest.mark.parametrize("k", [0.0, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.3, 0.3, 0.3], [0.9, -0.4, 0.2]])
def test_the_papers_formulas_give_the_same(weight: list[float], k: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(97, 211, generator=generator, dtype=torch.float64) for _ in range(4))
    base, models = base.float().double(), [model.float().double() for model in models]
    mask_lambda = [0.2, 0.4, 0.6]
    settings: dict[str, Any] = {"weight": weight, "mask_lambda": mask_lambda, "k": k, "lambda_": 0.7}
    inputs = [model.float() for model in models], base.float()
    vectors = [w * (model - base) for w, model in zip(weight, models, strict=True)]
    total = torch.stack(vectors).sum(0)
    expected = base + 0.7 * papers(vectors, total, mask_lambda, k)
    assert_same(merge_tensors("consensus_ta", *inputs, **settings), expected.float())

    sparse = torch.stack([trimmed(vector, 0.5) for vector in vectors])
    elected = torch.where(sparse.sum(0) >= 0, 1.0, -1.0)
    total = torch.where(sparse * elected > 0, sparse, 0.0).sum(0)
    expected = base + 0.7 * papers(vectors, total, mask_lambda, k)
    assert_same(merge_tensors("consensus_ties", *inputs, **settings, density=0.5), expected.float())


def test_equal_weights_are_the_papers_scaling_factor() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.zeros(50, 40)
    models = [torch.randn(50, 40, generator=generator) for _ in range(3)]
    whole = merge_tensors("consensus_ta", models, base, weight=1.0)
    assert 0.1 < (whole == 0).float().mean() < 0.9
    assert torch.equal(merge_tensors("consensus_ta", models, base, weight=0.25), 0.25 * whole)
