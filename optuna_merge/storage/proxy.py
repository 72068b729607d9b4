"""The client of ``optuna-merge serve-storage``: Optuna's own with two more calls, a lock and writes in batches.

Knows the network, and nothing of studies. The server is in server.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import GrpcStorageProxy

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import address_of, channel_of
from optuna_merge.storage.writes import Write

DEFAULT_PORT = 13000

SERVICE = "optuna_merge.Storage"
"""The calls that Optuna's proxy lacks: ``Hold``, answered when a lock is held and lasting as long as it, and
``Write``."""
INSTALL = "which is not installed; pip install 'optuna-merge[grpc]'"

_ANSWER_S = 20.0
"""How long to wait for a server's first answer."""


class ProxyStorage(GrpcStorageProxy):
    """Optuna's client, with writes in batches."""

    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None:
        """Write parameters, attributes and intermediate values of a trial in one call to the server.

        Args:
            trial_id: A trial that is not finished.
            writes: See :data:`optuna_merge.storage.writes.Write`.

        Raises:
            KeyError: If there is no such trial.
            UpdateFinishedTrialError: If it is finished.
        """
        import grpc

        try:
            channel_of(self).unary_unary(f"/{SERVICE}/Write")(json.dumps([trial_id, *writes]).encode())
        except grpc.RpcError as exc:
            if exc.code() == grpc.StatusCode.NOT_FOUND:
                raise KeyError(exc.details()) from exc
            if exc.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise UpdateFinishedTrialError(exc.details()) from exc
            raise


def connect(url: str) -> ProxyStorage:
    """Connect to a proxy that runs.

    Args:
        url: ``grpc://HOST:PORT``.

    Raises:
        StudyError: If the URL is malformed, no server answers, or grpcio is not installed.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host = None
    if not host:
        raise StudyError(f"storage must be grpc://HOST:PORT, got {url}; mend study.storage")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = ProxyStorage(host=host, port=port)
            storage.wait_server_ready(timeout=_ANSWER_S)
    except ImportError as exc:
        raise StudyError(f"storage {url} needs grpcio, {INSTALL}") from exc
    except ConnectionError as exc:
        raise StudyError(
            f"storage {url} must answer, it has not for {_ANSWER_S:.0f} s; start it with optuna-merge serve-storage"
        ) from exc
    return storage


@contextmanager
def hold(storage: GrpcStorageProxy, name: str) -> Iterator[None]:
    """Hold a lock that the proxy's server keeps: one call to it lasts as long as the lock.

    Args:
        storage: A client of the proxy.
        name: What is locked.

    Raises:
        StudyError: If the server is not ``optuna-merge serve-storage``, or cannot give the lock.
    """
    import grpc

    call = channel_of(storage).unary_stream(f"/{SERVICE}/Hold")(name.encode())
    try:
        next(call)
    except grpc.RpcError as exc:
        if exc.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise StudyError(
                f"storage grpc://{address_of(storage)} must be served by optuna-merge serve-storage, got a proxy"
                " without locks; start that one instead"
            ) from exc
        if exc.code() == grpc.StatusCode.FAILED_PRECONDITION:
            raise StudyError(exc.details()) from exc
        raise
    except BaseException:
        call.cancel()
        raise
    try:
        yield
    finally:
        call.cancel()
