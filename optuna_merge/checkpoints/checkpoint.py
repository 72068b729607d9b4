"""A checkpoint: one model on disk in Hugging Face's layout, read lazily.

Knows weights in safetensors, ``config.json``, the tokenizer and an adapter on top of them. Weights are mapped into
memory and read when they are asked for. Knows nothing of merging.
"""

from __future__ import annotations

import hashlib
import shutil
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from optuna_merge.checkpoints.adapter import Adapter
from optuna_merge.checkpoints.files import write_json
from optuna_merge.checkpoints.model_config import (
    CONFIG_FILE,
    read_config,
    restated,
    stated_n_layers,
    stated_vocab_size,
)
from optuna_merge.checkpoints.quantized import refuse_quantized
from optuna_merge.checkpoints.reference import ResolvedReference, resolve
from optuna_merge.checkpoints.tensor_names import find_layer_stack
from optuna_merge.checkpoints.tokenizer import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    copy_tokenizer,
    has_tokenizer_files,
    read_vocabulary,
)
from optuna_merge.checkpoints.weight_files import INDEX_FILE, open_weights
from optuna_merge.errors import CheckpointError


class Checkpoint:
    """One model's weights on disk, its configuration and its vocabulary. Opening it reads headers, not weights.

    Attributes:
        reference: The model's name in messages.
        path: The folder.
        config: Content of ``config.json``; must not be changed.
        tokenizer_path: The folder that holds the tokenizer.
        files: The weight files, without those of an adapter.
        names: Tensor names in the order of the files.
        whole: Reference of the model that sees or hears, if language models are merged with it; see :mod:`.senses`.
        copied: Names of its tensors that are no language. A merge copies them; every other view has them too.
    """

    whole: str | None = None
    copied: frozenset[str] = frozenset()

    def __init__(self, path: Path, reference: str, adapter: ResolvedReference | None = None) -> None:
        self.path = path
        self.reference = reference
        self.config = read_config(path, reference)
        refuse_quantized(self.config, path, reference)
        self.tokenizer_path = path
        self._tensors = open_weights(path, reference)
        self.files = self._tensors.files
        self.names = self._tensors.names
        self._adapter = None if adapter is None else Adapter(adapter.path, adapter.reference, self.names)
        if self._adapter is not None:
            self._adopt_vocabulary(self._adapter)

    @classmethod
    def open(cls, reference: str | ResolvedReference, relative_to: Path | None = None) -> Checkpoint:
        """Open the checkpoint that a reference leads to; see :func:`.reference.resolve`.

        Raises:
            CheckpointError: If there is none, or if its files are damaged or of an unsupported kind.
        """
        resolved = resolve(reference, relative_to) if isinstance(reference, str) else reference
        return cls(resolved.path, resolved.reference, resolved.adapter)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        replaced = None if self._adapter is None else self._adapter.replaced_shape(name)
        return self._tensors.shape(name) if replaced is None else replaced

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the file's header.

        Raises:
            CheckpointError: If merging does not support it, as with quantized weights.
        """
        return self._tensors.dtype(name)

    def get(self, name: str) -> Tensor:
        """A tensor, which must never be written to.

        It is a live map of the file, which costs no memory of its own, or a new tensor if an adapter changes it.
        """
        stored = self._tensors.get(name)
        return stored if self._adapter is None else self._adapter.apply(name, stored)

    def prefetch(self, name: str) -> None:
        """Start to read a tensor from disk and return at once; does nothing if it is in memory."""
        if name in self._tensors:
            self._tensors.prefetch(name)

    def refuse_overwritten(self) -> None:
        """Refuse weights that were written to since they were opened; see :class:`.files.TensorFiles`.

        Raises:
            CheckpointError: If they were.
        """
        self._tensors.refuse_overwritten()
        if self._adapter is not None:
            self._adapter.files.refuse_overwritten()

    @cached_property
    def n_layers(self) -> int:
        """Number of layers, from ``config.json`` or else from the tensor names."""
        stated = stated_n_layers(self.config)
        return stated if stated is not None else self._count_layers()

    @cached_property
    def layer_stack(self) -> str:
        """The part of tensor names before the layer index, such as ``model.layers.``."""
        try:
            return find_layer_stack(self.names, stated_n_layers(self.config))
        except CheckpointError as exc:
            raise CheckpointError(f"{self.reference}: {exc}") from exc

    @property
    def is_tied(self) -> bool | None:
        """Whether ``config.json`` says that the output head is the embedding; None if it says nothing."""
        tied = self.config.get("tie_word_embeddings")
        return None if tied is None else bool(tied)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return self._tensors.nbytes + (0 if self._adapter is None else self._adapter.files.nbytes)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, from ``config.json``; may exceed the number of tokens."""
        return stated_vocab_size(self.config)

    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, added tokens included; None if the folder holds no tokenizer."""
        return read_vocabulary(self.tokenizer_path, self.reference)

    @property
    def is_as_stored(self) -> bool:
        """Whether configuration and tokenizer are those in ``path``."""
        return self.tokenizer_path == self.path and self.config == read_config(self.path, self.reference)

    def write_description(self, folder: Path, dtype: str, *, copy_code: bool) -> None:
        """Write everything but the weights: configurations of model, generation and processors, and the tokenizer.

        Args:
            folder: An existing folder.
            dtype: Dtype of the weights that will lie beside it.
            copy_code: Copy the model's own Python files too.
        """
        config = dict(self.config)
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = dtype
        if not copy_code:
            config.pop("auto_map", None)  # it names files that are not copied
        write_json(folder / CONFIG_FILE, config)
        copied = [self.path / name for name in ("generation_config.json", *PROCESSOR_FILES)]
        copied += sorted(self.path.glob("*.py")) if copy_code else []
        for file in copied:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        self.write_tokenizer(folder)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer into an existing folder."""
        copy_tokenizer(self.tokenizer_path, folder)

    def content_digest(self) -> str:
        """Hex SHA-256 of the content; the name of the folder and the cut into shards do not change it.

        Covers :attr:`weights_digest` and every byte of the JSON and tokenizer files, also those of an adapter.
        """
        digest = hashlib.sha256(self.weights_digest.encode())
        for folder in [self.path] + ([] if self._adapter is None else [self._adapter.path]):
            files = {file for file in folder.glob("*.json") if file.name != INDEX_FILE}
            files |= {file for name in TOKENIZER_FILES if (file := folder / name).is_file()}
            for file in sorted(files):
                digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def weights_digest(self) -> str:
        """Hex SHA-256 of the stored tensors, also those of an adapter; see :attr:`.files.TensorFiles.digest`."""
        if self._adapter is None:
            return self._tensors.digest
        return hashlib.sha256(f"{self._tensors.digest}+{self._adapter.files.digest}".encode()).hexdigest()

    def _adopt_vocabulary(self, adapter: Adapter) -> None:
        """Adopt the vocabulary of an adapter whose embedding is larger or smaller than the model's."""
        rows = self.vocab_size
        for name in self.names:
            own, replaced = self._tensors.shape(name), self.shape(name)
            if own == replaced:
                continue
            if own[:1] != (rows,) or own[1:] != replaced[1:]:
                raise CheckpointError(
                    f"{self.reference}: shape of {name} must match the model {list(own)}, got {list(replaced)}; "
                    "is it an adapter of this model?"
                )
            self.config = restated(self.config, vocab_size=replaced[0])
            if has_tokenizer_files(adapter.path):
                self.tokenizer_path = adapter.path

    def _count_layers(self) -> int:
        stack = self.layer_stack
        return len({name[len(stack) :].split(".")[0] for name in self.names if name.startswith(stack)})
