"""Which entries of a task vector are among its largest: exact, in pieces, without sorting it.

The k-th largest magnitude is bracketed by a sample; one pass over the tensor then counts what lies above the bracket
and collects what lies in it. If the sample misled, two passes of counting by the bits of the magnitude find the value
without any assumption.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput

_SAMPLE = 1 << 16
_GOLDEN = (math.sqrt(5) - 1) / 2
_LOW_BITS = 16


@dataclass(frozen=True)
class Order:
    """An order statistic of the magnitudes of a task vector.

    Attributes:
        value: The k-th largest magnitude.
        n_above: Number of entries with a greater one, below k.
        n_from: Number of entries with this one or a greater one, at least k.
    """

    value: float
    n_above: int
    n_from: int


@dataclass
class Band:
    """Keeps the entries whose magnitudes have certain ranks; entries of equal magnitude rank in index order.

    Use it on the pieces of one tensor in order: it counts the entries that tie at its ends, from the first piece on.

    Attributes:
        low, high: Entries strictly between are kept.
        low_kept, high_kept: Half-open range of those that tie at ``low`` (``high``), in index order, that are kept.
    """

    low: float
    low_kept: tuple[int, int]
    high: float = math.inf
    high_kept: tuple[int, int] = (0, 0)
    low_is_whole: bool = False
    _seen: dict[float, int] = field(default_factory=dict)

    def apply(self, chunk: Chunk, task_vector: Tensor) -> Tensor:
        """Zero, in place, what is not kept of a piece of the task vector, shape ``[n]``."""
        if chunk.span.start == 0:
            self._seen.clear()
        magnitude = torch.abs(task_vector, out=chunk.scratch("magnitude"))
        if self.low == self.high:
            return task_vector.mul_(self._ties(magnitude, self.low, self.low_kept))
        if self.low_is_whole:
            kept = magnitude >= self.low
        else:
            kept = magnitude > self.low
            kept |= self._ties(magnitude, self.low, self.low_kept)
        if self.high < math.inf:
            kept &= magnitude < self.high
            kept |= self._ties(magnitude, self.high, self.high_kept)
        return task_vector.mul_(kept)

    def _ties(self, magnitude: Tensor, value: float, kept: tuple[int, int]) -> Tensor:
        ties = magnitude == value
        first = self._seen.get(value, 0)
        n_ties = int(ties.count_nonzero())
        self._seen[value] = first + n_ties
        if kept[0] <= first and first + n_ties <= kept[1]:
            return ties
        ordinal = torch.cumsum(ties, 0).add_(first - 1)
        return ties.logical_and_(ordinal >= kept[0]).logical_and_(ordinal < kept[1])


def largest(inputs: MergeInput, index: int, n_kept: int) -> Band:
    """The band of the ``n_kept`` largest entries of a source's task vector; of ties the first are kept.

    Args:
        inputs: The tensor.
        index: Which source.
        n_kept: At least 1, at most the number of elements.
    """
    order = kth_largest(inputs, index, n_kept)
    return Band(order.value, (0, n_kept - order.n_above), low_is_whole=order.n_from == n_kept)


def ranks(inputs: MergeInput, index: int, first: int, last: int) -> Band:
    """The band of ranks ``first`` to ``last - 1`` of a source's task vector, from the smallest magnitude, rank 0.

    Args:
        inputs: The tensor.
        index: Which source.
        first: The lowest rank.
        last: One more than the highest rank; of ties the first by index have the lower ranks.
    """
    n_elements = inputs.models[index].numel()
    low = kth_largest(inputs, index, n_elements - first)
    n_below = n_elements - low.n_from
    if last == n_elements:
        return Band(low.value, (first - n_below, n_elements), low_is_whole=first == n_below)
    high = kth_largest(inputs, index, n_elements - last + 1)
    n_below_high = n_elements - high.n_from
    if high.value == low.value:
        return Band(low.value, (first - n_below, last - n_below), high.value)
    return Band(
        low.value,
        (first - n_below, n_elements),
        high.value,
        (0, last - n_below_high),
        low_is_whole=first == n_below,
    )


def kth_largest(inputs: MergeInput, index: int, k: int) -> Order:
    """The ``k``-th largest magnitude of a source's task vector, 1 being the largest."""
    order = _from_bracket(inputs, index, k, *_bracket(inputs, index, k))
    return order or _from_bits(inputs, index, k)


