from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same


class TestTsvM(MethodConformance):
    method = "tsv_m"

    def test_identical_models_give_that_model(self) -> None:
        """Of a rank up to a third: three models keep no more each. Their directions are shared, so each has a third."""
        base = self._random((13, 37), 0)
        model = base + 0.1 * self._random((13, 4), 1) @ self._random((4, 37), 2)
        torch.testing.assert_close(merge_tensors("tsv_m", [model] * 3, base), model, rtol=1e-6, atol=1e-6)


class TestIsoC(MethodConformance):
    method = "iso_c"

    def test_identical_models_give_that_model(self) -> None:
        """If all directions of its change are equally long, three such models give three times the change."""
        base, change = self._random((13, 37), 0), torch.linalg.qr(self._random((37, 13), 1)).Q.T
        merged = merge_tensors("iso_c", [base + change] * 3, base, lambda_=1 / 3)
        torch.testing.assert_close(merged, base + change, rtol=1e-6, atol=1e-6)


HALF = math.sqrt(0.5)


def test_tsv_m_by_hand() -> None:
    base = torch.zeros(2, 2)
    first = torch.tensor([[8.0, 0.0], [0.0, 1.0]])  # keeps 8 e1 e1^T
    second = 4 * HALF * torch.tensor([[1.0, 0.0], [1.0, 0.0]]) + torch.tensor([[0.0, 0.5], [0.0, -0.5]])  # 4 d e1^T
    # The right vectors are equal up to sign: each becomes e1 / sqrt(2). The left ones are e1 and d, 45 degrees apart:
    # turned away from each other by 22.5 degrees each, they are at -22.5 and 67.5 degrees.
    angle = math.radians(22.5)
    expected = torch.zeros(2, 2)
    expected[:, 0] = HALF * torch.tensor(
        [8 * math.cos(angle) + 0.5 * 4 * math.sin(angle), -8 * math.sin(angle) + 0.5 * 4 * math.cos(angle)]
    )
    torch.testing.assert_close(merge_tensors("tsv_m", [first, second], base, weight=[1.0, 0.5]), expected)
    # A vector gets the mean of the task vectors at weights of 1.
    merged = merge_tensors("tsv_m", [torch.tensor([8.0, 1.0]), torch.tensor([4.0, 3.0])], torch.zeros(2))
    assert merged.tolist() == [6.0, 2.0]


def test_iso_c_by_hand() -> None:
    base = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    first, second = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 2.0]]), torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    # values 8 and 2, mean 5
    merged = merge_tensors("iso_c", [base + first, base + second], base, lambda_=0.5)
    torch.testing.assert_close(merged, torch.tensor([[3.5, 1.0, 1.0], [1.0, 1.0, 3.5]]))
    # of rank 1, values 8 and 0: the direction that is not there gets nothing
    merged = merge_tensors("iso_c", [base + second, base + torch.diag(torch.tensor([5.0, 0.0, 0.0]))[:2]], base)
    torch.testing.assert_close(merged, torch.tensor([[5.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))
    merged = merge_tensors("iso_c", [torch.tensor([8.0, 1.0]), torch.tensor([4.0, 3.0])], torch.zeros(2), lambda_=2.0)
    assert merged.tolist() == [12.0, 4.0]


def orthonormal(vectors: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(vectors, full_matrices=False)
    return left @ right


def papers_tsv_m(changes: list[Tensor], weights: list[float]) -> Tensor:
    """The paper's steps: decompose, cut to an equal share of the rank, put side by side, orthogonalize, multiply."""
    n_kept = min(changes[0].shape) // len(changes)
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left = orthonormal(torch.cat([u[:, :n_kept] for u, _, _ in parts], dim=1))
    values = torch.cat([weight * s[:n_kept] for (_, s, _), weight in zip(parts, weights, strict=True)])
    right = orthonormal(torch.cat([v[:n_kept] for _, _, v in parts]))
    return left @ torch.diag(values) @ right


def papers_iso_c(changes: list[Tensor]) -> Tensor:
    left, values, right = torch.linalg.svd(torch.stack(changes).sum(0), full_matrices=False)
    return left @ torch.diag(torch.full_like(values, float(values.mean()))) @ right


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (50, 50), (200, 11)])
@pytest.mark.parametrize("n_models", [1, 2, 3])
def test_the_papers_formulas_give_the_same(shape: tuple[int, int], n_models: int) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(shape, generator=generator) for _ in range(n_models + 1))
    changes = [model.double() - base.double() for model in models]
    weights = [1.0, 0.3, -0.6][:n_models]
    expected = base.double() + 0.7 * papers_tsv_m(changes, weights)
    assert_same(merge_tensors("tsv_m", models, base, weight=weights, lambda_=0.7), expected.float())
    expected = base.double() + 0.7 * papers_iso_c(changes)
    assert_same(merge_tensors("iso_c", models, base, lambda_=0.7), expected.float())


def test_what_a_low_rank_leaves_open_stays_empty() -> None:
    generator = torch.Generator().manual_seed(1)

    def adapter() -> Tensor:
        return torch.randn(60, 2, generator=generator) @ torch.randn(2, 48, generator=generator)

    base, changes = torch.zeros(60, 48), [adapter(), adapter()]
    for method in ("tsv_m", "iso_c"):
        values = torch.linalg.svdvals(merge_tensors(method, changes, base).double())
        assert (values > 1e-3 * values[0]).sum() == (values > 1e-6 * values[0]).sum() == 4
