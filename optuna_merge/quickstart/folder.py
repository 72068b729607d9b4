"""Writes the quickstart into a folder: its study file, its eval tasks, its models. Does not know what a study is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from optuna_merge.atomic import write_atomically
from optuna_merge.errors import OptunaMergeError, first_line
from optuna_merge.quickstart.models import Settings, make_models
from optuna_merge.quickstart.quickstart_tasks.letters import RULES

STUDY_FILE = "quickstart.yaml"
_HERE = Path(__file__).parent
_TASKS = "quickstart_tasks"


def write_quickstart(folder: Path, say: Callable[[str], None], settings: Settings | None = None) -> Path:
    """Write what the quickstart's study needs. What is there already is kept, so an interrupted call can be repeated.

    Args:
        folder: Is made if it is missing. Gets the study file, a folder of eval tasks and a folder of models.
        say: Called with each line of progress.
        settings: What to train; None: the quickstart's own settings.

    Returns:
        The study file.

    Raises:
        OptunaMergeError: If the folder cannot be written, or a model cannot be trained.
    """
    try:
        write_files(folder, say)
        n_processes = min(len(RULES), os.cpu_count() or 1)
        make_models(folder / "quickstart_models", settings or Settings(), n_processes, say)
    except OSError as exc:
        raise OptunaMergeError(f"{folder}: FOLDER must be a folder that can be written, got {first_line(exc)}") from exc
    return folder / STUDY_FILE


def write_files(folder: Path, say: Callable[[str], None]) -> None:
    """Write the study file and its eval tasks; a file that was changed is kept, and ``say`` is told.

    Raises:
        OSError: If a file cannot be read or written.
    """
    tasks = sorted(path.name for path in (_HERE / _TASKS).iterdir() if path.suffix == ".yaml")
    for name in (STUDY_FILE, *(f"{_TASKS}/{task}" for task in (*tasks, "letters.py"))):
        target, text = folder / name, (_HERE / name).read_text(encoding="utf-8")
        if not target.exists():
            write_atomically(target, text)
        elif target.read_text(encoding="utf-8") != text:
            say(f"{target}: kept, although it differs from what this version would write")
