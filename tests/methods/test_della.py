from __future__ import annotations

import pytest
import torch

from optuna_merge.errors import MethodError
from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors


class TestDella(MethodConformance):
    method = "della"


class TestDellaLinear(MethodConformance):
    method = "della_linear"


def draws(task_vector: torch.Tensor, n_draws: int, **settings: float) -> torch.Tensor:
    base = torch.zeros_like(task_vector)
    return torch.stack(
        [
            merge_tensors("della_linear", [task_vector], base, weight=[1.0], seed=seed, **settings)
            for seed in range(n_draws)
        ]
    )


def test_chance_of_being_kept_grows_linearly_with_the_rank() -> None:
    task_vector = torch.tensor([[1.0, -2.0, 4.0, 8.0, -16.0], [0.1, 0.2, 0.3, 0.05, 0.8]])
    kept = draws(task_vector, 4000, density=0.5, epsilon=0.4).ne(0).float().mean(0)
    expected = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9], [0.3, 0.5, 0.7, 0.1, 0.9]])
    torch.testing.assert_close(kept, expected, rtol=0, atol=0.035)


def test_expectation_is_the_task_vector() -> None:
    task_vector = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    drawn = draws(task_vector, 4000, density=0.4, epsilon=0.2)
    assert ((drawn.mean(0) - task_vector).abs() < 4.5 * drawn.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_kept_fraction(density: float) -> None:
    task_vector = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))
    fraction = draws(task_vector, 1, density=density, epsilon=0.15).ne(0).float().mean().item()
    assert abs(fraction - density) < 5 * (density * (1 - density) / task_vector.numel()) ** 0.5


def test_equal_magnitudes_have_equal_chances() -> None:
    kept = draws(torch.ones(1, 6), 3000, density=0.5, epsilon=0.4).ne(0).float().mean(0)
    torch.testing.assert_close(kept, torch.full((1, 6), 0.5), rtol=0, atol=0.045)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5)])
def test_chances_outside_0_to_1_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(MethodError, match=r"density - epsilon and density \+ epsilon must be in \(0, 1\), got density"):
        draws(torch.ones(1, 6), 1, density=density, epsilon=epsilon)
