"""TIES: trims task vectors to their largest entries, elects a sign for each element, adds the entries that agree."""

from __future__ import annotations

from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.selection import Split, keep_largest, split
from optuna_merge.methods.sparsifier import Sparsifier, rescaled
from optuna_merge.methods.task_vectors import elect_task_vectors


def ties(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the trimmed, weighted entries that agree with the elected sign.

    References:
        TIES-Merging, arXiv:2306.01708, Algorithm 1. Departure: the paper ranks entries over the whole model; we rank
        within a tensor, as mergekit does, so that tensors can be streamed.
    """
    elect_task_vectors(inputs, out, trim)


def trim(inputs: MergeInput, index: int) -> Sparsifier:
    """Keeps the ``max(1, floor(density * numel))`` entries of a task vector with the largest magnitude.

    Among equal magnitudes the first are kept. A density of 0 keeps none; a density of 1 or more keeps all.
    """
    density = inputs.per_model["density"][index]
    n_elements = inputs.models[index].numel()
    if density >= 1:
        kept = Split.all()
    elif density <= 0:
        kept = Split.none()
    else:
        kept = split(inputs, index, max(1, int(density * n_elements)), is_early=True)
    sparsifier = Sparsifier(_trimmed, kept.thresholds, 1, lambda span: (kept.cut_in(span),))
    return rescaled(inputs, index, sparsifier)


def _trimmed(task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None) -> Tensor:
    return keep_largest(task_vector, floats, integers[0])
