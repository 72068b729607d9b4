"""Consensus merging: keeps only the entries of the merged task vector that matter to several models."""

from __future__ import annotations

import torch
from torch import Tensor

from optuna_merge.methods.function import MergeInput
from optuna_merge.methods.task_vectors import Selection, add_task_vectors, elect_task_vectors, untouched
from optuna_merge.methods.ties import trim


def consensus_ta(inputs: MergeInput, out: Tensor) -> None:
    """Write the base plus those entries of the weighted sum of the task vectors that matter to ``k`` models or more.

    With ``v_i = weight_i (model_i - base)``, an entry of the sum ``v`` matters to model ``i`` if
    ``|v_i| >= mask_lambda_i |v - v_i|``. ``k`` = 2 drops what matters to no model (catastrophic entries) and what
    matters to one alone (selfish entries).

    References:
        Localizing Task Information for Improved Model Merging and Compression, arXiv:2405.07813: the TALL mask of a
        task, the consensus mask, and consensus task arithmetic. With equal weights this is the paper's merge, whose
        scaling factor is the weight. Departure: the paper's masks come from task vectors without weights; we apply the
        weights first, so that a model with a small weight matters to fewer entries.
    """
    add_task_vectors(inputs, out, untouched, _selection(inputs))


def consensus_ties(inputs: MergeInput, out: Tensor) -> None:
    """As :func:`consensus_ta`, with the sum of TIES: trimmed, and only entries of the elected sign.

    The masks compare this sum with the task vectors before they are trimmed. ``normalize`` divides each element, after
    it was selected, by the weights that took part in it.

    References:
        arXiv:2405.07813, consensus TIES, which adds without normalizing; TIES-Merging, arXiv:2306.01708, Algorithm 1.
        Departures: those of :func:`consensus_ta` and of ``ties``.
    """
    elect_task_vectors(inputs, out, trim, _selection(inputs))


def _selection(inputs: MergeInput) -> Selection:
    return Selection(_consensus, (*inputs.per_model["mask_lambda"], inputs.shared["k"]))


def _consensus(weighted: list[Tensor], total: Tensor, numbers: Tensor) -> Tensor:
    n_models = torch.zeros_like(total)  # to which an entry matters
    for index, vector in enumerate(weighted):
        # NaN is not smaller: it matters, and so stays in the result.
        is_foreign = vector.abs() < numbers[index] * (total - vector).abs()
        n_models = n_models + torch.where(is_foreign, 0.0, 1.0)
    return torch.where(n_models < numbers[len(weighted)], 0.0, 1.0)
