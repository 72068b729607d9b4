"""Which entries of a task vector are among its largest: exact, in pieces, without sorting it.

A histogram of the magnitudes, made once for a tensor of a model and kept, says in which narrow bin the k-th largest
lies. One pass over the tensor then looks at the entries of that bin alone. What was found is kept too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_merge.methods.function import Chunk, MergeInput

_LOW_BITS = 15  # of the 31 bits of a magnitude; the others number its bin
_N_BINS = 1 << (31 - _LOW_BITS)
_N_REMEMBERED = 4  # splits of one tensor: a density that is no trial parameter costs nothing after the first merge
_LINE = 16  # neighbours that are looked at together when entries of a bin are searched for


@dataclass(frozen=True)
class Quantity:
    """Something that is not negative and that each element of a tensor has.

    Attributes:
        key: Tells what it is, of which models; the same quantity of the same models has the same values in each merge.
        of: Its float32 values in a piece, shape ``[n]``; they will be overwritten.
    """

    key: tuple[str, ...]
    of: Callable[[Chunk], Tensor]


def magnitudes(inputs: MergeInput, index: int) -> Quantity:
    """The magnitudes of a source's task vector."""
    return Quantity(("magnitude", inputs.identities[index]), lambda chunk: chunk.task_vector(index).abs_())


@dataclass(frozen=True)
class Split:
    """Parts the elements with the largest values, such as the largest entries of a task vector, from the others.

    Attributes:
        value: Entries of a greater magnitude are among the largest, those of a smaller one are not.
        cut: Of the entries of this very magnitude, those at a flat index below ``cut`` are.
        is_early: Or, if False, those at ``cut`` and above.
    """

    value: float
    cut: int
    is_early: bool

    def keep(self, chunk: Chunk, task_vector: Tensor, name: str = "kept") -> Tensor:
        """A piece of the task vector with all but the largest entries zeroed.

        Args:
            chunk: The piece.
            task_vector: Its elements, shape ``[n]``.
            name: Of the memory that the result is written to.
        """
        out = chunk.scratch(name)
        n_before_cut = min(max(self.cut - chunk.span.start, 0), task_vector.numel())
        for part, has_ties in ((slice(n_before_cut), self.is_early), (slice(n_before_cut, None), not self.is_early)):
            largest_zeroed = _next_below(self.value) if has_ties else self.value
            torch.ops.aten.hardshrink.out(task_vector[part], largest_zeroed, out=out[part])
        return out


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
        return Split(math.inf, 0, is_early)
    value, n_above, n_equal = kth_largest(inputs, quantity, n_largest)
    n_ties = n_largest - n_above
    n_before = n_ties if is_early else n_equal - n_ties
    if n_before == 0:
        return Split(value, 0, is_early)
    if n_before == n_equal:
        return Split(value, inputs.models[0].numel(), is_early)
    return Split(value, _end_of_ties(inputs, quantity, value, n_before), is_early)


def kth_largest(inputs: MergeInput, quantity: Quantity, k: int) -> tuple[float, int, int]:
    """The ``k``-th largest value of a quantity, 1 being the largest.

    Returns:
        The value, and the numbers of elements where it is greater, and where it is the same.
    """
    # Floats that are not negative are in the order of their bits.
    key = (*quantity.key, inputs.name)
    if key not in inputs.memory:
        inputs.memory[key] = _histogram(inputs, quantity)
    first_bin, counts = inputs.memory[key]
    place, n_above = _find(counts, k)
    high_bits = first_bin + place
    low_bits, n_above_in_bin, n_equal = _find_in_bin(inputs, quantity, high_bits, k - n_above)
    value = torch.tensor([high_bits << _LOW_BITS | low_bits], dtype=torch.int32).view(torch.float32).item()
    return value, n_above + n_above_in_bin, n_equal


def _histogram(inputs: MergeInput, quantity: Quantity) -> tuple[int, Tensor]:
    """The first bin that is not empty, and the counts from there to the last one that is not."""
    counts = torch.zeros(_N_BINS, dtype=torch.int64, device=inputs.device)
    for chunk in inputs.chunks():
        counts += torch.bincount(quantity.of(chunk).view(torch.int32) >> _LOW_BITS, minlength=_N_BINS)
    filled = counts.nonzero().view(-1)
    first, last = int(filled[0]), int(filled[-1])
    return first, counts[first : last + 1].clone()


def _find(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the ``k``-th largest entry, and the number of entries in the bins above it."""
    from_bin = counts.flip(0).cumsum(0).flip(0)  # entries of a bin and of those above it
    found = int((from_bin >= k).count_nonzero()) - 1
    return found, int(from_bin[found] - counts[found])


def _find_in_bin(inputs: MergeInput, quantity: Quantity, high_bits: int, k: int) -> tuple[int, int, int]:
    """Low bits of the ``k``-th largest entry of a bin, and how many there have greater ones, and the same."""
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64, device=inputs.device)
    for chunk in inputs.chunks():
        found = _entries_of_bin(chunk, quantity.of(chunk).view(torch.int32), high_bits)
        counts += torch.bincount(found & (len(counts) - 1), minlength=len(counts))
    place, n_above = _find(counts, k)
    return place, n_above, int(counts[place])


def _entries_of_bin(chunk: Chunk, bits: Tensor, high_bits: int) -> Tensor:
    """Those of a piece's values that are in a bin, in order, shape ``[n_found]``."""
    is_in = torch.bitwise_right_shift(bits, _LOW_BITS, out=chunk.integers("is_in"))
    torch.eq(is_in, high_bits, out=is_in)
    # Few are: whole lines are passed over, which is several times faster than a look at each entry.
    n_in_lines = bits.numel() // _LINE * _LINE
    lines = is_in[:n_in_lines].view(-1, _LINE).amax(1).nonzero().view(-1)
    near = torch.cat((bits[:n_in_lines].view(-1, _LINE).index_select(0, lines).view(-1), bits[n_in_lines:]))
    return near[near >> _LOW_BITS == high_bits]


def _end_of_ties(inputs: MergeInput, quantity: Quantity, value: float, n_ties: int) -> int:
    """One more than the flat index of the ``n_ties``-th element where the quantity is ``value``."""
    for chunk in inputs.chunks():
        ties = torch.eq(quantity.of(chunk), value, out=chunk.scratch("ties"))
        n_here = int(ties.sum())
        if n_here >= n_ties:
            end: int = chunk.span.start + int(ties.nonzero().view(-1)[n_ties - 1]) + 1
            return end
        n_ties -= n_here
    raise AssertionError("there are as many ties as were counted")


def _next_below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()
