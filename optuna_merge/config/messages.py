"""What pydantic finds wrong in a study file, as problems in our words.

Knows how to say each kind of error and where the config's nesting differs from the file's; does not know which values
contradict each other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic_core import ErrorDetails

from optuna_merge.config.problem import Problem, join_key, short
from optuna_merge.config.search import SearchConfig
from optuna_merge.config.section import Section
from optuna_merge.config.study_config import StudyConfig
from optuna_merge.config.tasks import HoldoutConfig

UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
"""Kinds of errors that say that a section does not have a key; the second: the key is not even text."""

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
    "model_attributes_type": ("a mapping of keys", "indent the keys below it"),
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
"""Kind of error to what the value must be, and the way out."""

_NOT_IN_THE_FILE = {(SearchConfig, "ranges"), (HoldoutConfig, "fraction"), (HoldoutConfig, "tasks")}
"""Fields whose value may stand in the place of the section itself."""


def describe(error: ErrorDetails) -> Iterator[Problem]:
    """Say one of pydantic's errors in our words."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in UNKNOWN_KEY:
        *outer, last = error["loc"]
        yield _unknown_key(_Trace(outer), last, value)
        return
    trace = _Trace(error["loc"])
    if kind == "union_tag_invalid":
        rule = f"be one of {context['expected_tags']}"
        yield Problem(join_key(trace.key, "name"), rule, short(value["name"]), "choose one of them")
        known = [key for section in trace.choices for key in section.known_keys()]
        yield from (_no_key(trace.key, key, known) for key in value if key not in known)
    elif kind == "value_error":
        yield Problem(trace.key, f"be {context['error']}", short(value), "correct it")
    elif kind in _RULES:
        rule, fix = _RULES[kind]
        got = "nothing" if kind == "missing" else short(value)
        yield Problem(trace.key, f"be {rule.format(**context)}", got, fix)
    else:
        yield Problem(trace.key, f"be valid ({error['msg']})", short(value), "correct it")


def no_section(key: str, value: Any) -> Problem:
    """Say that a value stands where a section is wanted."""
    rule, fix = _RULES["model_type"]
    return Problem(key, f"be {rule}", short(value), fix)


def _unknown_key(trace: _Trace, key: Any, value: Any) -> Problem:
    others = [section for section in trace.choices if section is not trace.section]
    owners = [_name(section) for section in others if key in section.known_keys()]
    if not owners:
        return _no_key(trace.key, key, trace.section.known_keys())
    rule, fix = f"be absent for {_name(trace.section)}", f"it belongs to {' and '.join(owners)}: remove it"
    return Problem(join_key(trace.key, key), rule, short(value), fix)


def _no_key(outer: str, key: Any, known: list[str]) -> Problem:
    near = difflib.get_close_matches(str(key), known, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(set(known)))}"
    return Problem(join_key(outer, str(key)), "be a known key", repr(str(key)), fix)


class _Trace:
    """Where in the file an error is.

    Attributes:
        key: The key in the file: without the names that pydantic gives to the members of a union, and without the
            fields that the file may leave out.
        section: The section that is reached.
        choices: The members of the union that it belongs to; else the section alone.
    """

    def __init__(self, location: Sequence[int | str]) -> None:
        self.key = ""
        self.section: type[Section] = StudyConfig
        self.choices: list[type[Section]] = [StudyConfig]
        is_chosen = True
        for part in location:
            if not is_chosen:
                # The one without a fixed name stands for all the other names.
                named = [section for section in self.choices if _name(section) == part]
                self.section, is_chosen = (named or self.choices)[-1], True
                continue
            if (self.section, part) not in _NOT_IN_THE_FILE:
                self.key = join_key(self.key, part)
            field = self.section.model_fields.get(str(part))
            if field is not None and (inner := _sections_in(field.annotation)):
                self.section, self.choices, is_chosen = inner[0], inner, len(inner) == 1


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _name(section: type[Section]) -> Any:
    """The fixed name of a member of a union."""
    return section.model_fields["name"].default
