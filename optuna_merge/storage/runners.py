"""Which processes run a study whose storage is a file.

Knows files and kernel locks; knows nothing of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from optuna_merge.storage.lock import file_lock
from optuna_merge.storage.open import local_file


@contextmanager
def running(url: str, study_name: str, requeue: Callable[[bool], None]) -> Iterator[None]:
    """Mark this process as one that runs a study, for as long as the context lasts.

    The mark is a shared kernel lock on a file beside the storage. A process that gets that lock for itself is alone,
    unless ``serve-storage`` serves the storage: others may run the study through it.

    Args:
        url: As in :func:`optuna_merge.storage.open.open_storage`.
        study_name: The study.
        requeue: Called once, with whether this process is the only one; no other can begin to run the study until it
            returns. With a database server it is always called with False: who else runs the study is not known.
    """
    file = local_file(url)
    if file is None:
        requeue(False)
        yield
        return
    path = file.with_name(f"{file.name}.{study_name}.runners")
    try:
        with file_lock(_served(file), wait=False), file_lock(path, wait=False):
            requeue(True)
    except BlockingIOError:
        requeue(False)
    with file_lock(path, shared=True):
        yield


def serving(url: str) -> AbstractContextManager[None]:
    """Mark this process as one through which others may run any study of a storage, for as long as the context lasts.

    Args:
        url: As in :func:`optuna_merge.storage.open.open_storage`.
    """
    file = local_file(url)
    return nullcontext() if file is None else file_lock(_served(file), shared=True)


def _served(file: Path) -> Path:
    return file.with_name(f"{file.name}.served")
