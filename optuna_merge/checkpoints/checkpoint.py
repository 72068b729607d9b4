"""Checkpoints: from a model reference to lazily read tensors, and from a stream of tensors to files.

Knows folders in Hugging Face's layout: safetensors in one file or in shards, ``config.json``, tokenizer files, and
adapters on top of them. Weights are mapped into memory and read when they are asked for. Knows nothing of merging.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optuna_merge.checkpoints.adapter import CONFIG_FILE as ADAPTER_CONFIG
from optuna_merge.checkpoints.adapter import Adapter
from optuna_merge.checkpoints.files import TensorFiles, read_json, write_json
from optuna_merge.checkpoints.reference import ResolvedReference, resolve
from optuna_merge.checkpoints.tensor_names import find_layer_stack
from optuna_merge.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer may consist of."""
_CONVERT = (
    'convert it once: python -c "from transformers import AutoModelForCausalLM as M; import sys; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" {source} {target} "
    "(a pickle can run code when it is read: do this only for a source that you trust)"
)


class Checkpoint:
    """One model's weights on disk, its configuration and its vocabulary. Opens files, loads nothing.

    Attributes:
        reference: What messages call it.
        path: The folder.
        config: ``config.json``; must not be changed.
        tokenizer_path: The folder that holds the tokenizer.
        names: Tensor names in the order of the files.
    """

    def __init__(self, path: Path, reference: str, adapter: ResolvedReference | None = None) -> None:
        self.path = path
        self.reference = reference
        self.config = _read_config(path, reference)
        self.tokenizer_path = path
        self._tensors = TensorFiles(_weight_files(path, reference), reference)
        self.files = self._tensors.files
        self.names = self._tensors.names
        _check_index(path, self._tensors)
        self._adapter = None if adapter is None else _open_adapter(adapter, self._tensors)
        if self._adapter is not None:
            self._adopt_vocabulary(self._adapter)

    @classmethod
    def open(cls, reference: str | ResolvedReference, relative_to: Path | None = None) -> Checkpoint:
        """Open the checkpoint that a reference means; see :func:`resolve`.

        Raises:
            CheckpointError: If there is none, or if its files are damaged or of a kind that is not read.
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
            CheckpointError: If it is one that merging does not know, such as a quantized one.
        """
        return self._tensors.dtype(name)

    def get(self, name: str) -> Tensor:
        """A tensor; must never be written to.

        A live map of the file, which costs no memory of its own; a new tensor where an adapter changes it.
        """
        stored = self._tensors.get(name)
        return stored if self._adapter is None else self._adapter.apply(name, stored)

    def prefetch(self, name: str) -> None:
        """Begin to read a tensor from disk, and return at once; does nothing where it is in memory."""
        if name in self._tensors:
            self._tensors.prefetch(name)

    @cached_property
    def n_layers(self) -> int:
        """Number of layers, by ``config.json`` or else by the tensor names."""
        stated = _stated_n_layers(self.config)
        return stated if stated is not None else self._count_layers()

    @cached_property
    def layer_stack(self) -> str:
        """What stands before the layer index in tensor names, such as ``model.layers.``."""
        try:
            return find_layer_stack(self.names, _stated_n_layers(self.config))
        except CheckpointError as exc:
            raise CheckpointError(f"{self.reference}: {exc}") from exc

    @property
    def is_tied(self) -> bool | None:
        """Whether ``config.json`` says that the output head is the embedding; None: it says nothing."""
        tied = self.config.get("tie_word_embeddings")
        return None if tied is None else bool(tied)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return self._tensors.nbytes + (0 if self._adapter is None else self._adapter.files.nbytes)

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding, by ``config.json``; may be more than there are tokens."""
        for section in (self.config.get("text_config"), self.config):
            if isinstance(section, Mapping) and isinstance(section.get("vocab_size"), int):
                return int(section["vocab_size"])
        return None

    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, added tokens included; None if the folder holds no tokenizer."""
        return _read_vocabulary(self.tokenizer_path, self.reference)

    @property
    def is_as_stored(self) -> bool:
        """Whether configuration and tokenizer are those in ``path``."""
        return self.tokenizer_path == self.path and self.config == _read_config(self.path, self.reference)

    def write_description(self, folder: Path, dtype: str, *, copy_code: bool) -> None:
        """Write everything but the weights: configuration, generation configuration, tokenizer.

        Args:
            folder: An existing folder.
            dtype: Of the weights that will be beside it.
            copy_code: Copy the model's own Python files too.
        """
        config = dict(self.config)
        config.pop("torch_dtype", None)  # the older name of the same key
        config["dtype"] = dtype
        if not copy_code:
            config.pop("auto_map", None)  # it names files that are not copied
        write_json(folder / "config.json", config)
        copied = [self.path / "generation_config.json"]
        copied += sorted(self.path.glob("*.py")) if copy_code else []
        for file in copied:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        self.write_tokenizer(folder)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer into an existing folder."""
        for name in TOKENIZER_FILES:
            if (self.tokenizer_path / name).is_file():
                shutil.copyfile(self.tokenizer_path / name, folder / name)

    def content_digest(self) -> str:
        """Hex SHA-256 that changes when the content changes, whatever the folder is called and however it is sharded.

        Covers :attr:`weights_digest` and every byte of the JSON and tokenizer files, an adapter's too.
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
        """Hex SHA-256 of the stored tensors, those of an adapter too; see :attr:`.files.TensorFiles.digest`."""
        if self._adapter is None:
            return self._tensors.digest
        return hashlib.sha256(f"{self._tensors.digest}+{self._adapter.files.digest}".encode()).hexdigest()

    def _adopt_vocabulary(self, adapter: Adapter) -> None:
        """Take over the vocabulary of an adapter that brings a larger or smaller embedding."""
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
            if any((adapter.path / file).is_file() for file in TOKENIZER_FILES):
                self.tokenizer_path = adapter.path

    def _count_layers(self) -> int:
        stack = self.layer_stack
        return len({name[len(stack) :].split(".")[0] for name in self.names if name.startswith(stack)})


