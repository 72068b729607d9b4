"""Which entries of a task vector are among its largest: exactly, in pieces and without sorting.

A histogram of the magnitudes tells in which narrow bin the k-th largest lies; it is made once for each tensor of a
model and kept. One pass over the tensor then looks only at the entries of that bin, and its findings are kept too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_merge.errors import NonFiniteMergeError
from optuna_merge.methods.elementwise import evaluate
from optuna_merge.methods.function import Chunk, MergeInput, numbers_on

_LOW_BITS = 15  # of the 31 bits of a magnitude; the other bits number its bin
_N_BINS = 1 << (31 - _LOW_BITS)
_MAGNITUDE_BITS = 0x7FFFFFFF
_BIN_OF_INFINITY = 0x7F800000 >> _LOW_BITS  # NaN has larger magnitude bits
_N_REMEMBERED = 4  # splits of one tensor: a density that is not searched costs nothing after the first merge
_N_REMEMBERED_VALUES = 256  # distinct values of one bin
_N_ENTRIES = 1 << 20  # entries of one bin whose places are kept while it is searched
_MANY_LINES = 128  # if more than 1 in this many elements starts a line with an entry, all elements are looked at
_LINE = 8  # neighbours that are looked at together when searching entries of a bin: the bytes of an int64


@dataclass(frozen=True)
class Quantity:
    """A number for each element of a tensor that is at least 0; -0 counts as 0.

    Attributes:
        key: What it is, for messages, and the identities of its models. With an equal key, values are equal in every
            merge.
        of: Returns its float32 values in a piece, shape ``[n]``, which the caller may overwrite.
        index: The source, if the quantity is the magnitudes of its task vector.
    """

    key: tuple[str, ...]
    of: Callable[[Chunk], Tensor]
    index: int | None = None


def magnitudes(inputs: MergeInput, index: int) -> Quantity:
    """The magnitudes of a source's task vector."""
    key = ("magnitude of the change", inputs.identities[index])
    return Quantity(key, lambda chunk: chunk.task_vector(index).abs_(), index)


_Entries = list[tuple[int, Tensor, Tensor]]
"""Entries of a bin. For each piece of a tensor: index of its first element, places in it, and low bits there."""


@dataclass(frozen=True)
class Split:
    """Splits the elements with the largest values, such as the largest entries of a task vector, from the others.

    Attributes:
        thresholds: An element is among the largest if its magnitude exceeds the threshold of its part of the tensor:
            the first for flat indices below ``cut``, the second from ``cut`` on.
        cut: Flat index where the threshold changes. The two differ only in whether ties are among the largest.
    """

    thresholds: tuple[float, float]
    cut: int = 0

    @classmethod
    def none(cls) -> Split:
        """No element is among the largest."""
        return cls((math.inf, math.inf))

    @classmethod
    def all(cls) -> Split:
        """All elements are among the largest."""
        return cls((-1.0, -1.0))

    def cut_in(self, span: slice) -> int:
        """Number of elements of a piece before the cut."""
        n_before: int = min(max(self.cut - span.start, 0), span.stop - span.start)
        return n_before

    def keep(self, chunk: Chunk, values: Tensor) -> Tensor:
        """The values of a piece, shape ``[n]``, with all but the largest zeroed."""
        (cut,) = numbers_on(values.device, (self.cut_in(chunk.span),), torch.int64)
        return keep_largest(values, numbers_on(values.device, self.thresholds), cut)


def threshold(values: Tensor, thresholds: Tensor, cut: Tensor) -> Tensor:
    """Threshold of each element of a piece, shape ``[n]``; see :class:`Split`."""
    place = torch.arange(values.shape[0], dtype=torch.int32, device=values.device)
    return torch.where(place < cut, thresholds[0], thresholds[1])


def keep_largest(values: Tensor, thresholds: Tensor, cut: Tensor) -> Tensor:
    """The values of a piece with all but the largest zeroed; see :class:`Split`. NaN stays."""
    return torch.where(values.abs() <= threshold(values, thresholds, cut), 0.0, values)


def split(inputs: MergeInput, index: int, n_largest: int, *, is_early: bool) -> Split:
    """Split the ``n_largest`` largest entries of a source's task vector from the others.

    Args:
        inputs: The tensor.
        index: Index of the source.
        n_largest: In [0, number of elements].
        is_early: Whether, among equal magnitudes, the first count as larger (True) or the last.
    """
    return split_by(inputs, magnitudes(inputs, index), n_largest, is_early=is_early)


def split_by(inputs: MergeInput, quantity: Quantity, n_largest: int, *, is_early: bool) -> Split:
    """Split the ``n_largest`` elements with the largest values of a quantity from the others; see :func:`split`."""
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
    """Find the ``k``-th largest value of a quantity; ``k`` = 1 is the largest.

    Returns:
        The value, the number of elements above it, and the number of elements equal to it.
    """
    return _find_kth_largest(inputs, quantity, k)[:3]


