"""Models with different vocabularies, seen in one: each row of an embedding or head moves with its token.

Knows tokens and rows; wraps checkpoints so that a merge sees the same rows in all of them. Knows nothing of merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.checkpoints.tokenizer import load_tokenizer
from optuna_merge.checkpoints.view import CheckpointView
from optuna_merge.errors import CheckpointError

UNION = "union"


def align(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None) -> dict[str, Checkpoint]:
    """View every checkpoint in one vocabulary.

    If a model lacks a token, its row is that of the first checkpoint if that has the token, else that of the only
    model that has it, else the mean over the models that have it. Rows without a token, which pad an embedding to a
    round size, come from the model whose vocabulary it is.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: The vocabulary: ``base`` for that of the first, a key of ``checkpoints``, ``union`` for that
            of the first followed by the tokens that only others have, or None to change nothing.

    Returns:
        The same references; checkpoints that already agree are returned as they are.

    Raises:
        CheckpointError: If a checkpoint has no tokenizer, or ``tokenizer_source`` is none of these.
    """
    if tokenizer_source is None:
        return dict(checkpoints)
    first = next(iter(checkpoints))
    owner = first if tokenizer_source in ("base", UNION) else tokenizer_source
    if owner not in checkpoints:
        raise CheckpointError(
            f"tokenizer_source must be base, union or one of {', '.join(checkpoints)}, got {tokenizer_source}"
        )
    rows = {reference: _rows_by_token(checkpoint) for reference, checkpoint in checkpoints.items()}
    target = _TargetVocabulary(checkpoints[owner], owner, rows[owner])
    if tokenizer_source == UNION:
        target.extend(checkpoints, rows)
    aligned: dict[str, Checkpoint] = {}
    for reference, checkpoint in checkpoints.items():
        same = all(rows[reference].get(token) == row for token, row in target.rows.items())
        if same and _n_rows(checkpoint) == target.n_rows:
            aligned[reference] = checkpoint
        else:
            aligned[reference] = AlignedCheckpoint(checkpoint, target, _RowPlan(reference, target, checkpoints, rows))
    return aligned


class AlignedCheckpoint(CheckpointView):
    """A checkpoint whose embedding and head have the rows of another vocabulary; both stay in memory once read."""

    def __init__(self, checkpoint: Checkpoint, target: _TargetVocabulary, plan: _RowPlan) -> None:
        super().__init__(checkpoint, vocab_size=target.n_rows)
        self._target = target
        self._plan = plan
        self._own_rows = _n_rows(checkpoint)
        self._made: dict[str, Tensor] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, in the common vocabulary."""
        own = self._inner.shape(name)
        return (self._target.n_rows, *own[1:]) if self._follows_tokens(name) else own

    def get(self, name: str) -> Tensor:
        """A tensor in the common vocabulary, which must never be written to."""
        if not self._follows_tokens(name):
            return self._inner.get(name)
        if name not in self._made:
            self._made[name] = self._plan.make(name)
        return self._made[name]

    def vocabulary(self) -> dict[str, int]:
        """Token to id, of the common vocabulary."""
        return dict(self._target.vocabulary)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the common tokenizer into an existing folder."""
        self._target.write_tokenizer(folder)

    @property
    def is_as_stored(self) -> bool:
        """Always False: the vocabulary is another one."""
        return False

    def _follows_tokens(self, name: str) -> bool:
        shape = self._inner.shape(name)
        return bool(shape) and shape[0] == self._own_rows and place_of(name, self.layer_stack).role != "layer"


class _TargetVocabulary:
    """The vocabulary of the merged model.

    Attributes:
        owner: Reference of the model whose rows pad the embedding.
        vocabulary: Token to id, as in the tokenizer.
        rows: Token to row, for the tokens that have a row in some model.
        n_rows: Rows of the embedding.
    """

    def __init__(self, checkpoint: Checkpoint, owner: str, rows: Mapping[str, int]) -> None:
        self.owner = owner
        self.vocabulary = checkpoint.vocabulary() or {}
        self.rows = dict(rows)
        self.n_rows = _n_rows(checkpoint)
        self._checkpoint = checkpoint
        self._tokenizer: Any = None

    def extend(self, checkpoints: Mapping[str, Checkpoint], rows: Mapping[str, Mapping[str, int]]) -> None:
        """Add the tokens of other checkpoints: first those in their models, then those added to their tokenizers."""
        known = set(self.rows)
        missing: dict[str, Any] = {}
        added: dict[str, Any] = {}
        for reference, checkpoint in checkpoints.items():
            if rows[reference].keys() <= known:
                continue
            tokenizer = load_tokenizer(checkpoint.tokenizer_path, checkpoint.reference)
            settings = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
            for token in sorted(rows[reference].keys() - known, key=rows[reference].__getitem__):
                (added if token in settings else missing)[token] = settings.get(token, token)
            known |= rows[reference].keys()
        if known == set(self.rows):
            return
        self._tokenizer = load_tokenizer(self._checkpoint.tokenizer_path, self._checkpoint.reference)
        self._tokenizer.add_tokens([*missing.values(), *added.values()])
        self.vocabulary = self._tokenizer.get_vocab()
        self.rows = {token: row for token, row in self.vocabulary.items() if token in known}
        self.n_rows = max(self.n_rows, max(self.rows.values()) + 1)

    def write_tokenizer(self, folder: Path) -> None:
        if self._tokenizer is None:
            self._checkpoint.write_tokenizer(folder)
        else:
            self._tokenizer.save_pretrained(folder)


class _RowPlan:
    """Where each row of one model's aligned tensors comes from."""

    def __init__(
        self,
        reference: str,
        target: _TargetVocabulary,
        checkpoints: Mapping[str, Checkpoint],
        rows: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._reference = reference
        self._target = target
        self._checkpoints = checkpoints
        first = next(iter(checkpoints))
        self._own: list[tuple[int, int]] = []  # (target row, the model's own row)
        self._lent: dict[str, list[tuple[int, int]]] = {}  # donor -> (target row, its row)
        self._means: list[tuple[int, list[tuple[str, int]]]] = []  # (target row, (donor, its row) ...)
        for token, row in target.rows.items():
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
        """The tensor ``name`` of the model, in the common vocabulary and in the model's dtype."""
        own = self._checkpoints[self._reference].get(name)
        result = torch.zeros((self._target.n_rows, *own.shape[1:]), dtype=own.dtype)
        pad = self._checkpoints[self._target.owner].get(name)
        result[: len(pad)] = pad.to(own.dtype)
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
