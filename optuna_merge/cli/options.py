"""What several commands share: their common arguments, and how results are printed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import optuna

    from optuna_merge.config import StudyConfig

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


def storage_overrides(storage_path: Path | None, storage: str | None) -> dict[str, Any]:
    """What the storage options replace in the study file; a path given here is relative to the working directory."""
    overrides: dict[str, Any] = {}
    if storage_path is not None:
        overrides["storage_path"] = storage_path.absolute()
    if storage is not None:
        overrides["study.storage"] = storage
    return overrides


def open_started(config: StudyConfig) -> optuna.Study:
    """The study of a study file, which must have been started.

    Raises:
        StudyError: If it has not.
    """
    from optuna_merge.store import open_study, storage_url

    return open_study(storage_url(config.storage_path, config.study.storage), config.study.name, create=False)


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
