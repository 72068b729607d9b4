"""Starts the judge's server, starts it again whenever it dies, and reads what it was asked."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.judging import judge_server


@dataclass
class JudgeServer:
    """A running judge.

    Attributes:
        url: Of its interface.
        folder: Where it keeps its log.
        n_starts: How often it was started.
    """

    url: str
    folder: Path
    n_starts: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def log(self) -> list[dict[str, str]]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def answered(self) -> Counter[str]:
        """Prompt to the number of times that it was answered without a fault."""
        return Counter(line["prompt"] for line in self.log() if not line["fault"])


@contextmanager
def judge(folder: Path, *faults: str) -> Iterator[JudgeServer]:
    """Run a judge with some faults before its answers."""
    folder.mkdir()
    (folder / "faults.json").write_text(json.dumps(faults))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = JudgeServer(f"http://127.0.0.1:{port}/v1", folder)
    command = [sys.executable, judge_server.__file__, str(port), str(folder)]

    def serve() -> None:
        while not server.is_over.is_set():
            with subprocess.Popen(command) as process:
                server.n_starts += 1
                while process.poll() is None and not server.is_over.wait(0.05):
                    pass
                process.kill()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield server
    finally:
        server.is_over.set()
        thread.join()
