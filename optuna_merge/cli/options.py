"""What several commands share: their common arguments, and how results are printed."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config.sections import StudyConfig

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C."""

StudyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Study file (YAML), such as studies/quickstart.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StoragePath = Annotated[
    Path | None, typer.Option("--storage-path", metavar="DIR", help="Folder for everything that the study writes.")
]
StorageUrl = Annotated[
    str | None, typer.Option("--storage", metavar="URL", help="Optuna storage; an SQLite file in DIR by default.")
]


TaskSearchPath = Annotated[
    list[Path] | None,
    typer.Option("--task-search-path", metavar="DIR", help="Folder with eval tasks; may be given several times."),
]
Seed = Annotated[
    int | None, typer.Option("--random-seed", "--seed", metavar="N", help="Decides every draw of the study.")
]


def overrides_of(
    storage_path: Path | None = None,
    storage: str | None = None,
    task_search_path: Sequence[Path] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """What the common options replace in the study file; a path given here is relative to the working directory."""
    from optuna_merge.config.read import absolute_storage

    given = {
        "storage_path": storage_path and storage_path.absolute(),
        "study.storage": storage and absolute_storage(storage, Path.cwd()),
        "task_search_path": [path.absolute() for path in task_search_path] if task_search_path else None,
        "study.seed": seed,
    }
    return {key: value for key, value in given.items() if value is not None}


def export_line(file: Path, storage_path: Path | None, storage: str | None, seed: int | None) -> str:
    """The command that exports the best merge of a study that was run with these options."""
    options = {"--storage-path": storage_path, "--storage": storage, "--random-seed": seed}
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    return shlex.join(["optuna-merge", "export", str(file), "OUT", *given])


def open_started(config: StudyConfig) -> optuna.Study:
    """The study of a study file, which must have been started.

    Raises:
        StudyError: If it has not.
    """
    import optuna

    from optuna_merge.storage.open import open_study, storage_url

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its log lines say nothing that we do not
    return open_study(storage_url(config.storage_path, config.study.storage), config.study.name)


def print_json(value: Any) -> None:
    """One JSON value on stdout; JSON has no infinity and no NaN, they become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout, as wide as it needs to be where nobody looks at a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 400).print(table, crop=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """One line of progress on stderr."""
    typer.echo(text, err=True)
