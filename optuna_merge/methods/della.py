"""DELLA: drops random entries, small ones more often than large ones, then adds the rest or elects signs as in TIES."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.errors import MethodError
from optuna_merge.methods.elementwise import evaluate
from optuna_merge.methods.function import Chunk, MergeInput, numbers_on
from optuna_merge.methods.masks import LEVELS, N_INTEGERS, mask_integers, uniform
from optuna_merge.methods.sparsifier import Sparsifier
from optuna_merge.methods.task_vectors import add_task_vectors, elect_task_vectors

_FRACTION_BITS = 4  # bits of a magnitude's fraction that number its bin: 16 bins in an octave
_N_BINS = 256  # 16 octaves below the largest magnitude of a row; smaller magnitudes are in the last bin


def della_linear(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted sum of the task vectors, thinned at random by magnitude.

    References:
        DELLA-Merging, arXiv:2406.11617.
    """
    add_task_vectors(inputs, out, magprune)


def della(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus the weighted entries of the thinned task vectors that have the elected sign.

    References:
        DELLA-Merging, arXiv:2406.11617.
    """
    elect_task_vectors(inputs, out, magprune)


def magprune(inputs: MergeInput, index: int) -> Sparsifier:
    """Keeps each entry with a probability that grows with the rank of its magnitude in its row.

    The probability grows linearly from ``density - epsilon`` for the smallest to ``density + epsilon`` for the largest.
    With ``rescale``, a kept entry is divided by its probability, so that the expected value is the task vector.

    Departures: mergekit 0.1.5 restores the l1 norm of the draw instead. We rank magnitudes rounded to 1/16 of an
    octave, with equal ones sharing their mean rank, so that no row needs to be sorted.

    Raises:
        MethodError: If ``density - epsilon`` or ``density + epsilon`` is not in (0, 1), for a density in (0, 1).
    """
    density, epsilon = inputs.per_model["density"][index], inputs.per_model["epsilon"][index]
    integers = mask_integers(inputs, index)
    if density >= 1 or density <= 0:
        chance = 1.0 if density >= 1 else 0.0
        return Sparsifier(
            _drawn, (0.0,), N_INTEGERS, integers, lambda chunk: chunk.scratch(f"probability_{index}").fill_(chance)
        )
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise MethodError(
            f"{inputs.name}: density - epsilon and density + epsilon must be in (0, 1), got density {density} and "
            f"epsilon {epsilon}; narrow the range of one of them"
        )
    return Sparsifier(
        _drawn,
        (float(inputs.switches["rescale"]),),
        N_INTEGERS,
        integers,
        lambda chunk: _probabilities(chunk, index, density - epsilon, density + epsilon),
    )


def _drawn(task_vector: Tensor, floats: Tensor, integers: Tensor, probability: Tensor | None) -> Tensor:
    assert probability is not None
    is_kept = (uniform(task_vector, integers) + 0.5) / LEVELS < probability
    return task_vector * is_kept / torch.where(floats[0] > 0, probability, 1.0)


def _probabilities(chunk: Chunk, index: int, lowest: float, highest: float) -> Tensor:
    """From ``lowest`` for the smallest magnitude of a row to ``highest`` for the largest, shape ``[n]``."""
    inputs, n_columns = chunk.inputs, chunk.inputs.row_elements
    bins = chunk.scratch("bins", torch.int32)
    evaluate(inputs, bins, _magnitude_bins, chunk.stored_pair(index), (), numbers_on(inputs.device, ()), ())
    rows = bins.view(-1, n_columns)
    largest = rows.amax(1, keepdim=True)
    first_bins = torch.arange(len(rows), dtype=torch.int32, device=rows.device).mul_(_N_BINS).unsqueeze(1)
    torch.maximum(rows, largest - (_N_BINS - 1), out=rows)
    torch.sub(largest + first_bins, rows, out=rows)  # the largest magnitude of a row is in its first bin
    counts = torch.bincount(bins, minlength=len(rows) * _N_BINS).view(len(rows), _N_BINS)
    slope = (highest - lowest) / max(1, n_columns - 1)
    # The mean rank in a bin is n_columns - 1/2 - (entries in it and in the bins of larger ones) + (entries in it) / 2.
    of_bins = counts.cumsum(1, dtype=torch.float32).sub_(counts, alpha=0.5)
    of_bins.mul_(-slope).add_(lowest + slope * (n_columns - 0.5))
    of_bins.clamp_(lowest, highest)  # rounding must not give 0: kept entries are divided by it
    return torch.index_select(of_bins.view(-1), 0, bins, out=chunk.scratch(f"probability_{index}"))


def _magnitude_bins(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    """Integers in the order of the magnitudes of a task vector's entries, int32, shape ``[n]``."""
    base, model = stored
    return ((model.float() - base.float()).view(torch.int32) & 0x7FFFFFFF) >> (23 - _FRACTION_BITS)
