"""Which tokens go through a model together: continuations grouped by context, rows cut into batches.

Knows tokens only; no tokenizer, no tensors and no model.

    context  a b c ── d e      row     a b c d e f g h
                  └── f g h    parent  - a b c d c f g      two continuations after one context, computed once

A row is a tree in depth-first order, or several trees end to end. Token ``i`` attends to token ``j`` if
``j <= i < ends[j]``: to itself and its ancestors. A row of a single branch is an ordinary causal sequence, a chain.
A row may continue a beginning that many contexts have in common (``beginnings.py``): it is not among the row's tokens,
and all of them attend to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from optuna_merge.evaluation.engines.beginnings import NO_BEGINNINGS, Beginnings

SHARED_ROW_TOKENS = 1024
PASS_TOKENS = 1 / 6
"""Fixed cost of a forward pass as a share of a batch: so much padding is worth saving a pass."""


@dataclass(frozen=True)
class Item:
    """Tokens whose log-probabilities are wanted.

    Attributes:
        context: The tokens before; not empty.
        continuation: The tokens that are scored; not empty. The last one is scored without being an input.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass
class Row:
    """One sequence to compute, and where the items are in it.

    Attributes:
        tokens: Inputs, in depth-first order.
        positions: Distance of each token from the start of its branch, beginning included.
        ends: For each token, the end (exclusive) of the tokens that attend to it.
        scored: For each item in this row, its index and the tokens whose outputs predict its continuation.
        beginning: Number of the beginning that the row continues; None if it starts from nothing.
        n_before: Tokens of that beginning.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    scored: list[tuple[int, list[int]]] = field(default_factory=list)
    beginning: int | None = None
    n_before: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of_prompt(cls, item: int, tokens: Sequence[int], beginning: int | None = None, n_before: int = 0) -> Row:
        """One sequence of which the last token is scored.

        Args:
            item: Index of the item that it stands for.
            tokens: All of them.
            beginning: Number of the beginning that it continues; None for none.
            n_before: Tokens of that beginning, fewer than ``tokens``.
        """
        n = len(tokens) - n_before
        positions = list(range(n_before, len(tokens)))
        return cls(list(tokens[n_before:]), positions, [n] * n, [(item, [n - 1])], beginning, n_before)

    @property
    def is_chain(self) -> bool:
        """Whether every token attends to all before it."""
        return all(end == len(self.tokens) for end in self.ends)

    @property
    def n_scored(self) -> int:
        """Number of different tokens whose outputs are wanted."""
        return len({node for _, nodes in self.scored for node in nodes})


def make_rows(
    items: Sequence[Item],
    *,
    share: bool,
    longest_shared: int | None = None,
    beginnings: Beginnings = NO_BEGINNINGS,
) -> list[Row]:
    """Lay out items so that each context is computed once.

    Args:
        items: In any order; equal ones are computed once.
        share: Whether different continuations may follow one context in a row. If not, continuations share a row only
            if they differ in nothing but the last token, or one is the beginning of the other.
        longest_shared: Tokens that a row of several branches or with a beginning may have at most, beginning included;
            longer ones are split.
        beginnings: What contexts may continue instead of being computed whole.

    Returns:
        Rows, longest first. Short ones that continue the same beginning are put end to end.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.context, []).append(index)
    rows: list[Row] = []
    for context, indices in groups.items():
        # in lexicographic order, branches with a common beginning are neighbours
        indices.sort(key=lambda index: items[index].continuation[:-1])
        branches = [(index, items[index].continuation[:-1]) for index in indices]
        n_more = max(len(branch) for _, branch in branches)
        beginning = beginnings.of(context, n_more, longest_shared)
        rows.extend(_rows_of(context, branches, share, longest_shared, beginning, beginnings.length(beginning)))
    return sorted(_join_short(rows, longest_shared) if share else rows, key=len, reverse=True)


def one_by_one(items: Sequence[Item]) -> list[list[Row]]:
    """A batch of its own for each item, for models whose tokens depend on what follows them."""
    batches = []
    for index, item in enumerate(items):
        row = Row.of_prompt(index, (*item.context, *item.continuation[:-1]))
        row.scored = [(index, list(range(len(item.context) - 1, len(row))))]
        batches.append([row])
    return batches


def make_batches(
    rows: Sequence[Row], *, batch_tokens: int, batch_scored: int, longest_shared: int | None = None
) -> list[list[Row]]:
    """Cut rows into batches by size, longest first; if a mask is needed anyway, short rows are put end to end.

    Args:
        rows: Longest first.
        batch_tokens: Approximate number of tokens in a batch, padding included: up to half more, so that no small
            batch is left over. A longer row is a batch of its own.
        batch_scored: Scored tokens that a batch may have at most; a row with more is a batch of its own.
        longest_shared: Longer rows, which are chains, are kept out of batches that need a mask.

    Returns:
        Batches.
    """
    apart = [row for row in rows if longest_shared is not None and row.n_before + len(row) > longest_shared]
    others = [row for row in rows if longest_shared is None or row.n_before + len(row) <= longest_shared]
    joins = any(not row.is_chain for row in others)
    batches = _cut(apart, False, batch_tokens, batch_scored) + _cut(others, joins, batch_tokens, batch_scored)
    return [batch.rows for batch in batches]


def _cut(rows: Sequence[Row], joins: bool, batch_tokens: int, batch_scored: int) -> list[_Batch]:
    n_tokens = sum(len(row) for row in rows)
    # a tenth for the padding
    limit = 1.1 * n_tokens / max(1, round(n_tokens / batch_tokens))
    batches: list[_Batch] = []
    for row in rows:
        if not batches or not batches[-1].add(row, limit, batch_scored):
            batches.append(_Batch(joins, row))
    for before, batch in zip(batches[-2::-1], batches[:0:-1], strict=True):
        together = _Batch(joins, *before.parts, *batch.parts)
        padding = together.n_tokens - before.n_tokens - batch.n_tokens
        fits = together.n_tokens <= 1.5 * batch_tokens and together.n_scored <= batch_scored
        if fits and padding <= PASS_TOKENS * batch_tokens:
            at = batches.index(before)
            batches[at : at + 2] = [together]
            break
    return batches


