"""Which entries of a task vector are among its largest: exact, in pieces, without sorting it.

A histogram of the magnitudes, made once for a tensor of a model and kept, says in which narrow bin the k-th largest
lies. One pass over the tensor then looks at the entries of that bin alone. What was found is kept too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_merge.methods.elementwise import evaluate
from optuna_merge.methods.function import Chunk, MergeInput, numbers_on

_LOW_BITS = 15  # of the 31 bits of a magnitude; the others number its bin
_N_BINS = 1 << (31 - _LOW_BITS)
_N_REMEMBERED = 4  # splits of one tensor: a density that is no trial parameter costs nothing after the first merge
_N_REMEMBERED_VALUES = 256  # of one bin
_N_ENTRIES = 1 << 20  # of one bin, whose places are kept for as long as it is searched
_MANY_LINES = 128  # if more than this part of the elements begins a line with an entry, each is looked at
_LINE = 8  # neighbours that are looked at together when entries of a bin are searched for: bytes of an int64


@dataclass(frozen=True)
class Quantity:
    """Something that is not negative and that each element of a tensor has.

    Attributes:
        key: Tells what it is, of which models; the same quantity of the same models has the same values in each merge.
        of: Its float32 values in a piece, shape ``[n]``; they will be overwritten.
        index: The source whose task vector's magnitudes it is, if it is that.
    """

    key: tuple[str, ...]
    of: Callable[[Chunk], Tensor]
    index: int | None = None


def magnitudes(inputs: MergeInput, index: int) -> Quantity:
    """The magnitudes of a source's task vector."""
    return Quantity(("magnitude", inputs.identities[index]), lambda chunk: chunk.task_vector(index).abs_(), index)


_Entries = list[tuple[int, Tensor, Tensor]]
"""Entries of a bin, for each piece of a tensor: where the piece begins, places in it, and low bits there."""


@dataclass(frozen=True)
class Split:
    """Parts the elements with the largest values, such as the largest entries of a task vector, from the others.

    Attributes:
        thresholds: Entries of a greater magnitude are among the largest: those at a flat index below ``cut`` if it is
            greater than the first of the two, those at ``cut`` and above if it is greater than the second.
        cut: The two differ only in whether entries that tie are among the largest.
    """

    thresholds: tuple[float, float]
    cut: int = 0

    @classmethod
    def none(cls) -> Split:
        """None are among the largest."""
        return cls((math.inf, math.inf))

    @classmethod
    def all(cls) -> Split:
        """All are."""
        return cls((-1.0, -1.0))

    def cut_in(self, span: slice) -> int:
        """How many elements of a piece lie before the cut."""
        n_before: int = min(max(self.cut - span.start, 0), span.stop - span.start)
        return n_before

    def keep(self, chunk: Chunk, values: Tensor) -> Tensor:
        """A piece, shape ``[n]``, with all but the largest zeroed."""
        (cut,) = numbers_on(values.device, (self.cut_in(chunk.span),), torch.int64)
        return keep_largest(values, numbers_on(values.device, self.thresholds), cut)


def threshold(values: Tensor, thresholds: Tensor, cut: Tensor) -> Tensor:
    """Of each element of a piece, shape ``[n]``; see :class:`Split`."""
    place = torch.arange(values.shape[0], dtype=torch.int32, device=values.device)
    return torch.where(place < cut, thresholds[0], thresholds[1])


def keep_largest(values: Tensor, thresholds: Tensor, cut: Tensor) -> Tensor:
    """A piece with all but the largest zeroed; see :class:`Split`. Entries that are not a number stay."""
    return torch.where(values.abs() <= threshold(values, thresholds, cut), 0.0, values)


def split(inputs: MergeInput, index: int, n_largest: int, *, is_early: bool) -> Split:
    """Part the ``n_largest`` largest entries of a source's task vector from the others.

    Args:
        inputs: The tensor.
        index: Which source.
        n_largest: At least 0, at most the number of elements.
        is_early: Whether of equal magnitudes the first count as larger, or the last.
    """
    return split_by(inputs, magnitudes(inputs, index), n_largest, is_early=is_early)


