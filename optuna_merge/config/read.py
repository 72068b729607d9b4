"""YAML text and overrides to a checked ``StudyConfig``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from optuna_merge.config.contradictions import _contradictions
from optuna_merge.config.messages import _RULES, _describe, _keys, _locate, _short, _unknown_spellings
from optuna_merge.config.sections import StudyConfig
from optuna_merge.errors import ConfigError


def load_study(path: Path | str, overrides: Mapping[str, Any] | None = None) -> StudyConfig:
    """Read a study file.

    Args:
        path: A YAML file; relative paths in it are relative to its folder.
        overrides: Dotted key to value, such as ``{"study.n_trials": 20}``; they replace what the file says, and
            relative paths among them are relative to the file too.

    Raises:
        ConfigError: With one line for each problem of the file.
    """
    path = Path(path)
    data, problems, lines = _parse_yaml(path)
    for key, value in (overrides or {}).items():
        problems += _set(data, key.split("."), value)
        lines[key] = 0  # no line of the file says it
    problems += _unknown_spellings(data)
    config, wrong = _validate(data, path)
    problems += wrong
    if config is not None:
        problems += list(_contradictions(config))
    if problems or config is None:
        raise ConfigError([_locate(path, lines, problem) for problem in dict.fromkeys(problems)])
    return config


def _validate(data: dict[str, Any], path: Path) -> tuple[StudyConfig | None, list[str]]:
    """The config and the wrong values. Wrong optional values are left out, so that the rest can be checked too."""
    try:
        return StudyConfig.model_validate(_with_paths(data, path)), []
    except pydantic.ValidationError as exc:
        # A list with a wrong item is also "too short" to pydantic.
        errors = [
            error
            for error in exc.errors(include_url=False)
            if error["type"] != "too_short" or len(error["input"]) < error["ctx"]["min_length"]
        ]
    for error in errors:
        _drop(data, _keys(error["loc"]))
    problems = [_describe(error) for error in errors]
    try:
        return StudyConfig.model_validate(_with_paths(data, path)), problems
    except pydantic.ValidationError:
        return None, problems


def _drop(data: Any, keys: list[int | str]) -> None:
    """Remove the deepest mapping key on the way to a wrong value."""
    owner: dict[Any, Any] | None = None
    last: int | str = ""
    for key in keys:
        if isinstance(data, dict):
            owner, last = data, key
        elif not (isinstance(data, list) and isinstance(key, int) and key < len(data)):
            break
        data = data.get(key) if isinstance(data, dict) else data[key]
    if owner is not None:
        owner.pop(last, None)


def _parse_yaml(path: Path) -> tuple[dict[str, Any], list[str], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError as exc:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a study file"
        raise ConfigError(f"{path}: study file must exist; {hint}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: study file must be readable text, got {exc}; check the path") from exc
    except yaml.YAMLError as exc:
        reason = " ".join(str(exc).split())
        raise ConfigError(f"{path}: study file must be YAML, got {reason}; correct that line") from exc
    if not isinstance(data, dict):
        got = "nothing" if data is None else _short(data)
        raise ConfigError(f"{path}: study file must be a mapping of keys, got {got}; see studies/quickstart.yaml")
    lines: dict[str, int] = {}
    try:
        problems = [] if node is None else list(_walk(node, "", lines))
    except RecursionError as exc:
        raise ConfigError(f"{path}: study file must end, got an anchor within itself; write it out") from exc
    return data, problems, lines


def _walk(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Iterator[str]:
    """Note the line of every key; yield the keys that occur twice, of which YAML would keep the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else str(key.value)
            if name in lines:
                yield f"{name} must be given once, got it again; remove one of the two"
            lines[name] = key.start_mark.line + 1
            yield from _walk(value, name, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = f"{prefix}[{index}]"
            lines[name] = value.start_mark.line + 1
            yield from _walk(value, name, lines)


def _set(data: dict[str, Any], keys: list[str], value: Any) -> list[str]:
    """Put an override in its place; the problem if the file has something else than a section there."""
    for depth, key in enumerate(keys[:-1], start=1):
        inner = data.get(key)
        if inner is None:
            inner = {}
        elif isinstance(inner, str) and key in ("sampler", "pruner", "prior"):  # their short form
            inner = {"name": inner}
        elif not isinstance(inner, dict):
            rule, fix = _RULES["model_type"]
            return [f"{'.'.join(keys[:depth])} must be {rule}, got {_short(inner)}; {fix}"]
        data[key] = inner
        data = inner
    data[keys[-1]] = value
    return []


def _with_paths(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Leave out the keys without a value, and fill in what depends on where the file is."""
    folder = path.resolve().parent
    data = _without_nulls(data)
    result = {key: value for key, value in data.items() if key != "path"}
    study = data.get("study", {})
    if isinstance(study, dict) and not study.get("name"):
        result["study"] = study = {**study, "name": path.stem}
    name = study.get("name", path.stem) if isinstance(study, dict) else path.stem
    if isinstance(study, dict) and isinstance(study.get("storage"), str):
        result["study"] = {**study, "storage": absolute_storage(study["storage"], folder)}
    search = data.get("search")
    if isinstance(search, dict) and "warm_start" in search:
        result["search"] = {**search, "warm_start": _warm_start_path(search["warm_start"], folder)}
    storage = data.get("storage_path")
    storage = f"{name}_study" if storage is None else storage
    result["storage_path"] = folder / Path(storage).expanduser() if isinstance(storage, str | Path) else storage
    folders = data.get("task_search_path")
    folders = [] if folders is None else [folders] if isinstance(folders, str | Path) else folders
    if isinstance(folders, list | tuple):
        folders = [folder / Path(item).expanduser() if isinstance(item, str | Path) else item for item in folders]
    result["task_search_path"] = folders
    result["path"] = path
    return result


def _warm_start_path(value: Any, folder: Path) -> Any:
    """``search.warm_start`` with what it names, relative to the study file's folder, made absolute."""
    if isinstance(value, str):
        return folder / Path(value).expanduser()
    if not isinstance(value, dict):
        return value
    file, storage = value.get("file"), value.get("storage")
    result = dict(value)
    if isinstance(file, str):
        result["file"] = folder / Path(file).expanduser()
    if isinstance(storage, str):
        result["storage"] = absolute_storage(storage, folder)
    return result


def _without_nulls(value: Any) -> Any:
    """A key with nothing after it means its default, as if it were not there; a task's metadata are its own."""
    if isinstance(value, dict):
        return {
            key: item if key == "metadata" else _without_nulls(item) for key, item in value.items() if item is not None
        }
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def absolute_storage(url: str, folder: Path) -> str:
    """A storage URL whose file, if it is a relative one, starts at a folder."""
    relative = re.fullmatch(r"(sqlite(?:\+\w+)?:///|journal://)(?!/|file:|:memory:)(.+)", url)
    return url if relative is None else f"{relative[1]}{folder.absolute() / Path(relative[2]).expanduser()}"
