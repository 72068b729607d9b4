"""Writes a file whole or not at all: under another name in the same folder, then renamed."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a file that readers see either complete or not at all. Several processes may write it at once.

    Args:
        path: The file. Its folder is created if it is missing; a file that exists is replaced.
        content: Text is encoded as UTF-8.
        sync: Whether to wait until the disk has it; without, the file survives a kill, but not the end of the machine.

    Raises:
        OSError: If the file cannot be written; an existing file is left as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
