"""One vocabulary for models that have different ones: rows of embeddings and heads follow their tokens.

Knows tokens and rows; wraps checkpoints so that a merge sees them all in the shape of one. Knows nothing of merging.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optuna_merge.checkpoint import Checkpoint
from optuna_merge.errors import CheckpointError
from optuna_merge.layers import place_of


def align(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None) -> dict[str, Checkpoint]:
    """See every checkpoint in the vocabulary of one of them.

    A token that a model lacks gets the row of the first checkpoint if that has the token, else of the only model that
    has it, else the mean of those that have it. Rows without a token, which pad an embedding to a round size,
    are the source's own.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: ``base`` for the first, a key of ``checkpoints``, or None to change nothing.

    Returns:
        The same references; checkpoints that agree already are returned as they are.

    Raises:
        CheckpointError: If a checkpoint has no tokenizer, or the source is none of these.
    """
    if tokenizer_source is None:
        return dict(checkpoints)
    if tokenizer_source == "union":
        raise CheckpointError("tokenizer_source must be base or one of the models, got union: it is not built yet")
    source = next(iter(checkpoints)) if tokenizer_source == "base" else tokenizer_source
    if source not in checkpoints:
        raise CheckpointError(
            f"tokenizer_source must be base or one of {', '.join(checkpoints)}, got {tokenizer_source}"
        )
    rows = {reference: _rows_by_token(checkpoint) for reference, checkpoint in checkpoints.items()}
    n_rows = _n_rows(checkpoints[source])
    wanted = {token: row for token, row in rows[source].items() if row < n_rows}
    aligned: dict[str, Checkpoint] = {}
    for reference, checkpoint in checkpoints.items():
        same = _n_rows(checkpoint) == n_rows and all(rows[reference].get(token) == row for token, row in wanted.items())
        if same:
            aligned[reference] = checkpoint
        else:
            plan = _Plan(reference, source, checkpoints, rows, wanted, n_rows)
            aligned[reference] = AlignedCheckpoint(checkpoint, plan)
    return aligned


class AlignedCheckpoint(Checkpoint):
    """A checkpoint whose embedding and head have the rows of another vocabulary. These are kept in memory once read."""

    def __init__(self, checkpoint: Checkpoint, plan: _Plan) -> None:
        super().__init__(checkpoint.path, checkpoint.reference)
        self._plan = plan
        self._own_rows = _n_rows(checkpoint)
        self._made: dict[str, Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in the common vocabulary."""
        own = super().shape(name)
        return (self._plan.n_rows, *own[1:]) if self._follows_tokens(name) else own

    def get(self, name: str) -> Tensor:
        """A tensor, in the common vocabulary; never to be written to."""
        if not self._follows_tokens(name):
            return super().get(name)
        if name not in self._made:
            self._made[name] = self._plan.make(name)
        return self._made[name]

    def _follows_tokens(self, name: str) -> bool:
        shape = super().shape(name)
        return bool(shape) and shape[0] == self._own_rows and place_of(name, self.layer_stack).role != "layer"


class _Plan:
    """Where each row of one model's aligned tensors comes from."""

    def __init__(
        self,
        reference: str,
        source: str,
        checkpoints: Mapping[str, Checkpoint],
        rows: Mapping[str, Mapping[str, int]],
        wanted: Mapping[str, int],
        n_rows: int,
    ) -> None:
        self.n_rows = n_rows
        self._reference = reference
        self._source = source
        self._checkpoints = checkpoints
        first = next(iter(checkpoints))
        self._own: list[tuple[int, int]] = []  # (target row, the model's own row)
        self._lent: dict[str, list[tuple[int, int]]] = {}  # donor -> (target row, its row)
        self._means: list[tuple[int, list[tuple[str, int]]]] = []
        for token, row in wanted.items():
            if token in rows[reference]:
                self._own.append((row, rows[reference][token]))
                continue
            donors = [other for other in checkpoints if token in rows[other]]
            if first in donors or len(donors) == 1:
                donor = first if first in donors else donors[0]
                self._lent.setdefault(donor, []).append((row, rows[donor][token]))
            else:
                self._means.append((row, [(donor, rows[donor][token]) for donor in donors]))

    def make(self, name: str) -> Tensor:
        """The tensor ``name`` of the model, in the common vocabulary, in the model's dtype."""
        own = self._checkpoints[self._reference].get(name)
        result = torch.zeros((self.n_rows, *own.shape[1:]), dtype=own.dtype)
        pad = self._checkpoints[self._source].get(name)
        result[: min(len(pad), self.n_rows)] = pad[: self.n_rows].to(own.dtype)
        _put(result, self._own, own)
        for donor, pairs in self._lent.items():
            _put(result, pairs, self._checkpoints[donor].get(name))
        for row, donors in self._means:
            lent = [self._checkpoints[donor].get(name)[donor_row].float() for donor, donor_row in donors]
            result[row] = torch.stack(lent).mean(dim=0).to(own.dtype)
        return result


def _put(result: Tensor, pairs: list[tuple[int, int]], rows: Tensor) -> None:
    if pairs:
        to, taken = torch.tensor(pairs).unbind(1)
        result[to] = rows[taken].to(result.dtype)


def _rows_by_token(checkpoint: Checkpoint) -> dict[str, int]:
    vocabulary = checkpoint.vocabulary()
    if vocabulary is None:
        raise CheckpointError(f"{checkpoint.reference}: must have a tokenizer for tokenizer_source, found none; add it")
    n_rows = _n_rows(checkpoint)
    return {token: row for token, row in vocabulary.items() if row < n_rows}


def _n_rows(checkpoint: Checkpoint) -> int:
    if checkpoint.vocab_size is None:
        raise CheckpointError(
            f"{checkpoint.reference}: config.json must give vocab_size for tokenizer_source, got none; add it"
        )
    return checkpoint.vocab_size
