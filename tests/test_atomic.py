from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from optuna_merge.atomic import write_atomically


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_atomically(file, b"\xff\r\n")
    assert file.read_bytes() == b"\xff\r\n"
    assert names(file.parent) == ["file.txt"]


def test_readers_see_whole_files_while_processes_write(tmp_path: Path) -> None:
    """Each of three processes writes its own letter a hundred times."""
    file = tmp_path / "file"
    size = 1 << 18
    script = "import sys; from pathlib import Path; from optuna_merge.atomic import write_atomically\n"
    script += f"for _ in range(100): write_atomically(Path(sys.argv[1]), sys.argv[2] * {size})"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(file), letter]) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            content = file.read_text()
            assert content == content[0] * size
            seen.add(content[0])
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert seen <= set("abc")
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: a write fails when half is written."""
    file = tmp_path / "file"
    write_atomically(file, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OSError, match="File too large"):
            write_atomically(file, "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "file"
    write_atomically(file, "old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_unwritable_folder_leaves_the_old_file() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        file = Path(folder) / "file"
        write_atomically(file, "old")
        file.parent.chmod(0o555)
        try:
            if user == 0:  # root writes everywhere
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                write_atomically(file, "new")
            assert file.read_text() == "old"
        finally:
            os.seteuid(user)
            file.parent.chmod(0o755)
        assert names(file.parent) == ["file"]


@pytest.mark.parametrize("place", ["folder", "file/file"])
def test_a_place_that_is_no_file_is_left_as_it_was(place: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match=r"Is a directory|Not a directory|File exists"):
        write_atomically(tmp_path / place, "new")
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []
    assert (tmp_path / "file").read_text() == "old"


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from optuna_merge.atomic import write_atomically
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(Path(sys.argv[1]), "new")
        """
    )
    assert subprocess.run([sys.executable, "-c", script, str(file)]).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    write_atomically(file, "newer")
    assert file.read_text() == "newer"
