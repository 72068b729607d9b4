"""How generated answers came about: their lengths, and how many were cut, empty or unreadable.

Knows columns of document values. It does not know how a text is generated (``engines/``) nor what it scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from optuna_merge.evaluation.engine import Response, Text
from optuna_merge.evaluation.results import Answers

N_TOKENS = ("n_tokens", "none")
"""Metric and filter of every task that generates: the mean number of tokens of its answers."""

_MEASURES: Mapping[str, Callable[[Text], float]] = {
    "n_tokens": lambda text: text.n_tokens,
    "cut": lambda text: text.is_cut,
    "empty": lambda text: not text.strip(),
}


def measured(responses: Sequence[Sequence[Response]]) -> dict[str, list[float | None]]:
    """Columns that say how the answers to some documents came about.

    Args:
        responses: The responses to each document's requests.

    Returns:
        ``n_tokens``, ``cut`` and ``empty``: for each document the mean over its texts; None if the engine does not say.
        Empty if none of the documents has such a text.
    """
    found = [[response for response in own if isinstance(response, Text)] for own in responses]
    if not any(found):
        return {}
    return {
        name: [fmean(map(measure, texts)) if texts else None for texts in found] for name, measure in _MEASURES.items()
    }


def unread(filtered: Sequence[Sequence[Any]], fallbacks: Sequence[Any]) -> list[float]:
    """For each document the share of its answers in which a filter found nothing.

    Args:
        filtered: What the filter gave for each document's requests; for a filter that keeps several texts, a list.
        fallbacks: What it gives where it finds nothing.
    """
    return [fmean(_is_unread(found, fallbacks) for found in own) for own in filtered]


def unread_column(filter_name: str) -> str:
    """Name of the column that :func:`unread` fills; no metric has a name with a space before the filter's."""
    return f"unread {filter_name}"


def summarize(columns: Sequence[Mapping[str, Sequence[Any]]], filter_name: str) -> Answers | None:
    """What the columns of all leaves of a term say together; None if they say nothing of answers.

    Args:
        columns: The columns of each leaf.
        filter_name: The filter whose unread answers are counted.
    """

    def mean_of(name: str) -> float | None:
        values = [value for own in columns for value in own.get(name, ()) if value is not None]
        return fmean(values) if values else None

    n_tokens, cut, empty = (mean_of(name) for name in _MEASURES)
    if n_tokens is None or cut is None or empty is None:
        return None
    n = sum(value is not None for own in columns for value in own.get("n_tokens", ()))
    return Answers(n, n_tokens, cut, empty, mean_of(unread_column(filter_name)))


def _is_unread(found: Any, fallbacks: Sequence[Any]) -> bool:
    parts = found if isinstance(found, list | tuple) else [found]
    return bool(parts) and all(part in fallbacks for part in parts)
