from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from optuna_merge.errors import ExportError
from optuna_merge.merging.hub import push


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repo_id: str, **options: object) -> None:
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: object) -> None:
        self.calls.append(("upload", options))


def test_the_repository_is_made_and_the_folder_uploaded(tmp_path: Path) -> None:
    hub = FakeHub()
    assert push(tmp_path, "org/merged", message="a merge", hub=hub) == "https://huggingface.co/org/merged"
    assert hub.calls == [
        ("create", {"repo_id": "org/merged", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "org/merged", "folder_path": tmp_path, "commit_message": "a merge"}),
    ]


@pytest.mark.parametrize("name", ["merged", "a/b/c", "/merged", "org/"])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="repository must be org/name, got"):
        push(tmp_path, name, message="", hub=FakeHub())


def test_a_hub_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client against a server that knows nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked: list[tuple[str, dict]] = []

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_nobody")
    try:
        with pytest.raises(
            ExportError, match=r"org/merged: hub must accept the upload, got .*401.*; see `hf auth login`"
        ):
            push(tmp_path, "org/merged", message="", hub=hub)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    [(path, body)] = asked
    assert path == "/api/repos/create"
    assert body["name"] == "merged"
    assert body["organization"] == "org"


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        hub = HfApi(endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}", token="hf_nobody")
        with pytest.raises(ExportError, match=r"org/merged: hub must accept the upload, got .*efused"):
            push(tmp_path, "org/merged", message="", hub=hub)