class _Batch:
    """A batch under construction."""

    def __init__(self, joins: bool, *parts: Row) -> None:
        self._joins = joins
        self.parts: list[Row] = []
        self.rows: list[Row] = []
        self.n_scored = 0
        for part in parts:
            self.add(part, float("inf"), float("inf"))

    @property
    def n_tokens(self) -> int:
        return len(self.rows) * self._length

    @property
    def _length(self) -> int:
        return max(map(len, self.rows), default=0)

    def add(self, part: Row, n_tokens: float, n_scored: float) -> bool:
        """Take a row in, unless the batch would then have more tokens, padding included, or more scored tokens."""
        scored = self.n_scored + part.n_scored
        if self.rows and scored > n_scored:
            return False
        into = self._with_room(part) if self._joins else None
        if into is not None:
            self.rows[into] = end_to_end(self.rows[into], part)
        elif self.rows and (len(self.rows) + 1) * max(self._length, len(part)) > n_tokens:
            return False
        else:
            self.rows.append(part)
        self.parts.append(part)
        self.n_scored = scored
        return True

    def _with_room(self, part: Row) -> int | None:
        room = self._length - len(part)
        return next(
            (i for i, row in enumerate(self.rows) if row.beginning == part.beginning and len(row) <= room), None
        )


def _join_short(rows: Sequence[Row], longest_shared: int | None) -> list[Row]:
    """Put short rows that continue a beginning end to end, so that it is not copied for each of them.

    The rows become about as long as the beginning, and about equally long, so that little is padded.
    """
    groups: dict[int | None, list[Row]] = {}
    for row in sorted(rows, key=len, reverse=True):
        groups.setdefault(row.beginning, []).append(row)
    joined = groups.pop(None, [])
    for group in groups.values():
        n_before, longest = group[0].n_before, len(group[0])
        most = min(SHARED_ROW_TOKENS, (longest_shared or SHARED_ROW_TOKENS + n_before) - n_before)
        n_rows = math.ceil(sum(map(len, group)) / max(longest, min(most, n_before)))
        into, others = group[:n_rows], group[n_rows:]
        for row in others:
            at = min(range(len(into)), key=lambda i: len(into[i]))
            if len(into[at]) + len(row) <= max(longest, most):
                into[at] = end_to_end(into[at], row)
            else:
                into.append(row)
        joined.extend(into)
    return joined


def end_to_end(row: Row, other: Row) -> Row:
    """Two rows as one; its second part does not attend to the first."""
    n = len(row)
    return Row(
        row.tokens + other.tokens,
        row.positions + other.positions,
        row.ends + [n + end for end in other.ends],
        row.scored + [(index, [n + node for node in nodes]) for index, nodes in other.scored],
        row.beginning,
        row.n_before,
    )


def _rows_of(
    context: tuple[int, ...],
    branches: list[tuple[int, tuple[int, ...]]],
    share: bool,
    longest_shared: int | None,
    beginning: int | None,
    n_before: int,
) -> list[Row]:
    rows: list[Row] = []
    limit = max(SHARED_ROW_TOKENS, 2 * (len(context) - n_before))
    if longest_shared is not None:
        limit = min(limit, longest_shared - n_before)
    tree = _Tree(context, beginning, n_before)
    for index, branch in branches:
        extends = tree.extends(branch)
        if not extends and (not share or len(tree.row) + tree.n_new(branch) > limit):
            rows.append(tree.close())
            tree = _Tree(context, beginning, n_before)
        tree.add(index, branch)
    rows.append(tree.close())
    return rows


class _Tree:
    """A row under construction: the context and the branch that is open at its end."""

    def __init__(self, context: tuple[int, ...], beginning: int | None, n_before: int) -> None:
        n = len(context) - n_before
        self.row = Row(
            list(context[n_before:]),
            list(range(n_before, len(context))),
            [0] * n,
            beginning=beginning,
            n_before=n_before,
        )
        self._n_context = n
        self._open: list[int] = []

    def extends(self, branch: tuple[int, ...]) -> bool:
        """Whether the branch begins with the whole open branch, so that adding it closes nothing."""
        return self._n_common(branch) == len(self._open)

    def n_new(self, branch: tuple[int, ...]) -> int:
        """Number of tokens that the branch would add."""
        return len(branch) - self._n_common(branch)

    def add(self, index: int, branch: tuple[int, ...]) -> None:
        n_common = self._n_common(branch)
        self._close_from(n_common)
        for depth, token in enumerate(branch[n_common:], n_common):
            self._open.append(len(self.row.tokens))
            self.row.tokens.append(token)
            self.row.positions.append(self.row.n_before + self._n_context + depth)
            self.row.ends.append(0)
        self.row.scored.append((index, [self._n_context - 1, *self._open]))

    def close(self) -> Row:
        self._close_from(0)
        for node in range(self._n_context):
            self.row.ends[node] = len(self.row.tokens)
        return self.row

    def _n_common(self, branch: tuple[int, ...]) -> int:
        n = 0
        for node, token in zip(self._open, branch, strict=False):
            if self.row.tokens[node] != token:
                break
            n += 1
        return n

    def _close_from(self, depth: int) -> None:
        for node in self._open[depth:]:
            self.row.ends[node] = len(self.row.tokens)
        del self._open[depth:]
