"""Keys and values of rows that enter and leave a batch while it is decoded.

    columns   0 1 2 3 4 5 6 | 7         a row's tokens end at the common last column, so that a step writes one column;
    row 0     a b c d e f g | x         what lies before a row's start is hidden from it. The place of a row that has
    row 1     . . . h i j k | y         left is taken by the last one.

Knows tensors; it does not know what the rows are.
"""

# mypy: untyped-calls-exclude=transformers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from optuna_merge.evaluation.engines.key_values import KeysAndValues

GROWTH = 32
"""Columns that are added when there is no room for the next one."""


@dataclass
class CachedRow:
    """A row.

    Attributes:
        number: The caller's name for it.
        start: Column of its first token.
        limit: End (exclusive) of the columns that it may come to need.
    """

    number: int
    start: int
    limit: int


class RowCache:
    """The rows of a batch, and a cache for transformers that holds their keys and values.

    Attributes:
        rows: In the order of the batch.
        cache: Pass it to the model with one token for each row; it then has one column more, see :meth:`inputs`.
    """

    def __init__(self, *, n_most_rows: int, n_most_cached: int, device: torch.device) -> None:
        """Begin without rows.

        Args:
            n_most_rows: Rows at once, at most.
            n_most_cached: Tokens in all rows, padding included, unless a single piece needs more.
            device: Where the model is.
        """
        self._n_most_rows = n_most_rows
        self._n_most_cached = n_most_cached
        self._device = device
        self.rows: list[CachedRow] = []
        self._layers: list[_Layer] = []
        self.cache = Cache(layers=cast(Any, self._layers))
        self._end = 0
        self._n_places = 0
        self._n_columns = 0

    def has_room(self, n_rows: int, length: int, n_more: int) -> bool:
        """Whether more rows may enter.

        Args:
            n_rows: How many.
            length: Tokens in the longest of them; at most those of the longest row that has entered before.
            n_more: Most tokens that any of them may come to have in addition.
        """
        if not self.rows:
            return True
        n = len(self.rows) + n_rows
        span = max(length, self._end - min(row.start for row in self.rows))
        n_columns = span + max(n_more, *(row.limit - self._end for row in self.rows))
        return n <= self._n_most_rows and n * n_columns <= self._n_most_cached

    def enter(
        self,
        rows: Sequence[tuple[int, int, int]],
        layers: KeysAndValues,
        n_waiting: int,
        before: tuple[int, Tensor] | None = None,
    ) -> None:
        """Add rows behind the others.

        Args:
            rows: Number, tokens, and most tokens in addition, for each.
            layers: Their keys and values, padded at the end; ``[len(rows), ...]``.
            n_waiting: Rows that will come later: there is room for them if memory allows.
            before: If each row's tokens are in two parts, both padded at the end: the columns of the first part, and
                how many are each row's own; ``[len(rows)]``.
        """
        lengths = [length for _, length, _ in rows]
        if not self.rows:
            self._end = max(lengths)
        n = len(self.rows)
        self.rows += [CachedRow(number, self._end - length, self._end + n_more) for number, length, n_more in rows]
        if not self._layers:
            self._layers += [_Layer(keys, values) for keys, values in layers]
        if n + len(rows) > self._n_places or self._end >= self._n_columns:
            self._lay_out(n, n_waiting)
        # what a column of padding holds does not matter, but it must be finite
        starts = torch.tensor([row.start for row in self.rows[n:]], device=self._device)
        sources = (torch.arange(self._end, device=self._device) - starts[:, None]).clamp_(min=0)  # [len(rows), end]
        if before is not None:
            n_columns, own = before
            sources = torch.where(sources < own[:, None], sources, sources + n_columns - own[:, None])
        for layer, states in zip(self._layers, layers, strict=True):
            layer.enter(n, states, sources)

    def leave(self, has_left: Sequence[bool]) -> None:
        """Remove rows; the last ones move into their places.

        Args:
            has_left: For each row whether it leaves.
        """
        n = len(self.rows) - sum(has_left)
        if n == len(self.rows):
            return
        places = [index for index in range(n) if has_left[index]]
        moved = [index for index in range(n, len(self.rows)) if not has_left[index]]
        for place, index in zip(places, moved, strict=True):
            self.rows[place] = self.rows[index]
        del self.rows[n:]
        to, source = (torch.tensor(indices, dtype=torch.long, device=self._device) for indices in (places, moved))
        for layer in self._layers:
            layer.leave(n, to, source)

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """Positions ``[n, 1]`` of the next tokens and mask ``[n, n_columns]``, or None where all rows see everything.

        The model must be run on them next.
        """
        if self._end == self._n_columns:
            self._lay_out(len(self.rows), 0)
        starts = torch.tensor([[row.start] for row in self.rows], device=self._device)
        positions = self._end - starts
        self._end += 1
        if all(row.start == 0 for row in self.rows):
            return positions, None
        return positions, (torch.arange(self._end, device=self._device) >= starts).long()

    def _lay_out(self, n_kept: int, n_waiting: int) -> None:
        """Make room for the next columns and for the rows that wait, and drop columns that no row needs.

        Args:
            n_kept: Rows that are in the cache already; the last ones may not be.
            n_waiting: See :meth:`enter`.
        """
        first = min(row.start for row in self.rows)
        for row in self.rows:
            row.start -= first
            row.limit -= first
        self._end -= first
        self._n_columns = self._end + max(1, min(GROWTH, max(row.limit for row in self.rows) - self._end))
        n = len(self.rows)
        self._n_places = max(n, min(self._n_most_rows, n + n_waiting, self._n_most_cached // self._n_columns))
        for layer in self._layers:
            layer.lay_out(n_kept, self._n_places, self._n_columns, first)


class _Layer(DynamicLayer):
    """Keys and values of one layer in tensors with room, so that a step copies nothing but its own column."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        cast(Any, super()).__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._rooms = [states.new_empty(0, states.shape[1], 0, states.shape[3]) for states in (keys, values)]
        self._show(0, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next columns of all rows; what transformers calls."""
        n, end = self.keys.shape[0], self.keys.shape[2]
        self._show(n, end + key_states.shape[2])
        self.keys[:, :, end:] = key_states
        self.values[:, :, end:] = value_states
        return self.keys, self.values

    def enter(self, n: int, layer: tuple[Tensor, Tensor], sources: Tensor) -> None:
        """Write rows behind the first ``n``; ``sources``: for each row and column the column to take it from."""
        for room, states in zip(self._rooms, layer, strict=True):
            index = sources[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            room[n : n + len(sources), :, : sources.shape[1]] = states.gather(2, index)
        self._show(n + len(sources), sources.shape[1])

    def leave(self, n: int, to: Tensor, source: Tensor) -> None:
        """Keep ``n`` rows, after some have been moved."""
        end = self.keys.shape[2]
        for states in (self.keys, self.values):
            states[to] = states[source]
        self._show(n, end)

    def lay_out(self, n: int, n_places: int, n_columns: int, first: int) -> None:
        """Move ``n`` rows, without their columns before ``first``, into new tensors."""
        end = self.keys.shape[2]
        for number, states in enumerate((self.keys, self.values)):
            room = states.new_empty(n_places, states.shape[1], n_columns, states.shape[3])
            if n:
                room[:n, :, : end - first] = states[:n, :, first:]
            self._rooms[number] = room
        self._show(n, end - first if n else 0)

    def _show(self, n: int, end: int) -> None:
        self.keys, self.values = (room[:n, :, :end] for room in self._rooms)
