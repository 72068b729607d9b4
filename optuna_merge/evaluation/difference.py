"""The difference of two models that were scored on the same documents: how far it may be off, and whether it is chance.

    term 1, term 2, ... -> a document's share of the difference -> variance of each lm-eval task -> standard error
                                                                -> signs of the shares        -> p-value

A document is one observation, whatever the number of terms that it counts for: its shares of all terms are added up
first. Documents are independent of each other, so are lm-eval tasks. Knows terms and document values; knows nothing of
models and trials.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optuna_merge.evaluation.leaf import BOOTSTRAP_DRAWS
from optuna_merge.evaluation.results import Documents
from optuna_merge.evaluation.term import Term

_DIGITS = 12
"""Shares that agree to this many decimals of the largest one count as equal."""
_TOLERANCE = 1e-9
"""Sums of shares, in units of the largest one, that are this close count as equal."""
_MOST_SUMS = 2**20
"""Up to so many different sums the distribution over all signs is computed, not drawn."""
_MANY = 200
"""With so many documents of equal shares, or as many as count for that, the sum over random signs is normal: the
p-value of 1 in 10,000 is off by less than a tenth."""
_SIGN_DRAWS = 99_999
_BLOCK = 2**21
_SWAPPED_VALUES = 100_000
_FEWEST_SWAPS, _MOST_SWAPS = 199, 9_999


@dataclass(frozen=True)
class Difference:
    """How much better one model scored than another one, on the same documents.

    Attributes:
        value: The one's value minus the other's.
        stderr: Standard error of ``value``, paired by document; infinite if it is not known.
        p_value: Two-sided p-value of the permutation test of :func:`compare`, in [0, 1].
    """

    value: float
    stderr: float
    p_value: float


def compare(terms: Sequence[Term], documents: Documents, others: Documents) -> tuple[float, float]:
    """Standard error and p-value of the difference of two models' values.

    **Standard error.** For terms that are means, from the variance of the documents' shares within each lm-eval task.
    For the lm-eval tasks of a term that is no mean, by bootstrap (200 draws, seeded): documents are drawn, with all
    that the two models scored on them, and every term is computed from the same draw.

    **p-value.** The null hypothesis is that each document's results could as well be the other way round between the
    two models. So the documents' results are swapped in all combinations, and the p-value is the share of combinations
    with a difference at least as large in size. See :func:`sign_flip_p`. With a term that is no mean, the terms are
    computed again for each combination: for all of them if they are few, else for 199 to 9,999 random ones (seeded; the
    more, the fewer documents there are), of which the observed combination counts as one.

    Args:
        terms: The terms of the score.
        documents: Document values of the one model.
        others: Those of the other model, on the same documents.

    Returns:
        The standard error, infinite if a task has only one document; and the p-value.
    """
    shares = _shares([term for term in terms if term.is_mean], documents, others)
    rest = [term for term in terms if not term.is_mean]
    if not rest:
        variance = math.fsum(_variance(of_terms) for of_terms in shares.values())
        return math.sqrt(variance), sign_flip_p(np.concatenate([_added(s) for s in shares.values()] or [np.zeros(0)]))
    pairs = _Pairs.make(rest, documents, others)
    apart = [of_terms for leaf, of_terms in shares.items() if leaf not in pairs.sizes]
    added = {leaf: _added(of_terms) for leaf, of_terms in shares.items()}
    variance = math.fsum([*map(_variance, apart), pairs.bootstrapped_variance(added)])
    return math.sqrt(variance), pairs.swap_p(added)


def sign_flip_p(shares: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of the sign-flip test that documents' shares of a difference are as often below 0 as above.

    It is the share of all combinations of signs whose sum is at least as large in size as the observed one. Five
    documents that one model won, each with the same share, give 2/32: the sign test's value. Where shares differ, a
    document counts by its share.

    It is exact if the combinations have at most 2^20 different sums: up to 20 shares of any size, or thousands of
    documents of a few sizes, as accuracies give. Otherwise it is the normal approximation if at least 200 documents
    matter, ``sum(s^2)^2 / sum(s^4) >= 200``, and else an estimate from 99,999 random combinations (seeded).

    Args:
        shares: Finite; shape ``[n_documents]``, may be empty. Zeros change nothing.

    Returns:
        In [0, 1]; 1 if all shares are 0, and 0 only where a float cannot hold so small a number.
    """
    given = np.asarray(shares, dtype=np.float64)
    in_largest = np.round(given / (np.abs(given).max(initial=0.0) or 1.0), _DIGITS)
    scaled = in_largest[in_largest != 0]
    least = abs(math.fsum(scaled)) - _TOLERANCE
    sizes, counts = np.unique(np.abs(scaled), return_counts=True)
    if math.prod(count + 1 for count in counts.tolist()) <= _MOST_SUMS:
        return _exact_p(sizes, counts, least)
    square, fourth = float(np.sum(scaled**2)), float(np.sum(scaled**4))
    if square**2 / fourth >= _MANY:
        return math.erfc(max(least, 0.0) / math.sqrt(2 * square))
    return _drawn_p(scaled, least)


