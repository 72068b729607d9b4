"""Serves optuna-dashboard for one study over HTTP. Knows nothing of what the pages show."""

from __future__ import annotations

from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.util import setup_testing_defaults

from optuna_merge.config.study_config import StudyConfig
from optuna_merge.errors import StudyError
from optuna_merge.internals.optuna import storage_of, study_id
from optuna_merge.report.artifacts import artifact_storage
from optuna_merge.storage.open import open_study, storage_url
from optuna_merge.storage.outages import reason


@dataclass(frozen=True)
class Server:
    """A dashboard that is bound to its port and not served yet; ``url`` is the study's page."""

    url: str
    server: WSGIServer

    def serve(self) -> None:
        """Answer requests until interrupted."""
        with self.server:
            self.server.serve_forever()


def make_dashboard(config: StudyConfig, host: str = "127.0.0.1", port: int = 8080) -> Server:
    """The dashboard of a started study, bound to its port.

    Args:
        config: The study file.
        host: Address to listen on. The dashboard has no passwords: whoever reaches it can delete studies.
        port: In [0, 65535]; 0 takes any free port.

    Raises:
        StudyError: If the study has not been started, or if the port is not free.
    """
    import optuna_dashboard

    study = open_study(storage_url(config.storage_path, config.study.storage), config.study.name)
    app = optuna_dashboard.wsgi(storage_of(study), artifact_store=artifact_storage(config))
    # The dashboard caches finished trials, so that after this request the first page answers as fast as later ones.
    _request(app, f"/api/studies/{study_id(study)}")
    try:
        server = make_server(host, port, app, server_class=_ThreadingServer, handler_class=_QuietHandler)
    except (OSError, OverflowError) as exc:
        raise StudyError(
            f"{host}:{port}: must be an address to listen on, got {reason(exc)}; choose another port"
        ) from exc
    return Server(f"http://{host}:{server.server_port}/dashboard/studies/{study_id(study)}", server)


def _request(app: Any, path: str) -> None:
    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    b"".join(app(environ | {"PATH_INFO": path}, lambda *_: None))


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass
