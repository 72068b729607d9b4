from __future__ import annotations

import pytest
import torch

from optuna_merge.testing.conformance import MethodConformance
from optuna_merge.testing.methods import merge_tensors

from .reference import assert_same, mergekit_result


class TestArceeFusion(MethodConformance):
    method = "arcee_fusion"
    n_models = 1

    def test_identical_models_give_that_model(self) -> None:
        """Only important changes are taken over, so the model is between: nowhere else than base or model."""
        (model,), base = self._models(n_models=1)
        assert base is not None
        merged = merge_tensors(self.method, [model], base)
        from_model = torch.isclose(merged, model, rtol=1e-6, atol=1e-6)
        assert (from_model | (merged == base)).all()
        assert 0 < from_model.float().mean() < 0.5


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_mergekit_gives_the_same(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(97, 211, generator=generator)
    model = base + spread * torch.randn(97, 211, generator=generator)
    assert_same(merge_tensors("arcee_fusion", [model], base), mergekit_result("arcee_fusion", [model], base))
