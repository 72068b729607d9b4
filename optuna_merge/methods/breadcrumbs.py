"""Model Breadcrumbs: drops the largest and smallest entries of each task vector, then adds them or elects signs."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.selection import Split, keep_largest, split, threshold
from optuna_merge.methods.sparsifier import Sparsifier, rescaled
from optuna_merge.methods.task_vectors import add_task_vectors, elect_task_vectors


def breadcrumbs(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted sum of the task vectors without their outliers.

    References:
        Model Breadcrumbs, arXiv:2312.06795.
    """
    add_task_vectors(inputs, out, keep_the_middle)


def breadcrumbs_ties(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted entries that have the elected sign, after outliers are dropped.

    References:
        Model Breadcrumbs, arXiv:2312.06795, with TIES-Merging, arXiv:2306.01708, Algorithm 1, steps 2 and 3.
    """
    elect_task_vectors(inputs, out, keep_the_middle)


def keep_the_middle(inputs: MergeInput, index: int) -> Sparsifier:
    """Drops the ``floor(gamma * numel)`` largest entries and keeps the next ``floor(density * numel)`` largest.

    Fewer outliers are dropped if too few entries would remain; a density of 1 drops nothing. Among equal magnitudes,
    later ones count as larger.
    """
    density, n_elements = inputs.per_model["density"][index], inputs.models[index].numel()
    n_kept = int(density * n_elements)
    if density >= 1 or n_kept <= 0:
        outliers, with_outliers = Split.none(), Split.all() if density >= 1 else Split.none()
    else:
        n_dropped = min(int(inputs.per_model["gamma"][index] * n_elements), n_elements - n_kept)
        outliers = split(inputs, index, n_dropped, is_early=False)
        with_outliers = split(inputs, index, n_dropped + n_kept, is_early=False)
    sparsifier = Sparsifier(
        _between,
        with_outliers.thresholds + outliers.thresholds,
        2,
        lambda span: (with_outliers.cut_in(span), outliers.cut_in(span)),
    )
    return rescaled(inputs, index, sparsifier)


def _between(task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None) -> Tensor:
    largest = keep_largest(task_vector, floats[:2], integers[0])
    is_outlier = task_vector.abs() > threshold(task_vector, floats[2:], integers[1])
    return torch.where(is_outlier, 0.0, largest)
