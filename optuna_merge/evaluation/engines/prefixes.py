"""Keys and values of the beginnings that many prompts share, computed once for each load of weights.

Knows which beginnings there are and the forward passes of a model; it does not know which prompts continue them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optuna_merge.evaluation.engines.batches import Row, make_batches
from optuna_merge.evaluation.engines.beginnings import NO_BEGINNINGS, Beginnings
from optuna_merge.evaluation.engines.forward import Before, Forward, attempt
from optuna_merge.evaluation.engines.key_values import KeysAndValues

_PROBED = 8
"""Tokens of a beginning, and as many after it, that are computed on trial."""


class Prefixes:
    """Beginnings that the model has computed with its present weights.

    Attributes:
        beginnings: What may be computed; whoever sets it calls :meth:`forget`.
    """

    def __init__(self, forward: Forward, device: torch.device) -> None:
        """Begin without any.

        Args:
            forward: The model's forward passes.
            device: Where the model is.
        """
        self._forward = forward
        self._device = device
        self.beginnings: Beginnings = NO_BEGINNINGS
        self._layers: dict[int, KeysAndValues] = {}

    def forget(self) -> None:
        """Free what was computed, because the weights have changed."""
        self._layers.clear()

    def before(self, numbers: Sequence[int | None], batch_tokens: int) -> Before | None:
        """What the rows of a forward pass continue; computes what is missing.

        Args:
            numbers: The beginning of each row; None for a row that starts from nothing.
            batch_tokens: Tokens that fill a pass.

        Returns:
            Keys and values, ``[len(numbers), n_heads, n_columns, head_dim]`` in each layer; None if no row continues
            anything.
        """
        wanted = {number for number in numbers if number is not None}
        if not wanted:
            return None
        self._compute(sorted(wanted - self._layers.keys()), batch_tokens)
        lengths = [self.beginnings.length(number) for number in numbers]
        return Before(self._side_by_side(numbers, max(lengths)), self._tensor(lengths))

    def is_right(self) -> bool | None:
        """Whether tokens after a beginning score as in one piece; None if this cannot be said.

        A configuration does not tell whether a model follows the mask, the positions and the cache that it is given.
        """
        found = attempt(self._try)
        return False if found is None else self._forward.agree(*found)

    def _try(self) -> tuple[Tensor, Tensor]:
        """Logits of a row that continues a beginning and of one that starts from nothing, and the same in one piece."""
        tokens = (self.beginnings.tokens[0] * 2)[: 2 * _PROBED]
        _, layers = self._forward.prefill([tokens[:_PROBED]])
        both = [(torch.cat([k, k.flip(-1)]), torch.cat([v, v.flip(-1)])) for k, v in layers]
        before = Before(both, self._tensor([_PROBED, 0]))
        ours, _ = self._forward.prefill([tokens[_PROBED:]] * 2, before)
        whole, _ = self._forward.prefill([tokens])
        apart, _ = self._forward.prefill([tokens[_PROBED:]])
        return ours, torch.cat([whole, apart])

    def _compute(self, numbers: Sequence[int], batch_tokens: int) -> None:
        rows = [Row.of_prompt(number, self.beginnings.tokens[number]) for number in numbers]
        rows.sort(key=len, reverse=True)
        for batch in make_batches(rows, batch_tokens=batch_tokens, batch_scored=len(rows)):
            _, layers = self._forward.prefill([row.tokens for row in batch])
            for index, row in enumerate(batch):
                [(number, _)] = row.scored
                own = slice(index, index + 1), slice(None), slice(len(row))
                self._layers[number] = [(keys[own].clone(), values[own].clone()) for keys, values in layers]

    def _side_by_side(self, numbers: Sequence[int | None], n_columns: int) -> KeysAndValues:
        if len(set(numbers)) == 1 and numbers[0] is not None:
            same = self._layers[numbers[0]]
            return [(k.expand(len(numbers), -1, -1, -1), v.expand(len(numbers), -1, -1, -1)) for k, v in same]
        example = next(iter(self._layers.values()))
        layers = []
        for layer, parts in enumerate(example):
            both = [part.new_zeros(len(numbers), part.shape[1], n_columns, part.shape[3]) for part in parts]
            for row, number in enumerate(numbers):
                if number is not None:
                    for to, source in zip(both, self._layers[number][layer], strict=True):
                        to[row, :, : source.shape[2]] = source[0]
            layers.append((both[0], both[1]))
        return layers

    def _tensor(self, values: object) -> Tensor:
        return torch.tensor(values, device=self._device)
