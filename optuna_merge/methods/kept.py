"""Tensors that a method makes once from its models, and adds up anew in each merge.

They are as large as the models. With a folder they are files that are mapped into memory, so that the processes of a
study and its later runs share them; without one they stay in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from optuna_merge.errors import MergeError, first_line


class KeptTensors:
    """Keeps tensors by key.

    Args:
        folder: Where the files are; created when the first tensor is kept. None: in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}

    def get(self, key: tuple[str, ...], make: Callable[[], Tensor]) -> Tensor:
        """The tensor of a key; the first who asks makes it, and other processes wait for that one.

        Args:
            key: Everything that the tensor is made from: with equal keys, tensors are equal.
            make: Makes the tensor, contiguous, on the CPU.

        Returns:
            The tensor; read only.

        Raises:
            MergeError: If the folder cannot be written.
        """
        digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:32]
        if digest not in self._tensors:
            self._tensors[digest] = make() if self._folder is None else self._from_file(self._folder, digest, make)
        return self._tensors[digest]

    def _from_file(self, folder: Path, digest: str, make: Callable[[], Tensor]) -> Tensor:
        path, locked = folder / f"{digest}.pt", folder / f"{digest}.lock"
        if not path.exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock = locked.open("w")
            except OSError as exc:
                raise _not_writable(folder, exc) from exc
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _save(make(), path)
            locked.unlink(missing_ok=True)
        tensor: Tensor = torch.load(path, mmap=True, weights_only=True)
        return tensor


def _save(tensor: Tensor, path: Path) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        torch.save(tensor, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as exc:  # torch reports a full disk as a RuntimeError
        raise _not_writable(path.parent, exc) from exc
    finally:
        partial.unlink(missing_ok=True)


def _not_writable(folder: Path, exc: Exception) -> MergeError:
    return MergeError(
        f"{folder}: kept matrices must be writable, got {first_line(exc)}; free some space, see check, or choose"
        " another storage_path"
    )
