"""A checkpoint as a merge should see it, where that differs from the files: the base class of all such views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.checkpoint import Checkpoint
from optuna_merge.checkpoints.model_config import restated


class CheckpointView(Checkpoint):
    """Passes everything on to the checkpoint that it wraps; a subclass overrides what differs."""

    def __init__(self, checkpoint: Checkpoint, **changes: Any) -> None:
        """Wrap a checkpoint.

        Args:
            checkpoint: The checkpoint, or another view.
            **changes: Keys of ``config.json`` and their values in the view.
        """
        self._inner = checkpoint
        self.path = checkpoint.path
        self.reference = checkpoint.reference
        self.files = checkpoint.files
        self.names = checkpoint.names
        self.whole = checkpoint.whole
        self.copied = checkpoint.copied
        self.tokenizer_path = checkpoint.tokenizer_path
        self.config = restated(checkpoint.config, **changes) if changes else checkpoint.config

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in this view."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor in this view."""
        return self._inner.dtype(name)

    def get(self, name: str) -> Tensor:
        """A tensor, which must never be written to."""
        return self._inner.get(name)

    def prefetch(self, name: str) -> None:
        """Start to read a tensor from disk and return at once; does nothing if it is in memory."""
        self._inner.prefetch(name)

    def refuse_overwritten(self) -> None:
        """Refuse weights that were written to since they were opened."""
        self._inner.refuse_overwritten()

    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, added tokens included; None if there is no tokenizer."""
        return self._inner.vocabulary()

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer into an existing folder."""
        self._inner.write_tokenizer(folder)

    def content_digest(self) -> str:
        """Digest of the checkpoint itself, not of the view."""
        return self._inner.content_digest()

    @property
    def weights_digest(self) -> str:
        """Digest of the checkpoint itself, not of the view."""
        return self._inner.weights_digest

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return self._inner.nbytes
