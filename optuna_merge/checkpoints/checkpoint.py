"""Checkpoints: from a model reference to lazily read tensors, and from a stream of tensors to files.

Knows folders in Hugging Face's layout: safetensors in one file or in shards, ``config.json``, tokenizer files, and
adapters on top of them. Weights are mapped into memory and read when they are asked for. Knows nothing of merging.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.checkpoints.adapter import CONFIG_FILE as ADAPTER_CONFIG
from optuna_merge.checkpoints.adapter import Adapter
from optuna_merge.checkpoints.files import TensorFiles, read_json, write_json
from optuna_merge.checkpoints.tensor_names import find_layer_stack, is_buffer
from optuna_merge.errors import CheckpointError
from optuna_merge.recipe import split_reference

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

_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model", "*.tiktoken")
_N_SHOWN = 10
_CONVERT = (
    'convert it once: python -c "from transformers import AutoModelForCausalLM as M; import sys; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" {source} {target} "
    "(a pickle can run code when it is read: do this only for a source that you trust)"
)


@dataclass(frozen=True)
class ResolvedReference:
    """A model reference and the folder that it led to.

    Attributes:
        reference: As somebody wrote it.
        name: The same model for any reader: an absolute path, or ``org/name@commit`` for a model of the hub; two of
            them, joined with ``+``, for a model with an adapter.
        path: The folder.
        is_local: Whether it was a folder from the start, and not fetched from the hub.
        adapter: Of the model, if it has one.
    """

    reference: str
    name: str
    path: Path
    is_local: bool
    adapter: ResolvedReference | None = None

    @property
    def spellings(self) -> dict[str, str]:
        """``name``, or the names of model and adapter, to what a reader elsewhere should be told.

        That is a hub name as it was written, or the absolute path of a folder.
        """
        if self.adapter is None:
            return {self.name: self.name if self.is_local else self.reference}
        model, _ = split_reference(self.name)
        written = self.reference.removesuffix(f"+{self.adapter.reference}")
        return {model: model if self.is_local else written} | self.adapter.spellings


def resolve(reference: str, relative_to: Path | None = None) -> ResolvedReference:
    """Find the folder that a model reference means; fetch it from the hub if it is no folder.

    Args:
        reference: A folder (absolute, or relative to ``relative_to``), or ``org/name`` or ``org/name@revision`` on
            the model hub. What starts with ``.``, ``/`` or ``~`` is always a folder. Two of them joined with ``+``
            are a model and its adapter, unless there is a folder of that name.
        relative_to: Folder of the file that holds the reference; None: the working directory.

    Raises:
        CheckpointError: If it is neither; the message names both readings.
    """
    start = relative_to or Path.cwd()
    folder = start / Path(reference).expanduser()
    if folder.is_dir():
        absolute = folder.resolve()
        if split_reference(str(absolute))[1] is not None:
            raise CheckpointError(f"{absolute}: path must not read like a model with an adapter; rename the folder")
        return ResolvedReference(reference, str(absolute), absolute, is_local=True)
    if "+" in reference:
        splits = [(reference[:at], reference[at + 1 :]) for at, sign in enumerate(reference) if sign == "+"]
        model, adapter = next((pair for pair in splits if (start / Path(pair[0]).expanduser()).is_dir()), splits[0])
        base, added = resolve(model, start), resolve(adapter, start)
        return ResolvedReference(reference, f"{base.name}+{added.name}", base.path, base.is_local, added)
    if reference.startswith((".", "/", "~")):
        raise CheckpointError(f"model {reference!r} must be an existing folder, found none at {folder}")
    return _fetch(reference, folder)


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


def compare(checkpoints: Sequence[Checkpoint], tokenizer_source: str | None = None) -> list[str]:
    """Everything that keeps checkpoints from being merged tensor by tensor. Reads headers only.

    Args:
        checkpoints: The first is what the others are compared with: the base, if there is one.
        tokenizer_source: If None, every model must have the same vocabulary.

    Returns:
        One line for each difference; empty: they can be merged.
    """
    first, *others = checkpoints
    problems = [problem for checkpoint in checkpoints for problem in _quantized(checkpoint)]
    for other in others:
        if found := _compare_configs(first, other):
            problems += found  # their tensors would all differ too, which says nothing more
        else:
            problems += _compare_tensors(first, other, rows_may_differ=tokenizer_source is not None)
    if tokenizer_source is None:
        problems += _compare_vocabularies(checkpoints)
    return problems


def check_compatible(checkpoints: Sequence[Checkpoint], tokenizer_source: str | None = None) -> None:
    """Raise what :func:`compare` finds.

    Raises:
        CheckpointError: With one line for each of the first ten problems, and the number of the others.
    """
    problems = compare(checkpoints, tokenizer_source)
    if problems:
        more = [f"and {len(problems) - _N_SHOWN} more differences"] if len(problems) > _N_SHOWN else []
        raise CheckpointError("\n".join(problems[:_N_SHOWN] + more))


def restated(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A ``config.json`` with other values, also where it describes the text model of several in one."""
    changed = {**config, **values}
    if isinstance(config.get("text_config"), Mapping):
        changed["text_config"] = {**config["text_config"], **values}
    return changed


