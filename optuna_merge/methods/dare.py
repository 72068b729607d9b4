"""DARE: drops random entries of each task vector, scales up the others, then adds them or elects signs as in TIES."""

from __future__ import annotations

from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.masks import LEVELS, N_INTEGERS, mask_integers, uniform
from optuna_merge.methods.sparsifier import Sparsifier
from optuna_merge.methods.task_vectors import add_task_vectors, elect_task_vectors


def dare_linear(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted sum of the randomly thinned task vectors.

    References:
        DARE, arXiv:2311.03099.
    """
    add_task_vectors(inputs, out, drop)


def dare_ties(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted entries of the randomly thinned task vectors that have the elected sign.

    References:
        DARE, arXiv:2311.03099, with TIES-Merging, arXiv:2306.01708, Algorithm 1, steps 2 and 3.
    """
    elect_task_vectors(inputs, out, drop)


def drop(inputs: MergeInput, index: int) -> Sparsifier:
    """Keeps each entry with probability ``density``; with ``rescale``, divides kept entries by ``density``.

    The expected value is then the task vector. Departure from mergekit 0.1.5, which restores the l1 norm of the draw
    instead. Densities are rounded to multiples of 1/65536.
    """
    n_kept = min(LEVELS, max(0, round(inputs.per_model["density"][index] * LEVELS)))
    factor = LEVELS / n_kept if n_kept and inputs.switches["rescale"] else 1.0
    return Sparsifier(_dropped, (float(n_kept),), N_INTEGERS, mask_integers(inputs, index), factor=factor)


def _dropped(task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None) -> Tensor:
    is_kept = uniform(task_vector, integers) < floats[0]
    return task_vector * is_kept
