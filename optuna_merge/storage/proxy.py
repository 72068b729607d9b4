"""Optuna's gRPC storage proxy with two more calls: a lock, and writes in batches.

The server gives workers on other hosts access to an Optuna storage; the client is Optuna's own with the two calls
added. There is no authentication: whoever reaches the port can change every study. This file knows the network, and
nothing of studies.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import add_storage_service, address_of, channel_of
from optuna_merge.storage.writes import Write, write_trial

if TYPE_CHECKING:
    import grpc


DEFAULT_PORT = 13000

_INSTALL = "which is not installed; pip install 'optuna-merge[grpc]'"
_SERVICE = "optuna_merge.Storage"
_MAX_CALLS = 1024
"""A call that waits for a lock occupies a thread of the server."""
_ANSWER_S = 20.0
"""How long to wait for a server's first answer."""
_KEEPALIVE = (("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000))
"""A host that loses its power does not close its connections; the server pings it, so that its locks are freed."""


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
            channel_of(self).unary_unary(f"/{_SERVICE}/Write")(json.dumps([trial_id, *writes]).encode())
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
        raise StudyError(f"storage {url} needs grpcio, {_INSTALL}") from exc
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
        StudyError: If the server is not ``optuna-merge serve-storage``.
    """
    import grpc

    call = channel_of(storage).unary_stream(f"/{_SERVICE}/Hold")(name.encode())
    try:
        next(call)
    except grpc.RpcError as exc:
        if exc.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise StudyError(
                f"storage grpc://{address_of(storage)} must be served by optuna-merge serve-storage, got a proxy"
                " without locks; start that one instead"
            ) from exc
        raise
    except BaseException:
        call.cancel()
        raise
    try:
        yield
    finally:
        call.cancel()


def make_server(storage: BaseStorage, host: str, port: int) -> tuple[grpc.Server, int]:
    """Make a server that gives other hosts access to a storage.

    Args:
        storage: A database's; Optuna's proxy serves no other.
        host: Address to listen on; ``localhost`` can be reached from this host only.
        port: Port; 0: any free one.

    Returns:
        The server, not started yet, and its port.

    Raises:
        StudyError: If grpcio is not installed, or the port is taken.
    """
    try:
        import grpc

        options = [*_KEEPALIVE, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        server = grpc.server(ThreadPoolExecutor(max_workers=_MAX_CALLS), options=options)
        add_storage_service(server, storage)
    except ImportError as exc:
        raise StudyError(f"serve-storage needs grpcio, {_INSTALL}") from exc
    service = _Service(storage)
    methods = {
        "Hold": grpc.unary_stream_rpc_method_handler(service.hold),
        "Write": grpc.unary_unary_rpc_method_handler(service.write),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    try:
        return server, server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as exc:
        raise StudyError(f"port must be free, got {host}:{port}; choose another port") from exc


class _Service:
    """The two calls that Optuna's proxy lacks."""

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def hold(self, request: bytes, context: Any) -> Iterator[bytes]:
        """Answer once the lock is held, and keep it until the client ends the call."""
        lock = self._locks[request.decode()]
        while not lock.acquire(timeout=1.0):
            if not context.is_active():
                return
        ended = threading.Event()
        if not context.add_callback(ended.set):
            lock.release()
            return
        try:
            yield b"held"
            ended.wait()
        finally:
            lock.release()

    def write(self, request: bytes, context: Any) -> bytes:
        """Write a batch; see :meth:`ProxyStorage.write_trial`."""
        import grpc

        trial_id, *writes = json.loads(request)
        try:
            write_trial(self._storage, trial_id, [(kind, key, value) for kind, key, value in writes])
        except KeyError as exc:
            context.abort(grpc.StatusCode.NOT_FOUND, str(exc))
        except UpdateFinishedTrialError as exc:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        return b""
