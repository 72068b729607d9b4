from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from optuna_merge.errors import MethodError
from optuna_merge.methods.choice import slerp_choice
from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class WithoutBase(MethodConformance):
    def _models(self, shape: tuple[int, ...] = (13, 37), n_models: int | None = None) -> Any:
        return super()._models(shape, n_models)[0], None


class TestSlerp(WithoutBase):
    method = "slerp"
    n_models = 2


class TestNuslerp(MethodConformance):
    method = "nuslerp"
    n_models = 2


class TestNuslerpWithoutBase(WithoutBase):
    method = "nuslerp"
    n_models = 2


class TestMultislerp(MethodConformance):
    method = "multislerp"


class TestMultislerpWithoutBase(WithoutBase):
    method = "multislerp"


class TestKarcher(WithoutBase):
    method = "karcher"


class TestModelStock(MethodConformance):
    method = "model_stock"


def random_models(n_models: int, spread: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(97, 211, generator=generator)
    return [base + spread * torch.randn(97, 211, generator=generator) for _ in range(n_models)], base


RIGHT, UP = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def test_arcs_by_hand() -> None:
    half, third = math.sqrt(0.5), math.pi / 6
    assert merge_tensors("slerp", [UP], RIGHT, t=0.5).tolist() == [[pytest.approx(half), pytest.approx(half)]]
    on_the_way = [[pytest.approx(math.cos(third)), pytest.approx(math.sin(third))]]
    assert merge_tensors("slerp", [UP], RIGHT, t=1 / 3).tolist() == on_the_way
    assert merge_tensors("nuslerp", [RIGHT, UP], weight=[2.0, 1.0]).tolist() == on_the_way
    mean = [[pytest.approx(half * 3), pytest.approx(half * 3)]]  # mean direction, mean norm
    assert merge_tensors("multislerp", [RIGHT * 2, UP * 4], weight=[1.0, 1.0]).tolist() == mean
    assert merge_tensors("karcher", [RIGHT * 2, UP * 4]).tolist() == mean
    # task vectors at a right angle: cosine 0, so the base
    assert merge_tensors("model_stock", [RIGHT, UP], torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    assert merge_tensors("model_stock", [RIGHT, RIGHT + UP], torch.zeros(1, 2)).tolist() == [
        [pytest.approx(2 * half / (1 + half)), pytest.approx(half / (1 + half))]
    ]


@pytest.mark.parametrize("spread", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_mergekit_gives_the_same_slerp(spread: float, t: float) -> None:
    models, base = random_models(1, spread)
    assert_same(merge_tensors("slerp", models, base, t=t), mergekit_result("slerp", models, base, t=t))
    opposite = [-base]
    assert_same(merge_tensors("slerp", opposite, base, t=t), mergekit_result("slerp", opposite, base, t=t))


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp"])
def test_large_tensors_are_mixed_as_exactly_as_small_ones(method: str) -> None:
    """In float64 by the book; mergekit's float32 norms are off by 2e-5 here."""
    generator = torch.Generator().manual_seed(1)
    first = 0.02 * torch.randn(1000, 1024, generator=generator)
    second = first + 0.002 * torch.randn(1000, 1024, generator=generator)
    ours = merge_tensors(method, [first, second], weight=[0.37, 0.91])
    t = slerp_choice([0.37, 0.91])[1] if method == "slerp" else 0.91 / 1.28
    a, b = (second.double(), first.double()) if method == "slerp" else (first.double(), second.double())
    if method == "multislerp":
        mean = (1 - t) * a / a.norm() + t * b / b.norm()
        exact = mean / mean.norm() * ((1 - t) * a.norm() + t * b.norm())
    else:
        angle = torch.acos((a * b).sum() / a.norm() / b.norm())
        exact = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    assert (ours - exact).norm() / exact.norm() < 2e-7


def test_slerp_chooses_the_two_highest_weights() -> None:
    assert slerp_choice([0.1, 0.9, 0.4]) == ((1, 2), pytest.approx(math.exp(0.4) / (math.exp(0.4) + math.exp(0.9))))
    assert slerp_choice([0.5, 0.5, 0.5]) == ((0, 1), 0.5)
    models, _ = random_models(3)
    chosen = merge_tensors("slerp", models, weight=[0.1, 0.9, 0.4])
    (_, t) = slerp_choice([0.1, 0.9, 0.4])
    assert chosen.equal(merge_tensors("slerp", [models[2]], models[1], t=t))


def test_slerp_wants_a_pair() -> None:
    models, base = random_models(2)
    for wrong in ((models, base), (models[:1], None)):
        with pytest.raises(MethodError, match="slerp must have two or more models, or a base and one model, got"):
            merge_tensors("slerp", *wrong)


@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("weight", [[0.5, 0.8], [0.5, -0.8], [0.5, -0.5]])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_mergekit_gives_the_same_weighted_mean(
    method: str, with_base: bool, weight: list[float], spread: float
) -> None:
    if method == "multislerp" and sum(weight) == 0:
        weight = [0.5, -0.4]  # normalized by their sum
    models, base = random_models(2, spread)
    origin = base if with_base else None
    ours, theirs = (f(method, models, origin, weight=weight) for f in (merge_tensors, mergekit_result))
    assert_same(ours, theirs, 1e-5 if min(weight) < 0 else 1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("n_models", [1, 2, 4])
def test_mergekit_gives_the_same_mean_of_many(n_models: int, spread: float) -> None:
    models, base = random_models(n_models, spread)
    assert_same(merge_tensors("karcher", models), mergekit_result("karcher", models, None))
    weight = [0.3, 0.9, 0.2, 0.5][:n_models]
    for settings in ({}, {"normalize_weights": False}):
        ours, theirs = (
            f("multislerp", models, base, weight=weight, **settings) for f in (merge_tensors, mergekit_result)
        )
        assert_same(ours, theirs)
    if n_models > 1:
        assert_same(merge_tensors("model_stock", models, base), mergekit_result("model_stock", models, base))


def test_directions_that_cancel() -> None:
    assert merge_tensors("multislerp", [RIGHT, -3 * RIGHT], weight=[1.0, 1.0]).tolist() == [[-1.0, 0.0]]
    with pytest.raises(MethodError, match="weighted directions of the models must not cancel"):
        merge_tensors("multislerp", [RIGHT, -RIGHT, 0 * UP], weight=[1.0, 1.0, 1.0])
    assert merge_tensors("multislerp", [UP, UP, UP], UP).equal(UP)


def test_infinite_inner_products_of_both_signs_are_not_finite() -> None:
    """They come from blocks of their own, whose sums are added in Python."""
    infinite, signs = torch.ones(2, 1 << 18), torch.ones(2, 1 << 18)
    infinite[:, 0] = torch.inf
    signs[1] = -1.0
    for method in ("slerp", "nuslerp", "multislerp", "karcher"):
        merged = merge_tensors(method, [infinite, signs])
        assert not merged[:, 0].isfinite().any(), method