class CheckpointView(Checkpoint):
    """A checkpoint as a merge shall see it: what a subclass does not override is the checkpoint's own."""

    def __init__(self, checkpoint: Checkpoint, **changes: Any) -> None:
        """Look at a checkpoint.

        Args:
            checkpoint: Or another view of one.
            **changes: What its ``config.json`` shall say instead.
        """
        self._inner = checkpoint
        self.path = checkpoint.path
        self.reference = checkpoint.reference
        self.files = checkpoint.files
        self.names = checkpoint.names
        self.tokenizer_path = checkpoint.tokenizer_path
        self.config = restated(checkpoint.config, **changes) if changes else checkpoint.config

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._inner.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the file's header."""
        return self._inner.dtype(name)

    def get(self, name: str) -> Tensor:
        """A tensor; must never be written to."""
        return self._inner.get(name)

    def prefetch(self, name: str) -> None:
        """Begin to read a tensor from disk, and return at once; does nothing where it is in memory."""
        self._inner.prefetch(name)

    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, added tokens included; None if the folder holds no tokenizer."""
        return self._inner.vocabulary()

    def write_tokenizer(self, folder: Path) -> None:
        """Write the files of the tokenizer into an existing folder."""
        self._inner.write_tokenizer(folder)

    def content_digest(self) -> str:
        """Of the checkpoint itself."""
        return self._inner.content_digest()

    @property
    def weights_digest(self) -> str:
        """Of the checkpoint itself."""
        return self._inner.weights_digest

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return self._inner.nbytes


def restated(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A ``config.json`` with other values, also where it describes the text model of several in one."""
    changed = {**config, **values}
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = {**config["text_config"], **values}
    return changed


def _open_adapter(resolved: ResolvedReference, tensors: TensorFiles) -> Adapter:
    if not (resolved.path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{resolved.reference}: adapter must hold {ADAPTER_CONFIG}, found none in {resolved.path}"
        )
    return Adapter(resolved.path, resolved.reference, tensors.names)


def _read_config(path: Path, reference: str) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{reference}: must be an existing folder, found none at {path}")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{reference}: must hold a config.json, found none in {path}")
    return read_json(file)


def _weight_files(path: Path, reference: str) -> tuple[Path, ...]:
    index = path / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must name the file of each tensor, got {weight_map!r}")
        files = [path / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{index}: must name existing files, missing: {', '.join(missing)}; fetch them again")
        return tuple(files)
    if (path / SINGLE_FILE).is_file():
        return (path / SINGLE_FILE,)
    if found := sorted(path.glob("*.safetensors")):
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{reference}: weights must be in {SINGLE_FILE} or listed in {INDEX_FILE}, found {names}")
    if pickles := sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]):
        remedy = _CONVERT.format(source=path, target=path.with_name(path.name + "-safetensors"))
        raise CheckpointError(f"{reference}: weights must be safetensors, got the pickle {pickles[0].name}; {remedy}")
    raise CheckpointError(f"{reference}: must hold {SINGLE_FILE} or {INDEX_FILE}, found neither in {path}")


def _check_index(path: Path, tensors: TensorFiles) -> None:
    index = path / INDEX_FILE
    if not index.is_file():
        return
    listed = read_json(index)["weight_map"]
    if missing := [name for name in listed if name not in tensors]:
        raise CheckpointError(f"{index}: {missing[0]} must be in {listed[missing[0]]}, which does not hold it")


def _stated_n_layers(config: Mapping[str, Any]) -> int | None:
    for section in (config.get("text_config"), config):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            if isinstance(section, Mapping) and isinstance(section.get(key), int):
                return int(section[key])
    return None


def _read_vocabulary(path: Path, reference: str) -> dict[str, int] | None:
    fast = path / "tokenizer.json"
    if fast.is_file():
        content = read_json(fast)
        if not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{fast}: must hold a tokenizer, got none under its key 'model'; fetch it again")
        vocab = content["model"].get("vocab", {})
        tokens = dict(vocab) if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
        return tokens | {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if not any((path / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(path).get_vocab())
    except (OSError, ValueError, ImportError) as exc:
        raise CheckpointError(f"{reference}: tokenizer must be loadable, got: {exc}") from exc
