"""A folder that is written whole or not at all: it is filled under another name and then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from optuna_merge.errors import ExportError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Open a folder to write into, which takes the place of ``folder`` when the block ends without an error.

    The block writes into ``<folder>.<random>.partial``. It is removed if anything fails; only a killed process leaves
    it. A process that is killed while it replaces a folder leaves the old one or the new one; on a file system that
    cannot exchange two names, such as NFS, it may leave the old one for :func:`recover`.

    Args:
        folder: The final folder. Its parents are created; if it exists, it is replaced.

    Yields:
        The partial folder, empty.

    Raises:
        ExportError: If it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            _flush(file)
        _replace(folder, partial)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(partial, ignore_errors=True)
        raise ExportError(f"{folder}: must be writable, got: {_reason(exc)}; nothing was left there") from exc
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def recover(folder: Path) -> None:
    """Give a folder its name back if a process was killed while it replaced the folder."""
    if folder.exists():
        return
    for old in folder.parent.glob(f"{glob.escape(folder.name)}.{'[0-9a-f]' * 8}.replaced"):
        with contextlib.suppress(OSError):  # whoever writes there next says why
            old.rename(folder)
        return


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _replace(folder: Path, partial: Path) -> None:
    replaces = folder.exists()
    if replaces and _exchange(folder, partial):
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = partial.with_suffix(".replaced")
    if replaces:
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step, if the kernel and the file system can."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(first), os.fsencode(second)
    return renameat2 is not None and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"{os.strerror(exc.errno)} ({errno.errorcode.get(exc.errno, exc.errno)})"
    return str(exc)
