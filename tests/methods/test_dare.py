from __future__ import annotations

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors


class TestDareLinear(MethodConformance):
    method = "dare_linear"


class TestDareTies(MethodConformance):
    method = "dare_ties"


ONES = torch.ones(500, 401)
ZEROS = torch.zeros(500, 401)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.01])
def test_kept_fraction_and_scale(method: str, density: float) -> None:
    merged = merge_tensors(method, [ONES], ZEROS, density=density, weight=[1.0])
    fraction = merged.count_nonzero().item() / merged.numel()
    assert abs(fraction - density) < 5 * (density * (1 - density) / merged.numel()) ** 0.5
    assert merged.unique().tolist() == [0.0, pytest.approx(1 / density, rel=1e-3)]
    plain = merge_tensors(method, [ONES], ZEROS, density=density, weight=[1.0], rescale=False)
    assert plain.unique().tolist() == [0.0, 1.0]


def test_expectation_is_the_task_vector() -> None:
    generator = torch.Generator().manual_seed(0)
    task_vector = torch.randn(4, 8, generator=generator)
    draws = torch.stack(
        [
            merge_tensors("dare_linear", [task_vector], 0 * task_vector, density=0.3, weight=[1.0], seed=seed)
            for seed in range(4000)
        ]
    )
    standard_error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - task_vector).abs() < 4.5 * standard_error).all()


def test_masks_depend_on_seed_name_and_model_and_on_nothing_else() -> None:
    def mask(**settings: object) -> torch.Tensor:
        return merge_tensors("dare_linear", [ONES], ZEROS, density=0.5, weight=[1.0], **settings) != 0  # type: ignore[arg-type]

    first = mask()
    assert mask().equal(first)
    assert mask(chunk_elements=1203).equal(first)
    for other in (mask(seed=1), mask(name="other"), mask(identities=["other"])):
        assert abs((other == first).float().mean().item() - 0.5) < 0.01
    for shift in (1, 2, 401):
        assert abs((first.view(-1)[shift:] == first.view(-1)[:-shift]).float().mean().item() - 0.5) < 0.01


def test_a_recorded_mask_stays_the_same() -> None:
    """Pinned, because recorded trials are replayed with it."""
    merged = merge_tensors(
        "dare_linear", [ONES[:2, :12].contiguous()], ZEROS[:2, :12].contiguous(), density=0.5, weight=[1.0]
    )
    assert "".join("1" if kept else "0" for kept in merged.view(-1).tolist()) == "000000111000110100010011"


def test_order_of_models_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(50, 40, generator=generator) for _ in range(3))
    settings = {"density": [0.5, 0.2], "weight": [0.3, 0.9]}
    swapped = {name: values[::-1] for name, values in settings.items()}
    for method in ("dare_linear", "dare_ties"):
        one = merge_tensors(method, [a, b], base, identities=["a", "b"], **settings)
        other = merge_tensors(method, [b, a], base, identities=["b", "a"], **swapped)
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; nothing installs one")
def test_cuda_draws_the_same_mask() -> None:
    on_cpu = merge_tensors("dare_linear", [ONES], ZEROS, density=0.5, weight=[1.0])
    assert merge_tensors("dare_linear", [ONES.cuda()], ZEROS.cuda(), density=0.5, weight=[1.0]).cpu().equal(on_cpu)
