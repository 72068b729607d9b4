"""Rows that hold the beginnings that they continue.

Keys and values that are kept for scoring lead back to no weights, so a gradient needs each beginning in the pass that
differentiates. Still it is computed once for many prompts: they are branches behind it.

    beginning a b c, rows d e and f g      row     a b c d e f g
                                           parent  - a b c d c f
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna_merge.evaluation.engines.batches import SHARED_ROW_TOKENS, Row, end_to_end
from optuna_merge.evaluation.engines.beginnings import Beginnings


def make_whole(
    rows: Sequence[Row], beginnings: Beginnings, *, batch_tokens: int, longest_shared: int | None = None
) -> list[Row]:
    """Put rows behind the beginnings that they continue.

    Args:
        rows: What ``make_rows`` made, longest first.
        beginnings: What they continue.
        batch_tokens: Tokens that fill a pass.
        longest_shared: Tokens that a row of several branches may have at most; None: any number.

    Returns:
        Rows that continue nothing, longest first.
    """
    whole: list[Row] = []
    behind: dict[int, list[Row]] = {}
    for row in rows:
        if row.beginning is None:
            whole.append(row)
            continue
        # attention computes a row's tokens for each other, also where they do not see each other
        most = row.n_before + max(min(batch_tokens, SHARED_ROW_TOKENS), 2 * row.n_before)
        most = most if longest_shared is None else min(most, longest_shared)
        parts = behind.setdefault(row.beginning, [])
        if parts and row.n_before + len(parts[-1]) + len(row) <= most:
            parts[-1] = end_to_end(parts[-1], row)
        else:
            parts.append(row)
    for number, parts in behind.items():
        whole.extend(_behind(beginnings.tokens[number], row) for row in parts)
    return sorted(whole, key=len, reverse=True)


def _behind(beginning: Sequence[int], row: Row) -> Row:
    n = len(beginning)
    return Row(
        [*beginning, *row.tokens],
        [*range(n), *row.positions],
        [n + len(row)] * n + [n + end for end in row.ends],
        [(index, [n + node for node in nodes]) for index, nodes in row.scored],
    )
