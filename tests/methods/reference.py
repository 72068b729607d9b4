"""mergekit's own result for one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mergekit_result(method: str, models: Sequence[Tensor], base: Tensor | None, **parameters: Any) -> Tensor:
    """Parameters as mergekit names them, ``lambda_`` for lambda; the base comes first where there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit import merge_methods
        from mergekit.merge_methods.base import TensorGroup

    tensors = list(models) if base is None else [base, *models]
    group = TensorGroup.from_tensors(tensors, base_index=None if base is None else 0)
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    (result,) = merge_methods.get(method)((group,), parameters=given, dtype=torch.float32)
    return result


def assert_same(ours: Tensor, theirs: Tensor, relative: float = 1e-6) -> None:
    """Within a relative error; where terms cancel, of the mean magnitude."""
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=relative * theirs.abs().mean().item())
