"""Optuna's gRPC storage proxy, and what it lacks for workers on many hosts: a lock, and writes in batches.

The server hands an Optuna storage to other hosts; the client is Optuna's own, with two calls more. There is no
authentication: whoever reaches the port can change every study.
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
from optuna_merge.storage.writes import Write, write_trial

if TYPE_CHECKING:
    import grpc


DEFAULT_PORT = 13000

_INSTALL = "pip install 'optuna-merge[grpc]'"
_SERVICE = "optuna_merge.Storage"
_MAX_CALLS = 1024  # a call that waits for the lock keeps a thread
_ANSWER_S = 20.0
_ALIVE = (("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000))
"""A host that loses its power says nothing: ask it now and then, so that its locks are freed."""


class ProxyStorage(GrpcStorageProxy):
    """Optuna's client, with batches of writes."""

    def write_trial(self, trial_id: int, writes: Sequence[Write]) -> None:
        """Write parameters, attributes and intermediate values of a trial in one call.

        Raises:
            KeyError: If there is no such trial.
            UpdateFinishedTrialError: If it is finished.
        """
        import grpc

        try:
            self._channel.unary_unary(f"/{_SERVICE}/Write")(json.dumps([trial_id, *writes]).encode())
        except grpc.RpcError as exc:
            if exc.code() == grpc.StatusCode.NOT_FOUND:
                raise KeyError(exc.details()) from exc
            if exc.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise UpdateFinishedTrialError(exc.details()) from exc
            raise


def connect(url: str) -> ProxyStorage:
    """The client of a proxy that runs.

    Args:
        url: ``grpc://HOST:PORT``.

    Raises:
        StudyError: If the URL is malformed, or nobody answers.
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
        raise StudyError(
            f"storage {url} needs grpcio, which is not installed; pip install 'optuna-merge[grpc]'"
        ) from exc
    except ConnectionError as exc:
        raise StudyError(
            f"storage {url} must answer, it has not for {_ANSWER_S:.0f} s; start it with optuna-merge serve-storage"
        ) from exc
    return storage


@contextmanager
def hold(storage: GrpcStorageProxy, name: str) -> Iterator[None]:
    """Hold a lock of the proxy's.

    Raises:
        StudyError: If the server is another one than ``optuna-merge serve-storage``.
    """
    import grpc

    call = storage._channel.unary_stream(f"/{_SERVICE}/Hold")(name.encode())
    try:
        next(call)
    except grpc.RpcError as exc:
        if exc.code() == grpc.StatusCode.UNIMPLEMENTED:
            raise StudyError(
                f"storage grpc://{storage._host}:{storage._port} must be served by optuna-merge serve-storage, got a"
                " proxy without locks; start that one instead"
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
    """A server that hands a storage to other hosts; not started yet.

    Args:
        storage: Of a database.
        host: Address to listen on; ``localhost`` is reached from this host alone.
        port: Port, 0 for a free one.

    Returns:
        The server and its port.

    Raises:
        StudyError: If grpcio is not installed, or the port is taken.
    """
    try:
        import grpc
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.servicer import OptunaStorageProxyService
    except ImportError as exc:
        raise StudyError(
            "serve-storage needs grpcio, which is not installed; pip install 'optuna-merge[grpc]'"
        ) from exc
    options = [*_ALIVE, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(max_workers=_MAX_CALLS), options=options)
    add: Any = api_pb2_grpc.add_StorageServiceServicer_to_server
    add(OptunaStorageProxyService(storage), server)
    service = _Service(storage)
    methods = {
        "Hold": grpc.unary_stream_rpc_method_handler(service.hold),
        "Write": grpc.unary_unary_rpc_method_handler(service.write),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    try:
        return server, server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as exc:
        raise StudyError(f"port must be free, got {host}:{port}; choose another with --port") from exc


class _Service:
    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def hold(self, request: bytes, context: Any) -> Iterator[bytes]:
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
        import grpc

        trial_id, *writes = json.loads(request)
        try:
            write_trial(self._storage, trial_id, [(kind, key, value) for kind, key, value in writes])
        except KeyError as exc:
            context.abort(grpc.StatusCode.NOT_FOUND, str(exc))
        except UpdateFinishedTrialError as exc:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        return b""
