"""Which two of several models slerp mixes. Numbers only: a merge file is written with it, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def slerp_choice(weights: Sequence[float]) -> tuple[tuple[int, int], float]:
    """The two models of the highest weight, of equal ones the first, and the position between them."""
    first, second = sorted(range(len(weights)), key=lambda index: -weights[index])[:2]
    return (first, second), 1 / (1 + math.exp(weights[first] - weights[second]))
