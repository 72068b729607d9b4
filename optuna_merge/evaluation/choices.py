"""The choices of a document, and which of them a model takes: as lm-eval's own metrics compare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from lm_eval.api.task import ConfigurableTask, Task

MUTUAL_INFORMATION = "acc_mutual_info"
"""The metric for which lm-eval also asks for each choice without its context."""


def choices_of(task: Task, document: Any) -> list[str]:
    """The texts of a document's choices; empty if its task has none."""
    if getattr(task.config, "doc_to_choice", None) is None:
        return []
    return [str(choice) for choice in cast("ConfigurableTask", task).doc_to_choice(document)]


def lengths(choices: Sequence[str], metric: str) -> list[int]:
    """What a metric divides the log-likelihood of each choice by."""
    if metric not in ("acc_norm", "acc_bytes"):
        return [1] * len(choices)
    return [max(1, len(text if metric == "acc_norm" else text.encode())) for text in choices]


def taken(choices: Sequence[str], log_likelihoods: Sequence[float], metric: str) -> int:
    """Index of the choice that counts as a model's answer.

    Args:
        choices: Texts of the choices, ``n`` of them.
        log_likelihoods: Of the choices, ``[n]``; for ``acc_mutual_info`` then of each without its context, ``[2 n]``.
        metric: The metric that asks.
    """
    n = len(choices)
    scores = list(log_likelihoods[:n])
    if metric == MUTUAL_INFORMATION:
        scores = [score - prior for score, prior in zip(scores, log_likelihoods[n:], strict=True)]
    scaled = [score / length for score, length in zip(scores, lengths(choices, metric), strict=True)]
    return max(range(n), key=scaled.__getitem__)
