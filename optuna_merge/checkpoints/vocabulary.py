"""Models that differ at their ends, seen as if they did not: in one vocabulary, and all with a head of their own.

Knows tokens, rows and ties; wraps checkpoints so that a merge sees them all in one shape. Knows nothing of merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint, CheckpointView
from optuna_merge.checkpoints.compare import check_compatible
from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.errors import CheckpointError

UNION = "union"


def unify(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None) -> dict[str, Checkpoint]:
    """Checkpoints that can be merged tensor by tensor.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: See :func:`align`.

    Returns:
        The same references; a checkpoint that need not change is returned as it is.

    Raises:
        CheckpointError: If they differ in more than vocabularies and ties.
    """
    untied = untie(checkpoints)
    check_compatible(list(untied.values()), tokenizer_source)
    return align(untied, tokenizer_source)


def untie(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Give every checkpoint an output head if one of them stores one: where it is tied, its embedding.

    Returns:
        The same references. Where there is a head, no configuration says that it is tied.
    """
    heads = {name: None for checkpoint in checkpoints.values() for name in _heads(checkpoint)}
    if not heads:
        return dict(checkpoints)
    untied: dict[str, Checkpoint] = {}
    for reference, checkpoint in checkpoints.items():
        missing = [name for name in heads if name not in checkpoint]
        embedding = _embedding(checkpoint)
        if missing and embedding is not None and checkpoint.is_tied is not False:
            untied[reference] = _Untied(checkpoint, dict.fromkeys(missing, embedding))
        else:
            untied[reference] = (
                CheckpointView(checkpoint, tie_word_embeddings=False) if checkpoint.is_tied else checkpoint
            )
    return untied


def align(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None) -> dict[str, Checkpoint]:
    """See every checkpoint in one vocabulary.

    A token that a model lacks gets the row of the first checkpoint if that has the token, else of the only model that
    has it, else the mean of those that have it. Rows without a token, which pad an embedding to a round size,
    are the source's own.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: Whose vocabulary: ``base`` for the first, a key of ``checkpoints``, ``union`` for the first's
            with the tokens that only others have after it, or None to change nothing.

    Returns:
        The same references; checkpoints that agree already are returned as they are.

    Raises:
        CheckpointError: If a checkpoint has no tokenizer, or the source is none of these.
    """
    if tokenizer_source is None:
        return dict(checkpoints)
    first = next(iter(checkpoints))
    source = first if tokenizer_source in ("base", UNION) else tokenizer_source
    if source not in checkpoints:
        raise CheckpointError(
            f"tokenizer_source must be base, union or one of {', '.join(checkpoints)}, got {tokenizer_source}"
        )
    rows = {reference: _rows_by_token(checkpoint) for reference, checkpoint in checkpoints.items()}
    target = _Target(checkpoints[source], source, rows[source])
    if tokenizer_source == UNION:
        target.extend(checkpoints, rows)
    aligned: dict[str, Checkpoint] = {}
    for reference, checkpoint in checkpoints.items():
        same = all(rows[reference].get(token) == row for token, row in target.rows.items())
        if same and _n_rows(checkpoint) == target.n_rows:
            aligned[reference] = checkpoint
        else:
            aligned[reference] = AlignedCheckpoint(checkpoint, target, _Plan(reference, target, checkpoints, rows))
    return aligned


class AlignedCheckpoint(CheckpointView):
    """A checkpoint whose embedding and head have the rows of another vocabulary. These are kept in memory once read."""

    def __init__(self, checkpoint: Checkpoint, target: _Target, plan: _Plan) -> None:
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
        """A tensor, in the common vocabulary; never to be written to."""
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
        """Never: the vocabulary is another one."""
        return False

    def _follows_tokens(self, name: str) -> bool:
        shape = self._inner.shape(name)
        return bool(shape) and shape[0] == self._own_rows and place_of(name, self.layer_stack).role != "layer"


