"""A YAML file, read into Python values and the line of every key.

Knows YAML; does not know any key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from optuna_merge.config.problem import Problem, join_key, short
from optuna_merge.errors import ConfigError


def parse_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int], list[Problem]]:
    """Read a mapping.

    Returns:
        The mapping, the line of each of its keys and items by their dotted names, and the keys that occur twice.

    Raises:
        ConfigError: If the file cannot be read, or does not hold a mapping.
    """
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
        got = "nothing" if data is None else short(data)
        raise ConfigError(f"{path}: study file must be a mapping of keys, got {got}; optuna-merge init writes one")
    lines: dict[str, int] = {}
    try:
        problems = [] if node is None else list(_note_lines(node, "", lines))
    except RecursionError as exc:
        raise ConfigError(f"{path}: study file must end, got an anchor within itself; write it out") from exc
    return data, lines, problems


def _note_lines(node: yaml.Node, outer: str, lines: dict[str, int]) -> Iterator[Problem]:
    """Note the line of every key and item; yield the keys that occur twice, of which YAML keeps only the last."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = join_key(outer, str(key.value))
            if name in lines:
                yield Problem(name, "be given once", "it again", "remove one of the two")
            lines[name] = key.start_mark.line + 1
            yield from _note_lines(value, name, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            name = join_key(outer, index)
            lines[name] = value.start_mark.line + 1
            yield from _note_lines(value, name, lines)
