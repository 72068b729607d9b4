"""Real servers for tests: PostgreSQL, MariaDB and the gRPC proxy. Each is a context and stops at its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(port: int) -> None:
    """Wait until a server listens on a port, at most ten minutes."""
    deadline = time.monotonic() + 600
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


class Postgres:
    """A PostgreSQL server with its own data folder, run from the programs in the package pgserver."""

    def __init__(self, folder: Path) -> None:
        programs = Path(pytest.importorskip("pgserver").__file__).parent / "pginstall" / "bin"
        self._postgres = str(programs / "postgres")
        self._is_ready = str(programs / "pg_isready")
        self.port = free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._folder = folder
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL does not run as root
            self._as = {"user": "nobody", "group": "nogroup"}
            shutil.chown(folder, "nobody", "nogroup")
        command = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "--auth=trust", "-N"]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as)
        self.start()

    def start(self) -> None:
        """Start the server on its data folder and wait until it answers."""
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._folder), "-c", "shared_buffers=16MB"]
        self._process = subprocess.Popen(
            [self._postgres, "-D", str(self._folder / "data"), *options],
            stderr=(self._folder / "log").open("ab"),
            cwd="/",
            **self._as,
        )
        wait_for(self.port)
        ready = [self._is_ready, "-h", "127.0.0.1", "-p", str(self.port), "-t", "60"]
        while subprocess.run(ready, capture_output=True, check=False).returncode == 1:  # it listens, and starts up
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server.

        Args:
            how: SIGINT drops all connections and shuts down; SIGKILL stops as a power cut would.
        """
        self._process.send_signal(how)
        self._process.wait()
        if how == signal.SIGKILL:
            time.sleep(0.5)  # until its child processes have noticed


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL server."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:  # other users cannot enter pytest's own
        server = Postgres(Path(folder))
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def mariadb() -> Iterator[str]:
    """The URL of an empty database on a MariaDB server of its own; skips the test if MariaDB is not installed."""
    pytest.importorskip("pymysql")
    programs = [shutil.which(name) for name in ("mariadb-install-db", "mariadbd", "mariadb")]
    if None in programs:
        pytest.skip("needs MariaDB: apt-get install mariadb-server")
    install, server, client = map(str, programs)
    with tempfile.TemporaryDirectory(prefix="mariadb-") as name:
        folder, port = Path(name), free_port()
        user = [] if os.geteuid() else ["--user=root"]
        options = ["--no-defaults", f"--datadir={folder / 'data'}", *user]
        subprocess.run([install, *options, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
        socket_file = f"--socket={folder / 'socket'}"
        listening = ["--bind-address=127.0.0.1", f"--port={port}", socket_file, f"--pid-file={folder / 'pid'}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([server, *options, *listening], stderr=log)
        try:
            wait_for(port)
            made = "CREATE DATABASE merges; CREATE USER me@localhost; GRANT ALL ON merges.* TO me@localhost"
            subprocess.run([client, "--no-defaults", socket_file, "--user=root", "-e", made], check=True)
            yield f"mysql://me@127.0.0.1:{port}/merges"
        finally:
            process.terminate()
            process.wait()


class Proxy:
    """``optuna-merge serve-storage``, on the same port whenever it is started."""

    def __init__(self, served: str) -> None:
        pytest.importorskip("grpc")
        self._port = free_port()
        self._served = served
        self.url = f"grpc://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        address = ["--host", "127.0.0.1", "--port", str(self._port)]
        command = [sys.executable, "-m", "optuna_merge", "serve-storage", self._served, *address]
        self._process = subprocess.Popen(command)
        wait_for(self._port)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait until the process is gone; background processes of a shell ignore SIGINT."""
        self._process.send_signal(how)
        self._process.wait()


@contextlib.contextmanager
def proxy(url: str) -> Iterator[Proxy]:
    """A running proxy.

    Args:
        url: The storage to serve.
    """
    server = Proxy(url)
    try:
        yield server
    finally:
        server.stop()