def _bracket(inputs: MergeInput, index: int, k: int) -> tuple[float, float]:
    """Magnitudes between which a sample of the tensor puts the ``k``-th largest."""
    n_elements = inputs.models[index].numel()
    if n_elements <= _SAMPLE:
        return -1.0, math.inf
    assert inputs.base is not None
    # multiples of the golden ratio fall evenly, and on no row or column more than on others
    places = (torch.arange(_SAMPLE, dtype=torch.float64) * _GOLDEN).frac_().mul_(n_elements).long()
    places = places.clamp_(max=n_elements - 1)
    model, base = (
        tensor.reshape(-1)[places.to(tensor.device)].to(inputs.device, torch.float32)
        for tensor in (inputs.models[index], inputs.base)
    )
    sample = (model - base).abs_().sort(descending=True).values
    fraction = k / n_elements
    middle = fraction * _SAMPLE
    margin = 4 * math.sqrt(fraction * (1 - fraction) * _SAMPLE) + 8
    low, high = math.ceil(middle + margin), math.floor(middle - margin)
    return (
        sample[low].item() if low < _SAMPLE else -1.0,
        sample[high].item() if high >= 0 else math.inf,
    )


def _from_bracket(inputs: MergeInput, index: int, k: int, low: float, high: float) -> Order | None:
    n_above_high = n_from_high = n_from_low = 0
    inside = []
    for chunk in inputs.chunks():
        magnitude = chunk.task_vector(index).abs_()
        from_high = magnitude >= high
        n_from_high += int(from_high.count_nonzero())
        n_above_high += int((magnitude > high).count_nonzero()) if high < math.inf else 0
        n_from_low += int((magnitude >= low).count_nonzero())
        inside.append(magnitude[(magnitude > low).logical_and_(from_high.logical_not_())])
    if n_above_high < k <= n_from_high:
        return Order(high, n_above_high, n_from_high)
    between = torch.cat(inside)
    if n_from_high < k <= n_from_high + between.numel():
        value = between.kthvalue(between.numel() - (k - n_from_high) + 1).values
        n_above = n_from_high + int((between > value).count_nonzero())
        return Order(value.item(), n_above, n_above + int((between == value).count_nonzero()))
    n_above_low = n_from_high + between.numel()
    if n_above_low < k <= n_from_low:
        return Order(low, n_above_low, n_from_low)
    return None


def _from_bits(inputs: MergeInput, index: int, k: int) -> Order:
    """By counting: floats that are not negative are in the order of their bits."""
    n_bins = 1 << (31 - _LOW_BITS)
    high, n_above = _count(inputs, index, k, n_bins, lambda bits: bits >> _LOW_BITS)
    low_bits = (1 << _LOW_BITS) - 1
    low, n_above_in_bin = _count(
        inputs, index, k - n_above, low_bits + 1, lambda bits: bits[bits >> _LOW_BITS == high] & low_bits
    )
    value = torch.tensor([high << _LOW_BITS | low], dtype=torch.int32).view(torch.float32).item()
    n_from = 0
    for chunk in inputs.chunks():
        n_from += int((chunk.task_vector(index).abs_() >= value).count_nonzero())
    return Order(value, n_above + n_above_in_bin, n_from)


def _count(inputs: MergeInput, index: int, k: int, n_bins: int, bin_of: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """The bin of the ``k``-th largest entry, and the number of entries in the bins above it."""
    counts = torch.zeros(n_bins, dtype=torch.int64, device=inputs.device)
    for chunk in inputs.chunks():
        bits = chunk.task_vector(index).abs_().view(torch.int32)
        counts += torch.bincount(bin_of(bits), minlength=n_bins)
    from_bin = counts.flip(0).cumsum(0).flip(0)  # entries in a bin and those above it
    found = int((from_bin >= k).count_nonzero()) - 1
    return found, int(from_bin[found] - counts[found])