def split_by(inputs: MergeInput, quantity: Quantity, n_largest: int, *, is_early: bool) -> Split:
    """Part the ``n_largest`` elements with the largest values of a quantity from the others, as :func:`split` does."""
    splits: dict[tuple[int, bool], Split] = inputs.memory.setdefault((*quantity.key, inputs.name, "splits"), {})
    key = (n_largest, is_early)
    if key not in splits:
        if len(splits) == _N_REMEMBERED:
            del splits[next(iter(splits))]
        splits[key] = _find_split(inputs, quantity, n_largest, is_early=is_early)
    return splits[key]


def _find_split(inputs: MergeInput, quantity: Quantity, n_largest: int, *, is_early: bool) -> Split:
    if n_largest == 0:
        return Split.none()
    value, n_above, n_equal, entries = _find_kth_largest(inputs, quantity, n_largest)
    n_ties = n_largest - n_above
    n_before = n_ties if is_early else n_equal - n_ties
    cut = n_before and 1 << 62
    if 0 < n_before < n_equal:
        cut = _end_of_ties(_ties(inputs, quantity, value, entries), n_before)
    with_ties = _next_below(value)
    return Split((with_ties, value) if is_early else (value, with_ties), cut)


def kth_largest(inputs: MergeInput, quantity: Quantity, k: int) -> tuple[float, int, int]:
    """The ``k``-th largest value of a quantity, 1 being the largest.

    Returns:
        The value, and the numbers of elements where it is greater, and where it is the same.
    """
    return _find_kth_largest(inputs, quantity, k)[:3]


def _find_kth_largest(inputs: MergeInput, quantity: Quantity, k: int) -> tuple[float, int, int, _Entries | None]:
    """What :func:`kth_largest` returns, and the entries of the bin where the value is, if they were looked at."""
    # Floats that are not negative are in the order of their bits.
    key = (*quantity.key, inputs.name)
    if key not in inputs.memory:
        inputs.memory[key] = _histogram(inputs, quantity)
    first_bin, counts = inputs.memory[key]
    place, n_above = _find(counts, k)
    high_bits = first_bin + place
    low_bits, n_above_in_bin, n_equal, entries = _find_in_bin(inputs, quantity, high_bits, k - n_above)
    return _value_of(high_bits << _LOW_BITS | low_bits), n_above + n_above_in_bin, n_equal, entries


def _histogram(inputs: MergeInput, quantity: Quantity) -> tuple[int, Tensor]:
    """The first bin that is not empty, and the counts from there to the last one that is not."""
    counts = torch.zeros(_N_BINS, dtype=torch.int64, device=inputs.device)
    for chunk in inputs.chunks():
        counts += torch.bincount(quantity.of(chunk).view(torch.int32) >> _LOW_BITS, minlength=_N_BINS)
    filled = counts.nonzero().view(-1)
    first, last = torch.stack([filled[0], filled[-1]]).tolist()
    return first, counts[first : last + 1].clone()


def _find(counts: Tensor, k: int, *others: Tensor) -> list[int]:
    """The bin of the ``k``-th largest entry, the entries in the bins above it, and what others hold for that bin.

    All of them together: to ask a GPU waits for it.
    """
    from_bin = counts.flip(0).cumsum(0).flip(0)  # entries of a bin and of those above it
    found = (from_bin >= k).sum(0, keepdim=True) - 1
    n_above = from_bin.index_select(0, found) - counts.index_select(0, found)
    answer: list[int] = torch.cat([found, n_above, *(other.index_select(0, found) for other in others)]).tolist()
    return answer


def _find_in_bin(
    inputs: MergeInput, quantity: Quantity, high_bits: int, k: int
) -> tuple[int, int, int, _Entries | None]:
    """Low bits of the ``k``-th largest entry of a bin, how many there have greater ones, and the same; the entries."""
    bins: dict[int, tuple[Tensor, Tensor]] = inputs.memory.setdefault((*quantity.key, inputs.name, "bins"), {})
    entries = None
    if high_bits in bins:
        low_bits, counts = bins[high_bits]
    else:
        low_bits, counts, entries = _count_low_bits(inputs, quantity, high_bits)
        if len(low_bits) <= _N_REMEMBERED_VALUES:  # as of bfloat16 models, whose differences lie on a lattice
            bins[high_bits] = low_bits, counts
    _, n_above, low, n_equal = _find(counts, k, low_bits, counts)
    return low, n_above, n_equal, entries


