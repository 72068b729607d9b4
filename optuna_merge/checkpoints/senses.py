"""Language models merged into the language part of one that also sees or hears.

That model is the *whole* one. The others are shown with its tensor names, its configuration and its other tensors, such
as a vision tower, which a merge copies. Knows names and configurations, no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.model_config import restated
from optuna_merge.checkpoints.tensor_names import place_of
from optuna_merge.checkpoints.view import CheckpointView
from optuna_merge.errors import CheckpointError

_SENSE = re.compile("vision|visual|image|audio|speech|text_config")


def complete(checkpoints: Mapping[str, Checkpoint], tokenizer_source: str | None = None) -> dict[str, Checkpoint]:
    """If language models are to be merged with one model that also sees or hears, view them as such models.

    The language part of the whole model is everything under the prefix of its decoder, and its output head. A language
    model has the same tensors under other prefixes: ``model.layers.0.mlp.up_proj.weight`` is
    ``model.language_model.layers.0.mlp.up_proj.weight``. All other tensors of the whole model are copied; see
    :attr:`.checkpoint.Checkpoint.copied`. Whether each tensor of the language part has a counterpart in every model is
    for :func:`.compare.check_compatible` to say.

    Args:
        checkpoints: Reference to checkpoint; the first is the base, if there is one.
        tokenizer_source: See :func:`.vocabulary.align`; it must keep the whole model's token ids.

    Returns:
        The same references. If all or none of the checkpoints see or hear, they are returned as they are.

    Raises:
        CheckpointError: If several models see or hear, if a language model is of another family or depth, or if the
            merged model would have another's vocabulary.
    """
    wholes = [reference for reference, checkpoint in checkpoints.items() if _has_senses(checkpoint.config)]
    if not wholes or len(wholes) == len(checkpoints):
        return dict(checkpoints)
    plain = {reference: checkpoint for reference, checkpoint in checkpoints.items() if reference not in wholes}
    if len(wholes) > 1:
        names = " and ".join(checkpoints[reference].reference for reference in wholes)
        other = next(iter(plain.values())).reference
        raise CheckpointError(
            f"only one model may see or hear if others, such as {other}, know language alone, got {names}; merge those"
            " first, or leave one out"
        )
    [reference], first = wholes, next(iter(checkpoints))
    whole = checkpoints[reference]
    if tokenizer_source not in (None, reference, *(("base", "union") if reference == first else ())):
        raise CheckpointError(
            f"tokenizer_source must be {whole.reference}, whose configuration names tokens of images or sound by id,"
            f" got {tokenizer_source}; correct it"
        )
    for checkpoint in plain.values():
        _check_family(checkpoint, whole)
    prefix = _decoder_prefix(whole)
    own = {other: _names_in_whole(checkpoint, prefix) for other, checkpoint in plain.items()}
    language = {name for names in own.values() for name in names} | set(_stored_heads(whole, prefix))
    copied = frozenset(name for name in whole.names if not name.startswith(prefix) and name not in language)
    return {
        other: _Whole(checkpoint, reference, copied)
        if other == reference
        else _Completed(checkpoint, own[other], lender=whole, reference=reference, copied=copied)
        for other, checkpoint in checkpoints.items()
    }


class _Whole(CheckpointView):
    """The model whose other tensors are copied."""

    def __init__(self, checkpoint: Checkpoint, reference: str, copied: frozenset[str]) -> None:
        stated = {} if checkpoint.vocab_size is not None else {"vocab_size": _n_embedded(checkpoint)}
        super().__init__(checkpoint, **{key: value for key, value in stated.items() if value is not None})
        self.whole = reference
        self.copied = copied


class _Completed(CheckpointView):
    """A language model in the place of a whole model's language part."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        own: Mapping[str, str],
        *,
        lender: Checkpoint,
        reference: str,
        copied: frozenset[str],
    ) -> None:
        """Wrap a language model.

        Args:
            checkpoint: The language model.
            own: Name in the whole model to the language model's own.
            lender: The whole model.
            reference: Its reference.
            copied: Names of the tensors that it lends.
        """
        super().__init__(checkpoint)
        stated = {"vocab_size": checkpoint.vocab_size, "tie_word_embeddings": checkpoint.is_tied}
        self.config = restated(lender.config, **{key: value for key, value in stated.items() if value is not None})
        self.whole = reference
        self.copied = copied
        self._lender = lender
        self._own = own
        known = [name for name in lender.names if name in self]
        self.names = (*known, *(name for name in own if name not in lender))

    def __contains__(self, name: str) -> bool:
        return name in self._own or name in self.copied

    def shape(self, name: str) -> tuple[int, ...]:
        return self._lender.shape(name) if name in self.copied else self._inner.shape(self._name(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._lender.dtype(name) if name in self.copied else self._inner.dtype(self._name(name))

    def get(self, name: str) -> Tensor:
        return self._lender.get(name) if name in self.copied else self._inner.get(self._name(name))

    def prefetch(self, name: str) -> None:
        if name in self._own:
            self._inner.prefetch(self._own[name])

    def refuse_overwritten(self) -> None:
        self._inner.refuse_overwritten()
        self._lender.refuse_overwritten()

    @property
    def is_as_stored(self) -> bool:
        return False

    def _name(self, name: str) -> str:
        return self._own.get(name, name)


def _has_senses(config: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) and _SENSE.search(key) for key, value in config.items())


def _decoder_prefix(checkpoint: Checkpoint) -> str:
    """What the names of a decoder's tensors begin with: ``model.`` if its layers are ``model.layers.``."""
    return checkpoint.layer_stack.rstrip(".").rpartition(".")[0] + "."


def _names_in_whole(checkpoint: Checkpoint, prefix: str) -> dict[str, str]:
    """The tensors of a language model: the name in a whole model whose decoder has that prefix, to its own name."""
    own = _decoder_prefix(checkpoint)
    theirs, ours = prefix.split("."), own.split(".")
    n_outer = len(theirs) - len(ours)
    outer = "".join(f"{part}." for part in theirs[:n_outer]) if n_outer > 0 and theirs[n_outer:] == ours else ""
    return {
        prefix + name.removeprefix(own) if name.startswith(own) else outer + name: name for name in checkpoint.names
    }


def _stored_heads(whole: Checkpoint, prefix: str) -> list[str]:
    """Names of output heads: outside the decoder, and of an embedding's shape."""
    embeddings = {whole.shape(name) for name in _embeddings(whole, prefix)}
    return [
        name
        for name in whole.names
        if not name.startswith(prefix)
        and whole.shape(name) in embeddings
        and place_of(name, whole.layer_stack).role == "head"
    ]


def _embeddings(whole: Checkpoint, prefix: str) -> list[str]:
    """Names of the decoder's embeddings."""
    names = [name for name in whole.names if name.startswith(prefix)]
    return [name for name in names if place_of(name, whole.layer_stack).role == "embedding"]


def _n_embedded(whole: Checkpoint) -> int | None:
    """Rows of the decoder's embedding, which many a configuration leaves to transformers' defaults."""
    rows = {whole.shape(name)[0] for name in _embeddings(whole, _decoder_prefix(whole))}
    return rows.pop() if len(rows) == 1 else None


def _check_family(checkpoint: Checkpoint, whole: Checkpoint) -> None:
    """Refuse a language model of another family or depth; ``qwen2`` is in ``qwen2_5_vl_text``."""
    section = whole.config.get("text_config")
    text = section.get("model_type") if isinstance(section, Mapping) else whole.config.get("model_type")
    ours, theirs = str(checkpoint.config.get("model_type")), str(text)
    if not set(ours.split("_")) - {"text"} <= set(theirs.split("_")):
        raise CheckpointError(
            f"model_type must match the language part of {whole.reference} ({theirs}), got {ours} in"
            f" {checkpoint.reference}"
        )
    if checkpoint.n_layers != whole.n_layers:
        raise CheckpointError(
            f"number of layers must match the language part of {whole.reference} ({whole.n_layers}), got"
            f" {checkpoint.n_layers} in {checkpoint.reference}"
        )
