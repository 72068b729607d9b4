"""Writes a stream of tensors as the weight files of a checkpoint. Knows nothing of configuration and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from optuna_merge.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE
from optuna_merge.errors import CheckpointError


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write tensors as safetensors files, with an index if there is more than one file.

    Args:
        folder: An existing folder without weights.
        tensors: Names and tensors on any device. Each is kept until its shard is full, so the producer must not reuse
            its memory.
        max_shard_bytes: A shard is closed before a tensor that would make it larger than this; a tensor that is
            larger itself gets a shard of its own.

    Returns:
        The weight files, in order.

    Raises:
        CheckpointError: If there is no tensor.
    """
    shards: list[list[str]] = []  # the names in each
    total_bytes = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
        save_file(shard, folder / f"shard-{number:05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if not shards:
        raise CheckpointError(f"{folder}: a checkpoint must hold at least one tensor, got none")
    files = []
    for number in range(1, len(shards) + 1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append((folder / f"shard-{number:05d}.safetensors").rename(folder / name))
    if len(shards) > 1:
        weight_map = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


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