class _Untied(CheckpointView):
    """A checkpoint whose head is its embedding, with both of them."""

    def __init__(self, checkpoint: Checkpoint, heads: Mapping[str, str]) -> None:
        super().__init__(checkpoint, tie_word_embeddings=False)
        self.names = (*checkpoint.names, *heads)
        self._heads = heads

    def __contains__(self, name: str) -> bool:
        return name in self._heads or name in self._inner

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._heads.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(self._heads.get(name, name))

    def get(self, name: str) -> Tensor:
        return self._inner.get(self._heads.get(name, name))


class _Target:
    """The vocabulary of the merged model.

    Attributes:
        source: Reference of the model whose rows pad the embedding.
        vocabulary: Token to id, as the tokenizer has it.
        rows: Token to row, of the tokens that have a row in some model.
        n_rows: Rows of the embedding.
    """

    def __init__(self, checkpoint: Checkpoint, source: str, rows: Mapping[str, int]) -> None:
        self.source = source
        self.vocabulary = checkpoint.vocabulary() or {}
        self.rows = dict(rows)
        self.n_rows = _n_rows(checkpoint)
        self._checkpoint = checkpoint
        self._tokenizer: Any = None

    def extend(self, checkpoints: Mapping[str, Checkpoint], rows: Mapping[str, Mapping[str, int]]) -> None:
        """Add the tokens of the other checkpoints: first what is in their models, then what was added to them."""
        known = set(self.rows)
        missing: dict[str, Any] = {}
        added: dict[str, Any] = {}
        for reference, checkpoint in checkpoints.items():
            if rows[reference].keys() <= known:
                continue
            settings = {token.content: token for token in _load_tokenizer(checkpoint).added_tokens_decoder.values()}
            for token in sorted(rows[reference].keys() - known, key=rows[reference].__getitem__):
                (added if token in settings else missing)[token] = settings.get(token, token)
            known |= rows[reference].keys()
        if known == set(self.rows):
            return
        self._tokenizer = _load_tokenizer(self._checkpoint)
        self._tokenizer.add_tokens([*missing.values(), *added.values()])
        self.vocabulary = self._tokenizer.get_vocab()
        self.rows = {token: row for token, row in self.vocabulary.items() if token in known}
        self.n_rows = max(self.n_rows, max(self.rows.values()) + 1)

    def write_tokenizer(self, folder: Path) -> None:
        if self._tokenizer is None:
            self._checkpoint.write_tokenizer(folder)
        else:
            self._tokenizer.save_pretrained(folder)


class _Plan:
    """Where each row of one model's aligned tensors comes from."""

    def __init__(
        self,
        reference: str,
        target: _Target,
        checkpoints: Mapping[str, Checkpoint],
        rows: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._reference = reference
        self._target = target
        self._checkpoints = checkpoints
        first = next(iter(checkpoints))
        self._own: list[tuple[int, int]] = []  # (target row, the model's own row)
        self._lent: dict[str, list[tuple[int, int]]] = {}  # donor -> (target row, its row)
        self._means: list[tuple[int, list[tuple[str, int]]]] = []
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
        """The tensor ``name`` of the model, in the common vocabulary, in the model's dtype."""
        own = self._checkpoints[self._reference].get(name)
        result = torch.zeros((self._target.n_rows, *own.shape[1:]), dtype=own.dtype)
        pad = self._checkpoints[self._target.source].get(name)
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


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.tokenizer_path)
    except (OSError, ValueError, ImportError) as exc:
        raise CheckpointError(f"{checkpoint.reference}: tokenizer must be loadable, got: {exc}") from exc


def _embedding(checkpoint: Checkpoint) -> str | None:
    """The name of the tensor with a row for each token, if there is exactly one among the embeddings."""
    found = [
        name
        for name in checkpoint.names
        if place_of(name, checkpoint.layer_stack).role == "embedding"
        and len(shape := checkpoint.shape(name)) == 2
        and shape[0] == checkpoint.vocab_size
    ]
    return found[0] if len(found) == 1 else None


def _heads(checkpoint: Checkpoint) -> list[str]:
    """The names of tensors that a tie to the embedding would leave out."""
    embedding = _embedding(checkpoint)
    if embedding is None:
        return []
    return [
        name
        for name in checkpoint.names
        if checkpoint.shape(name) == checkpoint.shape(embedding)
        and place_of(name, checkpoint.layer_stack).role == "head"
    ]
