"""Task arithmetic: the base plus the weighted sum of the task vectors."""

from __future__ import annotations

from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.task_vectors import add_task_vectors


def task_arithmetic(inputs: MergeInput, out: Tensor) -> None:
    """Write ``base + lambda sum_i weight_i (model_i - base)``; ``normalize`` divides the sum by ``sum_i weight_i``.

    References:
        Editing models with task arithmetic, arXiv:2212.04089.
    """
    add_task_vectors(inputs, out)
