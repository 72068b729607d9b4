"""What methods of weighted task vectors share: they thin and weight each one, may elect signs, and add to the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from optuna_merge.methods.elementwise import Differentiated, write
from optuna_merge.methods.function import MergeInput, float32_sum
from optuna_merge.methods.sparsifier import Sparsifier, Thinning

Sparsify = Callable[[MergeInput, int], Sparsifier]
"""Makes the sparsifier of one source's tensor. The sparsifiers of all sources must have the same thinning."""

_NO_DIVISOR = 1e-8  # as in mergekit, a smaller sum of weights is replaced by 1


def untouched(inputs: MergeInput, index: int) -> Sparsifier:
    """The sparsifier that keeps everything as it is."""
    return Sparsifier(_as_it_is)


@dataclass(frozen=True)
class Selection:
    """Which entries of the sum of the task vectors are kept.

    Attributes:
        factors: Returns 1 or 0 for each entry, shape ``[n]``; given the weighted task vectors before they are thinned,
            the sum of the thinned ones, shape ``[n]`` each, and ``numbers``, float32. Equal functions share a kernel.
        numbers: Its numbers.
    """

    factors: Callable[[list[Tensor], Tensor, Tensor], Tensor]
    numbers: tuple[float, ...]


def add_task_vectors(
    inputs: MergeInput, out: Tensor, sparsify: Sparsify = untouched, selection: Selection | None = None
) -> None:
    """Write ``base + lambda sum_i weight_i sparse_i``; ``normalize`` divides the sum by ``sum_i weight_i``."""
    divisor = _sum_of_weights(inputs.per_model["weight"]) if inputs.switches["normalize"] else 1.0
    _write(inputs, out, sparsify, (_added, _added), divisor, selection)


def elect_task_vectors(inputs: MergeInput, out: Tensor, sparsify: Sparsify, selection: Selection | None = None) -> None:
    """Write the base plus the weighted entries that have the elected sign, which is the sign of their sum.

    A sum of 0 elects plus. ``normalize`` divides each element by the sum of the weights that took part in it, or by 1
    where that sum is 0.

    References:
        TIES-Merging, arXiv:2306.01708, Algorithm 1, steps 2 and 3. Departure, as in mergekit: the election is
        weighted.
    """
    combine = _elected_mean if inputs.switches["normalize"] else _elected_sum
    _write(inputs, out, sparsify, (combine, _elected_sum), 1.0, selection)


Combine = Callable[[list[Tensor], Tensor], Tensor]
"""Combines sparse task vectors times their weights, shape ``[n]`` each; also given the weights, ``[n_models]``."""


