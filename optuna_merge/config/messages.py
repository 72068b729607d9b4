"""One line for each problem of a study file: the key, the rule, the value, the way out."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from optuna_merge.config.sections import (
    _SEARCH_KEYS,
    EngineConfig,
    GenomeConfig,
    HoldoutConfig,
    PriorConfig,
    PrunerConfig,
    Range,
    SamplerConfig,
    StudyConfig,
    StudyOptions,
    TaskConfig,
    WarmStartConfig,
)

_RULES = {
    "missing": ("given", "add it"),
    "int_type": ("a whole number", "write it without quotes or fraction"),
    "int_from_float": ("a whole number", "write it without fraction"),
    "float_type": ("a number", "write it without quotes; YAML wants 1.0e-3 where others write 1e-3"),
    "bool_type": ("true or false", "write true or false"),
    "string_type": ("text", "put it in quotes"),
    "tuple_type": ("a list", "write [a, b] or one item a line after '- '"),
    "dict_type": ("a mapping of keys", "indent the keys below it"),
    "mapping_type": ("a mapping of keys", "indent the keys below it"),
    "model_type": ("a mapping of keys", "indent the keys below it"),
    "is_instance_of": ("a path", "put it in quotes"),
    "finite_number": ("finite", "give a finite number"),
    "too_short": ("a list with at least {min_length} item", "add one"),
    "string_too_short": ("a name", "fill it in"),
    "greater_than": ("greater than {gt}", "raise it"),
    "greater_than_equal": ("at least {ge}", "raise it"),
    "less_than": ("less than {lt}", "lower it"),
    "less_than_equal": ("at most {le}", "lower it"),
    "literal_error": ("{expected}", "choose one of them"),
}


def _describe(error: Any) -> str:
    """Our line for one of pydantic's errors."""
    location = _dotted(error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return f"{location} must be {context['error']}, got {_short(error['input'])}; correct it"
    if kind not in _RULES:
        return f"{location}: {error['msg']}, got {_short(error['input'])}; correct it"
    rule, fix = _RULES[kind]
    got = "nothing" if kind == "missing" else _short(error["input"])
    return f"{location} must be {rule.format(**context)}, got {got}; {fix}"


def _dotted(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in _keys(location):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _keys(location: tuple[int | str, ...]) -> list[int | str]:
    """The keys in the file: without our own nesting of ``search`` and ``holdout``."""
    keys = [part for part in location if part not in ("ranges", "fraction")]
    return [key for index, key in enumerate(keys) if not (key == "tasks" and index == 1 and keys[0] == "holdout")]


def _unknown_spellings(data: dict[str, Any]) -> list[str]:
    """Remove the keys that no section has, each with a line that names the nearest."""
    problems: list[str] = []

    def check(section: Any, known: type[BaseModel], where: str) -> None:
        if not isinstance(section, dict):
            return
        names = [name for name in known.model_fields if name not in ("path", "ranges")]
        for key in [key for key in section if key not in names]:
            near = difflib.get_close_matches(str(key), names, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(names))}"
            problems.append(f"{where}{key} must be a known key, got {str(key)!r}; {fix}")
            del section[key]

    check(data, StudyConfig, "")
    sections: dict[str, type[BaseModel]] = {"genome": GenomeConfig, "study": StudyOptions, "engine": EngineConfig}
    for name, known in sections.items():
        check(data.get(name), known, f"{name}.")
    study, search = data.get("study"), data.get("search")
    if isinstance(study, dict):
        sampler = study.get("sampler")
        if isinstance(sampler, dict) and sampler.get("name", "cmaes") in ("cmaes", "random"):
            check(sampler, SamplerConfig, "study.sampler.")
        check(study.get("pruner"), PrunerConfig, "study.pruner.")
    if isinstance(search, dict):
        check(search.get("prior"), PriorConfig, "search.prior.")
        check(search.get("warm_start"), WarmStartConfig, "search.warm_start.")
        for key, value in search.items():
            if key not in _SEARCH_KEYS:
                check(value, Range, f"search.{key}.")
    holdout = data.get("holdout")
    if isinstance(holdout, dict):
        check(holdout, HoldoutConfig, "holdout.")
        holdout = holdout.get("tasks")
    for name, tasks in (("tasks", data.get("tasks")), ("holdout", holdout)):
        for index, task in enumerate(tasks) if isinstance(tasks, list) else ():
            check(task, TaskConfig, f"{name}[{index}].")
    return problems


def _locate(path: Path, lines: dict[str, int], problem: str) -> str:
    """Put the file, and the line if the problem's key or a part of its path has one, before a problem."""
    key = re.split(r" must |: ", problem, maxsplit=1)[0]
    while key and key not in lines:
        key = re.sub(r"(\[\d+\]|\.?[^.\[\]]*)$", "", key) if re.search(r"[.\[]", key) else ""
    return f"{path}:{lines[key]}: {problem}" if lines.get(key) else f"{path}: {problem}"


def _short(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
