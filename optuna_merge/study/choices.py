"""What ``init`` writes where nobody has decided: numbers by rule, each with its reason.

Knows sizes, counts and seconds; opens nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna_merge.recipe import Dtype
from optuna_merge.study.memory import gib

N_WEIGHTS = 12
"""docs/benchmarks.md searches 9 and 12 weights with the documents of 100 full merges."""

DOCUMENTS_PER_WEIGHT = 10
"""With fewer, the search fits the weights to the documents."""

TRIALS_PER_WEIGHT = 7

NIGHT_H = 8.0
"""Hours that a study may take before documents are left out."""

LEAST_DOCUMENTS = 100
"""Documents of a task that are kept, however long a study takes."""

_HOST_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """A value and the reason for it."""

    value: Any
    reason: str


def choose_granularity(n_layers: int, n_models: int, n_documents: int) -> Choice:
    """Layers in a layer group: as few groups as the documents can tell apart, and a hundred trials can search.

    Args:
        n_layers: Layers of each model.
        n_models: Models that have one weight in each group.
        n_documents: Searched documents, over all tasks.
    """
    n_weights = min(N_WEIGHTS, n_documents // DOCUMENTS_PER_WEIGHT)
    wanted = min(n_layers, max(1, round(n_weights / n_models)))
    granularity = math.ceil(n_layers / wanted)
    n_groups = math.ceil(n_layers / granularity)
    why = "about as many as a hundred trials search well"
    if n_weights < N_WEIGHTS:
        why = f"few, because there are only {n_documents} documents to search on"
    groups = "one group" if n_groups == 1 else f"{n_groups} groups"
    return Choice(
        0 if n_groups == 1 else granularity,
        f"{n_layers} layers in {groups}, each with a weight for each of {n_models} models: {n_groups * n_models}"
        f" weights, {why}",
    )


def choose_n_trials(n_baselines: int, n_weights: int) -> Choice:
    """Trials in total, rounded up to a multiple of ten."""
    n_trials = math.ceil((n_baselines + TRIALS_PER_WEIGHT * n_weights) / 10) * 10
    return Choice(
        n_trials,
        f"{n_baselines} baselines, then about {TRIALS_PER_WEIGHT} trials for each of {n_weights} weights; raise it to"
        " continue the study",
    )


def choose_dtype(stored: Dtype, n_parameters: int, *, on_gpu: bool, host_free: int) -> Choice:
    """The merged model's dtype.

    Args:
        stored: Dtype of most weights of the base.
        n_parameters: Of the merged model.
        on_gpu: Whether a GPU scores it.
        host_free: Bytes of free host memory.
    """
    if on_gpu:
        if stored == "float32":
            return Choice("bfloat16", "half the memory of the models' float32; the exported model has it, too")
        return Choice(stored, "as the models are stored; the exported model has it, too")
    needed = 4 * n_parameters
    if stored != "float32" and needed > _HOST_SHARE * host_free:
        return Choice(stored, f"as the models are stored: float32 would take {gib(needed)}, {gib(host_free)} are free")
    stores = "as the models are stored" if stored == "float32" else f"most CPUs compute it faster than {stored}"
    return Choice(
        "float32", f"{stores}; it takes {gib(needed)}, {gib(host_free)} are free; the exported model has it, too"
    )


def choose_backend(*, generates: bool, on_gpu: bool, has_vllm: bool) -> Choice:
    """The engine: vLLM where it is installed and pays, which is where texts are generated on a GPU."""
    if generates and on_gpu and has_vllm:
        return Choice("vllm", "most of a trial is generating texts, and vLLM is installed")
    if not on_gpu:
        return Choice("hf", "transformers; there is no GPU here")
    if not generates:
        return Choice("hf", "transformers; choices are scored, and hardly any text is generated")
    return Choice("hf", "transformers; most of a trial is generating texts: install vLLM and try vllm (docs/vllm.md)")


def choose_limit(merging_s: float, scoring_s: float, n_trials: int, sizes: Sequence[int]) -> Choice | None:
    """Documents of each task, so that a study ends in a night; None: all of them do, or none can be left out.

    Args:
        merging_s: Seconds that a trial merges.
        scoring_s: Seconds that a trial scores, on all documents.
        n_trials: Trials in total.
        sizes: Documents of each task, those of the holdout included.
    """
    hours = n_trials * (merging_s + scoring_s) / 3600
    if hours <= NIGHT_H:
        return None
    share = (NIGHT_H - n_trials * merging_s / 3600) / (n_trials * scoring_s / 3600)
    fitting = bisect_right(range(max(sizes) + 1), share * sum(sizes), key=lambda limit: _n_kept(sizes, limit)) - 1
    limit = max(LEAST_DOCUMENTS, fitting)
    if limit >= max(sizes):
        return None
    with_limit = n_trials * (merging_s + scoring_s * _n_kept(sizes, limit) / sum(sizes)) / 3600
    return Choice(
        limit,
        f"of each task, drawn at random: with all documents the study would take about {hours:.0f} hours here, with"
        f" these about {with_limit:.0f}",
    )


def _n_kept(sizes: Sequence[int], limit: int) -> int:
    return sum(min(size, limit) for size in sizes)