def common_names(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """The names of the tensors that all checkpoints have, in the order of the first."""
    return tuple(name for name in checkpoints[0].names if all(name in checkpoint for checkpoint in checkpoints))


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write a stream of tensors as safetensors, with an index if there is more than one file.

    Args:
        folder: An existing folder without weights.
        tensors: Names and tensors on any device; each is kept until its shard is full, so a producer must not
            reuse their memory.
        max_shard_bytes: A shard is closed before a tensor that would make it larger; a single larger tensor gets
            a shard of its own.

    Returns:
        The weight files, in order.
    """
    home: list[list[str]] = []  # the names in each shard
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
        save_file(shard, folder / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
        home.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if not home:
        raise CheckpointError(f"{folder}: a checkpoint must hold at least one tensor, got none")
    files = []
    for number in range(1, len(home) + 1):
        name = SINGLE_FILE if len(home) == 1 else f"model-{number:05d}-of-{len(home):05d}.safetensors"
        files.append((folder / f"shard-{number:05d}.safetensors").rename(folder / name))
    if len(home) > 1:
        weight_map = {name: file.name for file, names in zip(files, home, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _fetch(reference: str, looked_at: Path) -> ResolvedReference:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name, _, revision = reference.partition("@")
    try:
        path = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise CheckpointError(
            f"model {reference!r} must be a folder or a model of the hub, but there is no folder {looked_at}, "
            f"and the hub gave none: {reason}"
        ) from exc
    return ResolvedReference(reference, f"{name}@{path.name}", path, is_local=False)


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


def _shards(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous().cpu()
        size += tensor.nbytes
    if shard:
        yield shard


def _quantized(checkpoint: Checkpoint) -> list[str]:
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        return [f"{checkpoint.reference}: weights must not be quantized, got {method}; use the unquantized model"]
    return []


def _compare_configs(first: Checkpoint, other: Checkpoint) -> list[str]:
    for key in ("architectures", "model_type"):
        ours, theirs = first.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            return [f"{key} must match {first.reference} ({_plain(ours)}), got {_plain(theirs)} in {other.reference}"]
    if first.n_layers != other.n_layers:
        where = f"in {other.reference}"
        return [f"number of layers must match {first.reference} ({first.n_layers}), got {other.n_layers} {where}"]
    return []


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _compare_tensors(first: Checkpoint, other: Checkpoint, *, rows_may_differ: bool) -> list[str]:
    problems = []
    for name in first.names:
        if name in other:
            problems += _compare_tensor(name, first, other, rows_may_differ=rows_may_differ)
        elif not is_buffer(name):
            problems.append(f"{name}: must be in every model, is in {first.reference} but not in {other.reference}")
    problems += [
        f"{name}: must be in every model, is in {other.reference} but not in {first.reference}"
        for name in other.names
        if name not in first and not is_buffer(name)
    ]
    return problems


def _compare_tensor(name: str, first: Checkpoint, other: Checkpoint, *, rows_may_differ: bool) -> list[str]:
    ours, theirs = first.shape(name), other.shape(name)
    if ours != theirs:
        where = f"must match {first.reference} {list(ours)}, got {list(theirs)} in {other.reference}"
        if not _differ_in_vocabulary(ours, theirs, first, other):
            return [f"{name}: shape {where}"]
        return [] if rows_may_differ else [f"{name}: vocabulary rows {where}; set tokenizer_source"]
    if first.dtype(name).is_floating_point != other.dtype(name).is_floating_point:
        dtypes = f"must match {first.reference} {first.dtype(name)}, got {other.dtype(name)} in {other.reference}"
        return [f"{name}: dtype {dtypes}"]
    return []


def _differ_in_vocabulary(ours: tuple[int, ...], theirs: tuple[int, ...], first: Checkpoint, other: Checkpoint) -> bool:
    sizes = (first.vocab_size, other.vocab_size)
    return bool(ours and theirs) and ours[1:] == theirs[1:] and (ours[0], theirs[0]) == sizes


def _compare_vocabularies(checkpoints: Sequence[Checkpoint]) -> list[str]:
    known = [(checkpoint, vocabulary) for checkpoint in checkpoints if (vocabulary := checkpoint.vocabulary())]
    if not known:
        return []
    (first, ours), *others = known
    problems = []
    for other, theirs in others:
        different = sorted(
            (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
            key=lambda token: (min(ours.get(token, 1 << 62), theirs.get(token, 1 << 62)), token),
        )
        if different:
            shown = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {theirs.get(t, 'none')})" for t in different[:3])
            problems.append(
                f"vocabulary of {other.reference} must equal that of {first.reference}, {len(different)} tokens have "
                f"another id: {shown}{', ...' if len(different) > 3 else ''}; set tokenizer_source"
            )
    return problems


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
