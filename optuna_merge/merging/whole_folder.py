"""A folder that is written whole or not at all: it is filled under another name and then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from optuna_merge.errors import ExportError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Open a folder to write into, which takes the place of ``folder`` when the block ends without an error.

    The block writes into ``<folder>.<pid>.partial``. It is removed if anything fails; only a killed process leaves it.

    Args:
        folder: The final folder. Its parents are created; if it exists, it is replaced.

    Yields:
        The partial folder, empty.

    Raises:
        ExportError: If it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
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


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _replace(folder: Path, partial: Path) -> None:
    old = partial.with_suffix(".replaced")
    replaces = folder.exists()
    if replaces:
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if replaces:
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.errno is not None:
        return f"{os.strerror(exc.errno)} ({errno.errorcode.get(exc.errno, exc.errno)})"
    return str(exc)
