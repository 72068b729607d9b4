"""Which two of several models slerp mixes. Works on numbers, so that a merge file is written without torch."""

from __future__ import annotations

from collections.abc import Sequence

from optuna_merge.duals import exp


def slerp_choice(weights: Sequence[float]) -> tuple[tuple[int, int], float]:
    """The two models of the highest weight (the first of equal ones), and the position on the arc between them."""
    first, second = sorted(range(len(weights)), key=lambda index: -weights[index])[:2]
    return (first, second), 1 / (1 + exp(weights[first] - weights[second]))