def _count_low_bits(inputs: MergeInput, quantity: Quantity, high_bits: int) -> tuple[Tensor, Tensor, _Entries | None]:
    """The low bits that entries of a bin have, ascending; how many have them; the entries, if they are not many."""
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64, device=inputs.device)
    lowest = high_bits << _LOW_BITS
    entries: _Entries | None = []
    n_entries = 0
    for chunk, values, is_in in _where(inputs, quantity, _value_of(lowest), _value_of(lowest | (1 << _LOW_BITS) - 1)):
        places = _places(is_in)
        found = values(places).view(torch.int32) & (len(counts) - 1)
        counts += torch.bincount(found, minlength=len(counts))
        n_entries += len(found)
        if n_entries > _N_ENTRIES:
            entries = None
        elif entries is not None:
            entries.append((chunk.span.start, places, found))
    low_bits = counts.nonzero().view(-1)
    return low_bits, counts[low_bits], entries


def _ties(
    inputs: MergeInput, quantity: Quantity, value: float, entries: _Entries | None
) -> Iterator[tuple[int, Tensor]]:
    """For each piece where it begins, and the places in it, in order, where the quantity is ``value``."""
    if entries is None:
        for chunk, _, is_tie in _where(inputs, quantity, value, value):
            yield chunk.span.start, _places(is_tie)
    else:
        low_bits = torch.tensor(value).view(torch.int32) & ((1 << _LOW_BITS) - 1)
        for start, places, found in entries:
            yield start, places[found == low_bits.item()]


def _end_of_ties(ties: Iterator[tuple[int, Tensor]], n_ties: int) -> int:
    """One more than the flat index of the ``n_ties``-th tie."""
    for start, places in ties:
        if len(places) >= n_ties:
            return start + int(places[n_ties - 1]) + 1
        n_ties -= len(places)
    raise AssertionError("there are as many ties as were counted")


def _where(
    inputs: MergeInput, quantity: Quantity, low: float, high: float
) -> Iterator[tuple[Chunk, Callable[[Tensor], Tensor], Tensor]]:
    """For each piece a look-up of values by place, and 1 where they are in [low, high], else 0; uint8, ``[n]``."""
    bounds = numbers_on(inputs.device, (low, high))
    for chunk in inputs.chunks() if quantity.index is None else inputs.large_chunks():
        is_in = chunk.scratch("is_in", torch.uint8)
        if quantity.index is None:
            values = quantity.of(chunk)
            evaluate(inputs, is_in, _is_within, (values,), (), bounds, ())
            yield chunk, values.__getitem__, is_in
        else:
            pair = chunk.stored_pair(quantity.index)
            evaluate(inputs, is_in, _has_magnitude_within, pair, (), bounds, ())
            yield chunk, functools.partial(_magnitudes_at, *pair), is_in


def _is_within(sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    # A product of numbers: masks that become bytes are not compiled to vector instructions.
    return torch.where(sources[0] >= floats[0], 1.0, 0.0) * torch.where(sources[0] <= floats[1], 1.0, 0.0)


def _has_magnitude_within(
    sources: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
) -> Tensor:
    base, model = sources
    return _is_within(((model.float() - base.float()).abs(),), extras, floats, integers)


def _magnitudes_at(base: Tensor, model: Tensor, places: Tensor) -> Tensor:
    return (model[places].float() - base[places].float()).abs()


def _places(is_in: Tensor) -> Tensor:
    """The indices of the ones among zeros, in order; uint8 in, shape ``[n]``, int64 out."""
    # Few are: eight at a time are passed over, which is several times faster than a look at each.
    n_in_lines = is_in.numel() // _LINE * _LINE
    lines = is_in[:n_in_lines].view(torch.int64).nonzero()
    if len(lines) * _MANY_LINES > is_in.numel():
        return is_in.nonzero().view(-1)
    near = (lines * _LINE + torch.arange(_LINE, device=is_in.device)).view(-1)
    near = torch.cat((near, torch.arange(n_in_lines, is_in.numel(), device=is_in.device)))
    return near[is_in[near].bool()]


def _value_of(bits: int) -> float:
    value: float = torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()
    return math.inf if math.isnan(value) else value


def _next_below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()
