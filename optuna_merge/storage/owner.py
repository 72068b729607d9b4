"""The process that runs a trial, and whether it is still alive.

Knows process numbers and the kernel's word on them; knows nothing of studies.
"""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

OPEN_CLAIMS: set[str] = set()
"""The ids of this process's claims that have not ended."""


@dataclass(frozen=True)
class Owner:
    """A process that has claimed a trial.

    Attributes:
        host: Name of its machine.
        machine: Id of the machine's boot and of the container; tells machines and containers of one host name apart.
            "" where the kernel does not say.
        pid: Process id of this worker.
        started: When the process started, in clock ticks after boot; tells it from a later process with the same id.
        claim: Id of this one claim.
        direct: Whether it opened the storage by itself, and not through ``serve-storage``.
    """

    host: str
    machine: str
    pid: int
    started: int
    claim: str
    direct: bool = True

    @classmethod
    def me(cls, *, direct: bool = True) -> Owner:
        """This process, with a new claim."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _start_ticks(pid) or 0, uuid.uuid4().hex, direct)

    @property
    def is_here(self) -> bool:
        """Whether the process runs on this machine, so that the kernel knows whether it is alive."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    @property
    def is_gone(self) -> bool:
        """Whether the process certainly runs the trial no more. Never true of a process on another machine."""
        if self.is_here and self.pid == os.getpid() and self.claim not in OPEN_CLAIMS:
            return True
        return self.is_here and _start_ticks(self.pid) != self.started


@cache
def _machine() -> str:
    """Id of this boot and of this container: process ids are unique only within both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine started; None if there is none of this id, 0 where the kernel does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self").exists() or not _exists(pid) else 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as exc:
        return isinstance(exc, PermissionError)
    return True
