"""Files of two formats: JSON objects, and tensors in safetensors. Does not know what a model's files are called."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from optuna_merge.errors import CheckpointError, first_line

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK_BYTES = 4096
_READ_AHEAD_BYTES = 1 << 20  # for one call Linux reads at most a device's longest request
_MADVISE = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_WILLNEED") else None
if _MADVISE is not None:
    _MADVISE.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class TensorFiles:
    """The tensors of one or more safetensors files, read when they are asked for.

    Attributes:
        reference: The model's name in messages.
        files: The files.
        names: Tensor names in the order of the files.
    """

    def __init__(self, files: Iterable[Path], reference: str) -> None:
        """Open the files and read their headers.

        Raises:
            CheckpointError: If one is damaged or cut short.
        """
        self.reference = reference
        self.files = tuple(files)
        self._stamps = {file: _stamp(file) for file in self.files}
        self._home: dict[str, Any] = {}  # name -> the open file that holds it
        self._maps: dict[str, Tensor] = {}
        for file in self.files:
            handle = _open(file)
            self._home.update(dict.fromkeys(handle.offset_keys(), handle))
        self.names: tuple[str, ...] = tuple(self._home)

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the file's header.

        Raises:
            CheckpointError: If merging does not support it, as with quantized weights.
        """
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.reference}: dtype of {name} must be one of {', '.join(_DTYPES)}, got {code}; "
                "merge the model from which it was made, or a copy in bfloat16 with its scales multiplied in"
            )
        return _DTYPES[code]

    def get(self, name: str) -> Tensor:
        """A tensor as a live map of the file; it costs no memory of its own and must never be written to."""
        if name not in self._maps:
            self._slice(name)
            self._maps[name] = self._home[name].get_tensor(name)
        return self._maps[name]

    def prefetch(self, name: str) -> None:
        """Ask the operating system to read a tensor ahead, and return at once."""
        stored = self.get(name)
        start = stored.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        if _MADVISE is not None and stored.numel():
            end = stored.data_ptr() + stored.nbytes
            for address in range(start, end, _READ_AHEAD_BYTES):
                _MADVISE(address, min(_READ_AHEAD_BYTES, end - address), mmap.MADV_WILLNEED)

    def refuse_overwritten(self) -> None:
        """Refuse files that were written to since they were opened: their maps show the new bytes.

        A file that was removed, or replaced by another one, remains as it was for those who have it open.

        Raises:
            CheckpointError: If one was written to.
        """
        for file, stamp in self._stamps.items():
            now = _stamp(file)
            if stamp is not None and now is not None and now[0] == stamp[0] and now != stamp:
                raise CheckpointError(
                    f"{file}: weights must stay as they were when they were opened, got a file that was overwritten;"
                    " restore it and run the same command again"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all files, which may have been removed since they were opened."""
        return sum(stamp[1] for stamp in self._stamps.values() if stamp is not None)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over each tensor's name, dtype, shape and three blocks of 4 KiB: its ends and its middle.

        This is cheap, and complete for small tensors. A change that spares these blocks goes unseen; training changes
        nearly every element.
        """
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(f"{name}\0{self._slice(name).get_dtype()}\0{self.shape(name)}\0".encode())
            stored = self.get(name).reshape(-1).view(torch.uint8)
            for start in sorted({0, (stored.numel() - _BLOCK_BYTES) // 2, stored.numel() - _BLOCK_BYTES}):
                digest.update(stored[max(0, start) : max(0, start) + _BLOCK_BYTES].numpy().tobytes())
        return digest.hexdigest()

    def _slice(self, name: str) -> Any:
        if name not in self._home:
            raise CheckpointError(f"{self.reference}: has no tensor named {name}")
        return self._home[name].get_slice(name)


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: If the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file}: must be readable JSON, got {exc}; fetch the model again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object as a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stamp(file: Path) -> tuple[tuple[int, int], int, int] | None:
    """Which file it is, its size and when it was written to last; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")  # checks the header against the size of the file
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{file}: must be a whole safetensors file, got: {exc}; fetch it again") from exc
    except (MemoryError, RuntimeError) as exc:  # from safetensors or torch, where the kernel maps no file of that size
        raise CheckpointError(
            f"{file}: must be of a size that this machine can map into memory, got: {first_line(exc)}; save the model"
            " in smaller shards (max_shard_size), or raise the limit (ulimit -v, vm.overcommit_memory)"
        ) from exc