def _find_kth_largest(inputs: MergeInput, quantity: Quantity, k: int) -> tuple[float, int, int, _Entries | None]:
    """What :func:`kth_largest` returns, and the entries of the value's bin if they were looked at."""
    # Floats that are not negative have the order of their bits.
    key = (*quantity.key, inputs.name)
    if key not in inputs.memory:
        inputs.memory[key] = _histogram(inputs, quantity)
    first_bin, counts = inputs.memory[key]
    place, n_above = _find(counts, k)
    high_bits = first_bin + place
    low_bits, n_above_in_bin, n_equal, entries = _find_in_bin(inputs, quantity, high_bits, k - n_above)
    return _value_of(high_bits << _LOW_BITS | low_bits), n_above + n_above_in_bin, n_equal, entries


def _histogram(inputs: MergeInput, quantity: Quantity) -> tuple[int, Tensor]:
    """The first bin that is not empty, and the counts from it to the last bin that is not empty.

    Raises:
        NonFiniteMergeError: If a value is NaN or infinity, which have no place among the others.
    """
    counts = torch.zeros(_N_BINS, dtype=torch.int64, device=inputs.device)
    for chunk in inputs.chunks():
        bits = quantity.of(chunk).view(torch.int32).bitwise_and_(_MAGNITUDE_BITS)  # -0 and NaN may have a sign
        counts += torch.bincount(bits >> _LOW_BITS, minlength=_N_BINS)
    filled = counts.nonzero().view(-1)
    first, last = torch.stack([filled[0], filled[-1]]).tolist()
    if last >= _BIN_OF_INFINITY:
        raise NonFiniteMergeError(
            f"{inputs.name}: {quantity.key[0]} of each element must be finite, got NaN or infinity; this merge cannot"
            " be scored"
        )
    return first, counts[first : last + 1].clone()


def _find(counts: Tensor, k: int, *others: Tensor) -> list[int]:
    """The bin of the ``k``-th largest entry, the number of entries above that bin, and the values of others there.

    They are read together, because each read waits for the GPU.
    """
    from_bin = counts.flip(0).cumsum(0).flip(0)  # entries in a bin and above it
    found = (from_bin >= k).sum(0, keepdim=True) - 1
    n_above = from_bin.index_select(0, found) - counts.index_select(0, found)
    answer: list[int] = torch.cat([found, n_above, *(other.index_select(0, found) for other in others)]).tolist()
    return answer


def _find_in_bin(
    inputs: MergeInput, quantity: Quantity, high_bits: int, k: int
) -> tuple[int, int, int, _Entries | None]:
    """Low bits of the ``k``-th largest entry of a bin, the numbers of larger and of equal entries, the entries."""
    bins: dict[int, tuple[Tensor, Tensor]] = inputs.memory.setdefault((*quantity.key, inputs.name, "bins"), {})
    entries = None
    if high_bits in bins:
        low_bits, counts = bins[high_bits]
    else:
        low_bits, counts, entries = _count_low_bits(inputs, quantity, high_bits)
        if len(low_bits) <= _N_REMEMBERED_VALUES:  # as with bfloat16 models, whose differences lie on a lattice
            bins[high_bits] = low_bits, counts
    _, n_above, low, n_equal = _find(counts, k, low_bits, counts)
    return low, n_above, n_equal, entries


def _count_low_bits(inputs: MergeInput, quantity: Quantity, high_bits: int) -> tuple[Tensor, Tensor, _Entries | None]:
    """The low bits of a bin's entries, ascending; the number of entries for each; the entries, unless they are many."""
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
    """For each piece, its start and the places in it, in order, where the quantity equals ``value``."""
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
    raise AssertionError("there must be as many ties as were counted")


def _where(
    inputs: MergeInput, quantity: Quantity, low: float, high: float
) -> Iterator[tuple[Chunk, Callable[[Tensor], Tensor], Tensor]]:
    """For each piece, a look-up of values by place, and uint8 flags, shape ``[n]``: 1 for values in [low, high]."""
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


def _is_within(stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor) -> Tensor:
    # A product of floats: masks stored as bytes are not compiled to vector instructions.
    return torch.where(stored[0] >= floats[0], 1.0, 0.0) * torch.where(stored[0] <= floats[1], 1.0, 0.0)


def _has_magnitude_within(
    stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
) -> Tensor:
    base, model = stored
    return _is_within(((model.float() - base.float()).abs(),), extras, floats, integers)


def _magnitudes_at(base: Tensor, model: Tensor, places: Tensor) -> Tensor:
    return (model[places].float() - base[places].float()).abs()


def _places(is_in: Tensor) -> Tensor:
    """Indices of the ones, in order, as int64; ``is_in`` is uint8, shape ``[n]``, of zeros and ones."""
    # Ones are rare: skipping eight elements at a time is several times faster than looking at each.
    n_in_lines = is_in.numel() // _LINE * _LINE
    lines = is_in[:n_in_lines].view(torch.int64).nonzero()
    if len(lines) * _MANY_LINES > is_in.numel():
        return is_in.nonzero().view(-1)
    near = (lines * _LINE + torch.arange(_LINE, device=is_in.device)).view(-1)
    near = torch.cat((near, torch.arange(n_in_lines, is_in.numel(), device=is_in.device)))
    return near[is_in[near].bool()]


def _value_of(bits: int) -> float:
    value: float = torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()
    return value


def _next_below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()
