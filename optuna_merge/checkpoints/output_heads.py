"""Output heads that some models store and others tie to their embedding.

If one model stores a head, the others need one too. A model with a tied head gets a copy of its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.checkpoints.view import CheckpointView


def untie(checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """If one checkpoint stores an output head, give one to each: the embedding where the head is tied to it.

    Returns:
        The same references. If any has a head, no configuration says that heads are tied.
    """
    heads = {name: None for checkpoint in checkpoints.values() for name in _heads(checkpoint)}
    if not heads:
        return dict(checkpoints)
    untied: dict[str, Checkpoint] = {}
    for reference, checkpoint in checkpoints.items():
        missing = [name for name in heads if name not in checkpoint]
        embedding = _embedding(checkpoint)
        if missing and embedding is not None and checkpoint.is_tied is not False:
            untied[reference] = _UntiedCheckpoint(checkpoint, dict.fromkeys(missing, embedding))
        elif checkpoint.is_tied:
            untied[reference] = CheckpointView(checkpoint, tie_word_embeddings=False)
        else:
            untied[reference] = checkpoint
    return untied


class _UntiedCheckpoint(CheckpointView):
    """A checkpoint whose output heads are its embedding, under names of their own."""

    def __init__(self, checkpoint: Checkpoint, heads: Mapping[str, str]) -> None:
        super().__init__(checkpoint, tie_word_embeddings=False)
        self.names = (*checkpoint.names, *heads)
        self._heads = heads  # name of the head -> name of the embedding

    def __contains__(self, name: str) -> bool:
        return name in self._heads or name in self._inner

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(self._heads.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._inner.dtype(self._heads.get(name, name))

    def get(self, name: str) -> Tensor:
        return self._inner.get(self._heads.get(name, name))


def _heads(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that the checkpoint would not store if its head were tied to the embedding."""
    embedding = _embedding(checkpoint)
    if embedding is None:
        return []
    return [
        name
        for name in checkpoint.names
        if checkpoint.shape(name) == checkpoint.shape(embedding)
        and place_of(name, checkpoint.layer_stack).role == "head"
    ]


def _embedding(checkpoint: Checkpoint) -> str | None:
    """Name of the tensor with a row for each token; None unless exactly one embedding has that shape."""
    found = [
        name
        for name in checkpoint.names
        if place_of(name, checkpoint.layer_stack).role == "embedding"
        and len(shape := checkpoint.shape(name)) == 2
        and shape[0] == checkpoint.vocab_size
    ]
    return found[0] if len(found) == 1 else None
