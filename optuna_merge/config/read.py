"""Loads a study file: YAML and overrides to a checked ``StudyConfig``, or to every problem at once.

Knows in which order a file is checked; the rules are in the sections and in ``contradictions``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from optuna_merge.config.contradictions import contradictions
from optuna_merge.config.messages import UNKNOWN_KEY, describe, no_section
from optuna_merge.config.problem import Problem
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.yaml_file import parse_yaml
from optuna_merge.errors import ConfigError


def load_study(path: Path | str, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study file.

    Args:
        path: A YAML file; relative paths in it are relative to its folder.
        overrides: Dotted key to value, such as ``{"study.n_trials": 20}``. They replace what the file says; relative
            paths among them are relative to the file, too.

    Raises:
        ConfigError: With one line for each problem of the file.
    """
    path = Path(path)
    data, lines, problems = parse_yaml(path)
    for key, value in (overrides or {}).items():
        problems += replace_key(data, key, value)
        lines[key] = 0  # no line of the file says it
    return _read(data, path, lines, problems)


def read_keys(data: Mapping[str, Any], path: Path) -> StudyConfig:
    """Check the keys of a study file that has not been written yet.

    Args:
        data: What the file will say; left unmodified.
        path: The file; relative paths are relative to its folder.

    Raises:
        ConfigError: With one line for each problem.
    """
    return _read(deepcopy(dict(data)), path, {}, [])


def replace_key(data: dict[str, Any], key: str, value: Any) -> list[Problem]:
    """Put a value in its place, in place of what a study file says there.

    Args:
        data: What the file says; modified.
        key: Dotted key, such as ``study.n_trials``; missing sections are added.
        value: The value.

    Returns:
        The problem, if the file has something else than a section on the way.
    """
    *outer, last = key.split(".")
    for depth, name in enumerate(outer, start=1):
        inner = data.get(name)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and name in ("sampler", "pruner", "prior"):  # their short form
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            return [no_section(".".join(outer[:depth]), inner)]
        data[name] = inner
        data = inner
    data[last] = value
    return []


def _read(data: dict[str, Any], path: Path, lines: Mapping[str, int], problems: list[Problem]) -> StudyConfig:
    config, wrong = _validate(data, path)
    problems = problems + wrong
    if config is not None:
        problems += contradictions(config)
    if problems or config is None:
        raise ConfigError([problem.located(path, lines) for problem in dict.fromkeys(problems)])
    return config


def _validate(data: dict[str, Any], path: Path) -> tuple[StudyConfig | None, list[Problem]]:
    """Make the config and find all wrong values.

    Pydantic checks a section as a whole only once its values are right. So wrong values are removed and the rest is
    validated again, until it is right or nothing more can be removed.
    """
    problems: list[Problem] = []
    removed: list[tuple[int | str, ...]] = []
    while True:
        try:
            return StudyConfig.model_validate(data, context=path), problems
        except pydantic.ValidationError as exc:
            errors = [error for error in exc.errors(include_url=False) if not _repeats_its_items(error)]
        # What a removed value leaves behind, such as a missing key, is not the file's fault.
        own = [error for error in errors if not any(at[: len(error["loc"])] == error["loc"] for at in removed)]
        for error in sorted(own, key=lambda error: error["type"] not in UNKNOWN_KEY):
            problems += describe(error)
        places = [place for error in errors if (place := _innermost(data, error["loc"]))]
        if not places:
            return None, problems
        for section, key in places:
            section.pop(key, None)
        removed += [error["loc"] for error in errors if error["type"] not in UNKNOWN_KEY]


def _repeats_its_items(error: ErrorDetails) -> bool:
    """Whether pydantic calls a list too short only because some of its items are wrong."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _innermost(data: Any, location: tuple[int | str, ...]) -> tuple[dict[Any, Any], int | str] | None:
    """The innermost section on the way to an error, and its key; None if the file has no part of that way.

    Parts of the location that are not in the file, such as the name of a union's member, are passed over.
    """
    place: tuple[dict[Any, Any], int | str] | None = None
    for part in location:
        if isinstance(data, dict) and part in data:
            place = (data, part)
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return place
