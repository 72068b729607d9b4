"""The server of ``optuna-merge serve-storage``: Optuna's gRPC proxy with two more calls, a lock and writes in batches.

It gives workers on other hosts access to an Optuna storage. A lock that it gives is the one that a worker takes who
opens the storage by itself, so both kinds of workers may run one study. There is no authentication: whoever reaches the
port can change every study. This file knows the network and locks, and nothing of trials.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError

from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import add_storage_service
from optuna_merge.storage.batched import BatchedStorage
from optuna_merge.storage.lock import make_lock
from optuna_merge.storage.open import local_file, open_storage, shown_url
from optuna_merge.storage.outages import is_outage, reason
from optuna_merge.storage.proxy import INSTALL, SERVICE
from optuna_merge.storage.runners import serving

if TYPE_CHECKING:
    import grpc

_MAX_CALLS = 1024
"""A call that waits for a lock occupies a thread of the server."""
_KEEPALIVE = (("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000))
"""A host that loses its power does not close its connections; the server pings it, so that its locks are freed."""


@contextmanager
def serve(url: str, host: str, port: int) -> Iterator[tuple[grpc.Server, int]]:
    """Give other hosts access to a storage, for as long as the context lasts.

    Args:
        url: A database; Optuna's proxy serves no other.
        host: Address to listen on; ``localhost`` can be reached from this host only.
        port: Port; 0: any free one.

    Yields:
        The server, which listens, and its port.

    Raises:
        StudyError: If the storage cannot be opened or has no locks, grpcio is not installed, or the port is taken.
    """
    storage = BatchedStorage(open_storage(url), shown_url(url), batched=False)
    with serving(url):
        server, free_port = _make_server(storage, local_file(url), host, port)
        server.start()
        try:
            yield server, free_port
        finally:
            server.stop(grace=1).wait()


def _make_server(storage: BatchedStorage, file: Path | None, host: str, port: int) -> tuple[grpc.Server, int]:
    try:
        import grpc

        options = [*_KEEPALIVE, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        server = grpc.server(ThreadPoolExecutor(max_workers=_MAX_CALLS), options=options)
        add_storage_service(server, storage)
    except ImportError as exc:
        raise StudyError(f"serve-storage needs grpcio, {INSTALL}") from exc
    service = _Service(storage, file)
    methods = {
        "Hold": grpc.unary_stream_rpc_method_handler(service.hold),
        "Write": grpc.unary_unary_rpc_method_handler(service.write),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    try:
        return server, server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as exc:
        raise StudyError(f"port must be free, got {host}:{port}; choose another port") from exc


class _Service:
    """The two calls that Optuna's proxy lacks."""

    def __init__(self, storage: BatchedStorage, file: Path | None) -> None:
        make_lock(storage.backend, "any", file)  # refuses a storage without locks now
        self._storage = storage
        self._file = file
        self._queues: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def hold(self, request: bytes, context: Any) -> Iterator[bytes]:
        """Answer once the lock is held, and keep it until the client ends the call."""
        name = request.decode()
        queue = self._queues[name]  # only its first asks the storage: who waits there cannot be told to give up
        while not queue.acquire(timeout=1.0):
            if not context.is_active():
                return
        try:
            with ExitStack() as stack:
                self._take(name, stack, context)
                ended = threading.Event()
                if context.add_callback(ended.set):  # else the client has gone while we waited
                    yield b"held"
                    ended.wait()
        finally:
            queue.release()

    def _take(self, name: str, stack: ExitStack, context: Any) -> None:
        """Take the storage's lock; an outage is for the client to wait for, as one who opened the storage would."""
        import grpc

        try:
            stack.enter_context(make_lock(self._storage.backend, name, self._file)())
        except StudyError as exc:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        except Exception as exc:
            if not is_outage(exc):
                raise
            context.abort(grpc.StatusCode.UNAVAILABLE, reason(exc))

    def write(self, request: bytes, context: Any) -> bytes:
        """Write a batch; see :meth:`optuna_merge.storage.proxy.ProxyStorage.write_trial`."""
        import grpc

        trial_id, *writes = json.loads(request)
        try:
            self._storage.write_trial(trial_id, [(kind, key, value) for kind, key, value in writes])
        except KeyError as exc:
            context.abort(grpc.StatusCode.NOT_FOUND, str(exc))
        except UpdateFinishedTrialError as exc:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(exc))
        return b""
