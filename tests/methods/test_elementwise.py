from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from optuna_merge.methods import elementwise
from optuna_merge.methods.function import MergeInput
from optuna_merge.testing.methods import merge_tensors


@pytest.fixture(scope="module")
def models() -> list[Tensor]:
    """Three sources and the base: bfloat16, an odd number of elements, more than one compiled piece's least size."""
    generator = torch.Generator().manual_seed(2)
    base = 0.02 * torch.randn(131, 257, generator=generator)
    changed = [base + 0.002 * torch.randn(base.shape, generator=generator) for _ in range(3)]
    return [tensor.bfloat16() for tensor in (*changed, base)]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {}),
        ("task_arithmetic", {}),
        ("ties", {"density": [0.5, 0.2, 1.0]}),
        ("dare_ties", {"density": [0.5, 0.9, 0.0]}),
        ("della_linear", {"lambda_": 0.7, "density": [0.5, 0.4, 1.0], "epsilon": 0.1}),
    ],
)
def test_compiled_gives_the_same_bits(models: list[Tensor], method: str, settings: dict[str, object]) -> None:
    *sources, base = models
    for dtype in ("float32", "bfloat16"):
        plain, compiled = (
            merge_tensors(
                method,
                sources,
                None if method == "linear" else base,
                weight=[0.37, -0.91, 0.22],
                dtype=dtype,
                is_compiled=is_compiled,
                **settings,  # type: ignore[arg-type]
            )
            for is_compiled in (False, True)
        )
        if method == "linear":  # a compiler may round a product before it adds it
            torch.testing.assert_close(compiled, plain, rtol=1e-6 if dtype == "float32" else 1 / 128, atol=1e-9)
        else:
            assert torch.equal(plain, compiled)


def test_what_was_compiled_ran() -> None:
    """Else the test above compares plain torch with itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_tensors("task_arithmetic", [torch.ones(200, 200)] * 2, torch.ones(200, 200), is_compiled=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def _branches(sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    if floats[0] > 0:  # which torch.compile refuses
        return sources[0].float() * floats[0]
    return sources[0].float()


def test_what_does_not_compile_is_said_and_computed(models: list[Tensor]) -> None:
    inputs = MergeInput(
        name="t",
        base=None,
        models=(models[0],),
        per_model={},
        shared={},
        switches={},
        seed=0,
        identities=("",),
        device=torch.device("cpu"),
        chunk_elements=1 << 18,
        kernel_elements=1 << 24,
        is_compiled=True,
    )
    out = torch.empty(models[0].shape)
    with pytest.warns(UserWarning, match=r"merging is slower than it could be, torch\.compile failed: "):
        elementwise.write(inputs, out, _branches, [2.0])
    assert torch.equal(out, models[0].float() * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elementwise.write(inputs, out, _branches, [3.0])  # said once
    assert torch.equal(out, models[0].float() * 3)