def _exact_p(sizes: np.ndarray, counts: np.ndarray, least: float) -> float:
    """Of ``count`` documents of one size, the number with a positive sign is binomial."""
    sums, chances = np.zeros(1), np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        of_size = size * (2.0 * np.arange(count + 1) - count)
        sums = np.add.outer(sums, of_size).ravel()
        chances = np.multiply.outer(chances, _halves(count)).ravel()
    return min(1.0, float(chances[np.abs(sums) >= least].sum()))


def _halves(n: int) -> list[float]:
    """The binomial distribution of n fair coins: the chance of 0, 1, ..., n heads."""
    n_ways, n_all, chances = 1, 2**n, []
    for n_heads in range(n + 1):
        chances.append(n_ways / n_all)
        n_ways = n_ways * (n - n_heads) // (n_heads + 1)
    return chances


def _drawn_p(shares: np.ndarray, least: float) -> float:
    rng = np.random.default_rng(0)
    n_as_large, n_left = 1, _SIGN_DRAWS  # the observed combination is one
    while n_left:
        n = min(n_left, max(1, _BLOCK // len(shares)))
        signs = rng.integers(0, 2, (n, len(shares)), dtype=np.int8) * 2 - 1
        n_as_large += int(np.sum(np.abs(signs @ shares) >= least))
        n_left -= n
    return n_as_large / (1 + _SIGN_DRAWS)


def _shares(terms: Iterable[Term], documents: Documents, others: Documents) -> dict[str, np.ndarray]:
    """Lm-eval task to the shares of its documents in the terms, shape ``[n_terms, n_documents]``."""
    found: dict[str, list[np.ndarray]] = {}
    for term in terms:
        for leaf, shares in term.shares(documents, others).items():
            found.setdefault(leaf, []).append(shares)
    return {leaf: np.stack(of_terms) for leaf, of_terms in found.items()}


def _added(shares: np.ndarray) -> np.ndarray:
    """Each document's share in all terms together."""
    added: np.ndarray = np.nansum(shares, axis=0)
    return added


def _variance(shares: np.ndarray) -> float:
    """Variance of the sum of one lm-eval task's shares."""
    n = int(np.isfinite(shares).sum(axis=1).min())
    if n < 2:
        return math.inf
    # a document without the metric of a term says nothing about it: it deviates by 0
    deviations = np.nansum(shares - np.nanmean(shares, axis=1, keepdims=True), axis=0)
    return n / (n - 1) * float(deviations @ deviations)


@dataclass(frozen=True)
class _Pairs:
    """The document values of terms that are no means, of two models.

    Attributes:
        terms: The terms.
        sizes: Each lm-eval task behind them to its number of documents.
        ours, theirs: The values; None where one of the two models has none.
    """

    terms: Sequence[Term]
    sizes: Mapping[str, int]
    ours: Documents
    theirs: Documents

    @classmethod
    def make(cls, terms: Sequence[Term], documents: Documents, others: Documents) -> _Pairs:
        ours: Documents = {}
        theirs: Documents = {}
        for term in terms:
            for leaf, column in term.pairs(documents, others).items():
                ours.setdefault(leaf, {})[term.metric] = [pair and pair[0] for pair in column]
                theirs.setdefault(leaf, {})[term.metric] = [pair and pair[1] for pair in column]
        return cls(terms, {leaf: len(documents[leaf]["doc_id"]) for leaf in ours}, ours, theirs)

    def difference(self, ours: Documents, theirs: Documents) -> float:
        """Sum of weight x difference over the terms; NaN if a term has no value."""
        total = 0.0
        for term in self.terms:
            a, b = term.value(ours), term.value(theirs)
            total += math.nan if a is None or b is None else term.weight * (a - b)
        return total

    def bootstrapped_variance(self, added: Mapping[str, np.ndarray]) -> float:
        """Variance of the difference over the tasks of these terms.

        Args:
            added: Lm-eval task to the shares of its documents in the terms that are means.
        """
        if min(self.sizes.values(), default=0) < 2:
            return math.inf
        rng = np.random.default_rng(0)
        differences = []
        for _ in range(2 * BOOTSTRAP_DRAWS):
            drawn = {leaf: rng.integers(0, n, n) for leaf, n in self.sizes.items()}
            ours, theirs = _drawn(self.ours, drawn), _drawn(self.theirs, drawn)
            in_means = sum(float(added[leaf][rows].sum()) for leaf, rows in drawn.items() if leaf in added)
            differences.append(self.difference(ours, theirs) + in_means)
        return float(np.var(differences, ddof=1)) if np.isfinite(differences).all() else math.inf

    def swap_p(self, added: Mapping[str, np.ndarray]) -> float:
        """p-value of :func:`compare`: documents are swapped between the models, in these terms and in the means."""
        sizes = {leaf: len(shares) for leaf, shares in added.items()} | dict(self.sizes)
        places = [(leaf, row) for leaf, n in sizes.items() for row in range(n) if self._differs(leaf, row, added)]
        n_swaps = min(_MOST_SWAPS, max(_FEWEST_SWAPS, _SWAPPED_VALUES // max(1, sum(self.sizes.values()))))

        def swapped(which: Iterable[bool]) -> float:
            swaps = {leaf: np.zeros(n, dtype=bool) for leaf, n in sizes.items()}
            for (leaf, row), is_swapped in zip(places, which, strict=True):
                swaps[leaf][row] = is_swapped
            ours, theirs = _mixed(self.ours, self.theirs, swaps), _mixed(self.theirs, self.ours, swaps)
            in_means = sum(float(np.where(swaps[leaf], -shares, shares).sum()) for leaf, shares in added.items())
            return self.difference(ours, theirs) + in_means

        least = abs(swapped([False] * len(places))) * (1 - _TOLERANCE)
        if 2 ** len(places) <= n_swaps:
            combinations = [*itertools.product([False, True], repeat=len(places))]
            return sum(not abs(swapped(which)) < least for which in combinations) / len(combinations)
        rng = np.random.default_rng(0)
        draws = (swapped((rng.random(len(places)) < 0.5).tolist()) for _ in range(n_swaps))
        return (1 + sum(not abs(drawn) < least for drawn in draws)) / (1 + n_swaps)

    def _differs(self, leaf: str, row: int, added: Mapping[str, np.ndarray]) -> bool:
        if leaf in added and added[leaf][row] != 0:
            return True
        return any(column[row] != self.theirs[leaf][key][row] for key, column in self.ours.get(leaf, {}).items())


def _drawn(documents: Documents, rows: Mapping[str, np.ndarray]) -> Documents:
    return {
        leaf: {key: [values[row] for row in rows[leaf]] for key, values in columns.items()}
        for leaf, columns in documents.items()
    }


def _mixed(documents: Documents, others: Documents, swaps: Mapping[str, np.ndarray]) -> Documents:
    """The values of ``documents``, of the swapped documents those of ``others``."""
    return {
        leaf: {
            key: [
                b if is_swapped else a for a, b, is_swapped in zip(values, others[leaf][key], swaps[leaf], strict=True)
            ]
            for key, values in columns.items()
        }
        for leaf, columns in documents.items()
    }
