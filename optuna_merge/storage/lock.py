"""A lock that all processes of a study share, kept where its storage is. It is released when its holder dies.

    SQLite, journal file    a kernel lock on a file beside it
    PostgreSQL, MySQL       the server's session lock
    grpc://                 a call to optuna-merge serve-storage that lasts as long as the lock; for so long the server
                            holds the lock of the storage that it serves

This file knows nothing of trials. A lock is lost when the server that keeps it goes away, so a process that finishes a
trial must still check whether the trial is its own.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import backend_of
from optuna_merge.storage import proxy
from optuna_merge.storage.outages import reason

Lock = Callable[[], AbstractContextManager[None]]
"""Makes a context in which this process holds the lock; entering it waits for the lock."""

_MYSQL_WAIT_S = 3600
"""MySQL wants a limit. When it is reached, we ask again: the other servers wait for a lock without limit."""


def make_lock(storage: BaseStorage, name: str, file: Path | None) -> Lock:
    """Make the lock of that name in a storage.

    Args:
        storage: The storage.
        name: What is locked; two processes that lock the same name wait for each other.
        file: The file behind the storage, if there is one.

    Raises:
        StudyError: If the storage has no locks, or the name cannot be part of a file's.
    """
    backend = backend_of(storage)
    if file is not None:
        if "/" in name or "\0" in name:
            raise StudyError(f"a study must have a name that can be part of a file name, got {name!r}; choose another")
        return lambda: file_lock(file.with_name(f"{file.name}.{name}.lock"))
    if isinstance(backend, GrpcStorageProxy):
        return lambda: proxy.hold(backend, name)
    if isinstance(backend, RDBStorage) and has_locks(backend.engine):
        return lambda: server_lock(backend.engine, name)
    kind = backend.engine.name if isinstance(backend, RDBStorage) else type(backend).__name__
    raise StudyError(
        f"storage must be an SQLite or journal file, PostgreSQL, MySQL or grpc://, got {kind}: workers need a lock"
        " that it lacks; use one of them"
    )


@contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a kernel lock on a file.

    Args:
        path: The file; made if it is missing, and never removed.
        shared: Whether other processes may hold it too, if theirs is shared as well.
        wait: Whether to wait for the lock.

    Raises:
        BlockingIOError: If another process holds it and ``wait`` is false.
        StudyError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as exc:
        raise StudyError(
            f"{path}: lock must be writable, got {reason(exc)}; choose another storage_path, or make this one writable"
            " and run the same command again"
        ) from exc
    with handle:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing it is not enough: a process that was forked has it open too


def has_locks(engine: sqlalchemy.Engine) -> bool:
    """Whether :func:`server_lock` can lock on this kind of database server."""
    return engine.name in _SERVERS


@contextmanager
def server_lock(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """Hold a session lock of a database server, through a connection of its own.

    Raises:
        StudyError: If the server says that it cannot give the lock.
    """
    take, give = map(sqlalchemy.text, _SERVERS[engine.name])
    key = hashlib.sha256(f"optuna-merge {name}".encode()).digest()
    given = {"key": int.from_bytes(key[:8], "big", signed=True), "name": f"optuna-merge {key.hex()[:40]}"}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            while not (taken := connection.execute(take, given).scalar()):
                if taken is None:
                    raise StudyError(
                        f"storage {engine.url.render_as_string()} must give a lock, its GET_LOCK failed; look into the"
                        " server's log and run the same command again"
                    )
            yield
        finally:
            try:
                connection.execute(give, given)
            except sqlalchemy.exc.SQLAlchemyError:
                connection.invalidate()  # the server is gone, and the lock with it


_SERVERS = {
    "postgresql": ("SELECT 1 FROM pg_advisory_lock(:key)", "SELECT pg_advisory_unlock(:key)"),
    **dict.fromkeys(("mysql", "mariadb"), (f"SELECT GET_LOCK(:name, {_MYSQL_WAIT_S})", "SELECT RELEASE_LOCK(:name)")),
}
"""How to take a lock, which gives 1 when it is taken, 0 when it was waited for in vain, NULL on an error; and how to
give it back."""