@dataclass(frozen=True)
class _Combination(Differentiated):
    """The expression of a method, from its thinning and its way to combine.

    Attributes:
        thinning: Thins each task vector.
        n_floats, n_integers: How many numbers the thinning of one source takes.
        combine: Combines the weighted task vectors.
        add: Their sum without a divisor, which ``select`` is given.
        select: Keeps entries, see :class:`Selection`; None keeps all.
        is_rescaled: Whether any source's factor differs from 1.
        is_divided: Whether the divisor differs from 1.
        is_scaled: Whether the scale differs from 1. Leaving out factors of 1 changes no bit and saves time.
    """

    thinning: Thinning
    n_floats: int
    n_integers: int
    combine: Combine
    add: Combine
    select: Callable[[list[Tensor], Tensor, Tensor], Tensor] | None
    is_rescaled: bool
    is_divided: bool
    is_scaled: bool

    def __call__(
        self, stored: tuple[Tensor, ...], extras: tuple[Tensor, ...], floats: Tensor, integers: Tensor
    ) -> Tensor:
        base, *models = stored
        base = base.float()
        divisor, scale = floats[0], floats[1]
        weights = floats[2 : 2 + len(models)]
        numbers = floats[2 + len(models) :]
        weighted, unthinned = [], []
        for index, model in enumerate(models):
            own = numbers[index * self.n_floats : (index + 1) * self.n_floats]
            own_integers = integers[index * self.n_integers : (index + 1) * self.n_integers]
            extra = extras[index] if extras else None
            task_vector = model.float() - base
            sparse = self.thinning(task_vector, own[1:], own_integers, extra)
            if self.is_rescaled:
                sparse = sparse * own[0]
            weighted.append(sparse * weights[index])
            if self.select is not None:
                unthinned.append(task_vector * weights[index])
        total = self.combine(weighted, weights)
        if self.select is not None:
            added = total if self.combine is self.add else self.add(weighted, weights)
            # A product, so that NaN stays.
            total = total * self.select(unthinned, added, numbers[len(models) * self.n_floats :])
        if self.is_divided:
            total = total / divisor
        if self.is_scaled:
            total = total * scale
        return base + total

    def derivatives(
        self,
        stored: tuple[Tensor, ...],
        extras: tuple[Tensor, ...],
        floats: Tensor,
        integers: Tensor,
        gradient: Tensor,
    ) -> Tensor | None:
        """Of a weighted sum, from the product of each sparse task vector with the gradient; see ``Differentiated``."""
        if self.combine is not _added or self.select is not None or self.n_floats != 1:
            return None
        base, *models = stored
        base = base.float()
        n = len(models)
        products = []
        for index, model in enumerate(models):
            own_integers = integers[index * self.n_integers : (index + 1) * self.n_integers]
            sparse = self.thinning(model.float() - base, floats[:0], own_integers, extras[index] if extras else None)
            products.append(torch.dot(sparse, gradient))
        found = torch.stack(products).double()
        wide = floats.double()
        divisor, scale, weights, factors = wide[:1], wide[1:2], wide[2 : 2 + n], wide[2 + n :]
        total = (weights * factors * found).sum(0, keepdim=True) / divisor
        found = found * scale / divisor
        return torch.cat([-total * scale / divisor, total, found * factors, found * weights])


def _write(
    inputs: MergeInput,
    out: Tensor,
    sparsify: Sparsify,
    ways: tuple[Combine, Combine],
    divisor: float,
    selection: Selection | None,
) -> None:
    weights = inputs.per_model["weight"]
    if not out.numel():
        return
    sparsifiers = [sparsify(inputs, index) for index in range(len(weights))]
    first = sparsifiers[0]
    expression = _Combination(
        first.thinning,
        1 + len(first.floats),
        first.n_integers,
        *ways,
        None if selection is None else selection.factors,
        is_rescaled=any(sparsifier.factor != 1 for sparsifier in sparsifiers),
        is_divided=divisor != 1,
        is_scaled=inputs.shared["lambda"] != 1,
    )
    numbers = [number for sparsifier in sparsifiers for number in (sparsifier.factor, *sparsifier.floats)]
    numbers += () if selection is None else selection.numbers

    def integers(span: slice) -> Iterator[int]:
        return (number for sparsifier in sparsifiers for number in sparsifier.integers(span))

    extras = [sparsifier.extra for sparsifier in sparsifiers if sparsifier.extra is not None]
    write(inputs, out, expression, [divisor, inputs.shared["lambda"], *weights, *numbers], integers, extras)


def _as_it_is(task_vector: Tensor, floats: Tensor, integers: Tensor, extra: Tensor | None) -> Tensor:
    return task_vector


def _added(weighted: list[Tensor], weights: Tensor) -> Tensor:
    # Products are rounded before they are added, so that opposite ones cancel and elect plus.
    total = weighted[0]
    for vector in weighted[1:]:
        total = total + vector
    return total


def _elected_sum(weighted: list[Tensor], weights: Tensor) -> Tensor:
    is_negative = _added(weighted, weights) < 0
    total = torch.zeros_like(weighted[0])
    for vector in weighted:
        total = total + torch.where(torch.where(is_negative, vector > 0, vector < 0), 0.0, vector)
    return total


def _elected_mean(weighted: list[Tensor], weights: Tensor) -> Tensor:
    is_negative = _added(weighted, weights) < 0
    divisor = torch.zeros_like(weighted[0])
    for index, vector in enumerate(weighted):
        divisor = divisor + torch.where(torch.where(is_negative, vector < 0, vector > 0), weights[index], 0.0)
    return _elected_sum(weighted, weights) / torch.where(divisor == 0, 1.0, divisor)


def _sum_of_weights(weights: tuple[float, ...]) -> float:
    total = float32_sum(weights)
    return 1.0 if abs(total) < _NO_DIVISOR else total
