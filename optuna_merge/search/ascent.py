"""The ascent: a search begins by following the gradient of the expected score, a few documents at a time.

Adam (Kingma and Ba 2015, arXiv:1412.6980) on a noisy function inside a box; the result is the mean of the later points
(Polyak and Juditsky 1992). Knows numbers and gradients; knows neither models nor studies. A state is plain data: the
next steps follow from it, bit for bit.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RATE = 0.1
"""Length of the first steps in every coordinate, in units of weight; the length falls to 0 like a cosine."""
N_BATCHES = 9
"""A step sees about this share of the chunks, so that this many steps are a pass over the documents."""
N_PASSES = 3

_MEAN_DECAY, _SQUARE_DECAY = 0.8, 0.9  # few steps: Adam's usual .9 and .999 would still be starting at the end
_TINY = 1e-12


@dataclass(frozen=True)
class Schedule:
    """Which chunks each step of an ascent differentiates.

    Attributes:
        batches: For each step, the numbers of its chunks.
    """

    batches: tuple[tuple[int, ...], ...]

    @classmethod
    def draw(cls, n_chunks: int, seed: int) -> Self:
        """Cut the chunks into at most :data:`N_BATCHES` batches, anew for each of :data:`N_PASSES` passes.

        Args:
            n_chunks: At least 1.
            seed: In [0, 2**32).
        """
        rng = np.random.default_rng([seed, n_chunks])
        batches: list[tuple[int, ...]] = []
        for _ in range(N_PASSES):
            parts = np.array_split(rng.permutation(n_chunks), min(N_BATCHES, n_chunks))
            batches += [tuple(sorted(part.tolist())) for part in parts]
        return cls(tuple(batches))

    @property
    def n_steps(self) -> int:
        """Number of steps."""
        return len(self.batches)


class Ascent:
    """The point that climbs, and what Adam remembers.

    Args:
        start: First point, ``[n]``.
        low, high: Bounds, ``[n]``; each point is clipped to them.
        scale: Length of a coordinate's unit of weight, ``[n]``, above 0.
        n_steps: At least 1.

    Attributes:
        point: Where the next gradient is wanted, ``[n]``.
        n_done: Steps that were taken.
    """

    def __init__(self, start: Array, low: Array, high: Array, scale: Array, n_steps: int) -> None:
        self._low, self._high, self._scale, self._n_steps = low, high, scale, n_steps
        self.point = np.clip(start, low, high)
        self.n_done = 0
        self._mean, self._square = np.zeros_like(self.point), np.zeros_like(self.point)
        self._sum = np.zeros_like(self.point)  # of the points of the second half

    @property
    def is_done(self) -> bool:
        """Whether all steps were taken."""
        return self.n_done >= self._n_steps

    def step(self, gradient: Array) -> None:
        """Move uphill.

        Args:
            gradient: At :attr:`point`, ``[n]``, finite.
        """
        slope = gradient * self._scale
        self._mean = _MEAN_DECAY * self._mean + (1 - _MEAN_DECAY) * slope
        self._square = _SQUARE_DECAY * self._square + (1 - _SQUARE_DECAY) * slope**2
        rate = RATE / 2 * (1 + math.cos(math.pi * self.n_done / self._n_steps))
        self.n_done += 1
        mean = self._mean / (1 - _MEAN_DECAY**self.n_done)
        square = self._square / (1 - _SQUARE_DECAY**self.n_done)
        move = rate * self._scale * mean / (np.sqrt(square) + _TINY)
        self.point = np.clip(self.point + move, self._low, self._high)
        if self.n_done > self._n_steps // 2:
            self._sum += self.point

    def end(self) -> Array:
        """The mean of the points of the second half, ``[n]``; called when all steps were taken."""
        assert self.is_done
        end: Array = self._sum / (self._n_steps - self._n_steps // 2)
        return end

    def state(self) -> dict[str, Any]:
        """All that the steps so far have left behind, as JSON values."""
        arrays = (self.point, self._mean, self._square, self._sum)
        return {"n_done": self.n_done, "arrays": [_to_text(array) for array in arrays]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue where another process stopped.

        Args:
            state: What :meth:`state` returned there, of an ascent with the same arguments.
        """
        self.n_done = state["n_done"]
        self.point, self._mean, self._square, self._sum = (_from_text(text) for text in state["arrays"])


def _to_text(array: Array) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


def _from_text(text: str) -> Array:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)
