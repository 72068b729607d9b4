"""How commands print: results on stdout, as JSON or tables; notes on stderr. Knows nothing of studies."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from optuna_merge.errors import StudyError, first_line


def note(text: str) -> None:
    """Print one line of progress on stderr."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    """Print one JSON value on stdout; infinity and NaN, which JSON lacks, become null."""
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout, at its full width if stdout is no terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 400).print(table, crop=False)


def write_page(path: Path, html: str) -> None:
    """Write the page of ``--html`` and note where it is.

    Raises:
        StudyError: If the file cannot be written.
    """
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as exc:
        raise StudyError(f"{path}: --html must be a file that can be written, got {first_line(exc)}") from exc
    note(f"page: {path}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
