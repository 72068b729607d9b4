"""What an error of a storage means: that it is away for now, or that it is broken.

Knows the errors of databases, files and gRPC, without importing grpc.
"""

from __future__ import annotations

import optuna
import sqlalchemy


def is_outage(exc: BaseException) -> bool:
    """Whether an error says that the storage is away or busy for now, so that the same call may succeed later."""
    seen: BaseException | None = exc
    while seen is not None:
        if isinstance(seen, sqlalchemy.exc.DBAPIError):
            if "sqlite3" in type(seen.orig).__module__:
                return "locked" in str(seen.orig)
            return seen.connection_invalidated or isinstance(
                seen, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError
            )
        code = getattr(seen, "code", None)
        if callable(code) and getattr(code(), "name", None) in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):  # of grpc
            return True
        seen = seen.__cause__
    return False


def is_storage_error(exc: BaseException) -> bool:
    """Whether an error was raised by a storage: by its database, its file or its server."""
    kinds = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)
    return isinstance(exc, kinds) or any(kind.__module__.split(".")[0] == "grpc" for kind in type(exc).__mro__)


def reason(exc: BaseException) -> str:
    """What a storage or the system says about an error, on one line, without the library's own preamble."""
    cause = exc.__cause__ or exc
    cause = getattr(cause, "orig", None) or cause
    details = getattr(cause, "details", None)
    return " ".join(str(details() if callable(details) else cause).split()) or type(cause).__name__
