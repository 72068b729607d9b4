"""Paths in a study file, which are relative to the file's folder.

Knows how a path or a storage URL becomes absolute, given the study file as pydantic's validation context; does not
know which keys hold paths.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo
from sqlalchemy.engine import make_url


def absolute_storage(url: str, folder: Path) -> str:
    """A storage URL; if it names a relative file, that file in ``folder``."""
    relative = re.fullmatch(r"(sqlite(?:\+\w+)?:///|journal://)(?!/|file:|:memory:)(.+)", url)
    if relative is None:
        return url
    plain = f"{relative[1]}{folder.absolute() / Path(relative[2]).expanduser()}"
    if relative[1] == "journal://":
        return plain
    given = make_url(url)
    file = str(folder.absolute() / Path(given.database or "").expanduser())
    # In a URL some characters of a path mean something else, such as ? and %.
    return plain if make_url(plain).database == file else given.set(database=file).render_as_string()


def study_file(info: ValidationInfo) -> Path:
    """The study file that is being validated."""
    assert isinstance(info.context, Path)
    return info.context


def _folder(info: ValidationInfo) -> Path:
    return study_file(info).resolve().parent


def _absolute(value: Any, info: ValidationInfo) -> Any:
    return _folder(info) / Path(value).expanduser() if isinstance(value, str | Path) else value


def _absolute_url(value: str, info: ValidationInfo) -> str:
    return absolute_storage(value, _folder(info))


FilePath = Annotated[Path, BeforeValidator(_absolute)]
"""A file or folder, absolute once it is read."""

StorageUrl = Annotated[str, AfterValidator(_absolute_url)]
"""An Optuna storage URL, its file absolute once it is read."""
