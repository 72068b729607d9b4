"""Model breadcrumbs: drop the largest and the smallest entries of each task vector, then add or elect signs."""

from __future__ import annotations

from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.rescale import Sparsifier, rescaled
from optuna_merge.methods.selection import ranks
from optuna_merge.methods.task_vectors import add_task_vectors, elect_task_vectors


def breadcrumbs(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted sum of the task vectors without their outliers.

    References:
        Model Breadcrumbs, arXiv:2312.06795.
    """
    add_task_vectors(inputs, out, keep_the_middle)


def breadcrumbs_ties(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus those weighted entries, outliers dropped, that have the elected sign.

    References:
        Model Breadcrumbs, arXiv:2312.06795, with TIES-Merging, arXiv:2306.01708, Algorithm 1, steps 2 and 3.
    """
    elect_task_vectors(inputs, out, keep_the_middle)


def keep_the_middle(inputs: MergeInput, index: int) -> Sparsifier:
    """Drops the ``floor(gamma numel)`` largest entries, and of the others keeps the ``floor(density numel)`` largest.

    Fewer outliers are dropped where not enough entries would remain; a density of 1 drops nothing. Entries of equal
    magnitude rank in index order.
    """
    density, n_elements = inputs.per_model["density"][index], inputs.models[index].numel()
    n_kept = int(density * n_elements)
    if density >= 1 or n_elements == 0:
        return lambda chunk, task_vector: task_vector
    if n_kept <= 0:
        return lambda chunk, task_vector: task_vector.zero_()
    n_outliers = int(inputs.per_model["gamma"][index] * n_elements)
    first = max(0, n_elements - n_kept - n_outliers)
    return rescaled(inputs, index, ranks(inputs, index, first, first + n_kept).apply)
