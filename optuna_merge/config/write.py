"""Writes a study file: its keys, with the reason for each as a comment above it.

Knows how a study file looks; does not know why a key has its value.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

_WIDTH = 110
_ITEMS_IN_LINES = ("genome.models", "tasks")  # these lists have an item a line


def study_text(data: Mapping[str, Any], reasons: Mapping[str, str], head: Sequence[str]) -> str:
    """The text of a study file.

    Args:
        data: What the file says: plain values, lists and mappings.
        reasons: Dotted key to a comment of any length.
        head: Comment lines at the top, the first of them the question that the study answers; "" is an empty line.
    """
    lines = [f"# {line}".rstrip() for line in head]
    for key, value in data.items():
        is_section = isinstance(value, Mapping) and bool(value)
        if is_section or key in _ITEMS_IN_LINES or key in reasons:
            lines.append("")
        lines += _comment(reasons.get(key), "")
        if is_section:
            lines.append(f"{_flow(key)}:")
            for name, inner in value.items():
                lines += _key(key, name, inner, reasons)
        else:
            lines += _value(key, key, value, "")
    return "\n".join(lines) + "\n"


def _key(section: str, key: str, value: Any, reasons: Mapping[str, str]) -> Iterator[str]:
    dotted = f"{section}.{key}"
    yield from _comment(reasons.get(dotted), "  ")
    yield from _value(dotted, key, value, "  ")


def _value(dotted: str, key: str, value: Any, indent: str) -> Iterator[str]:
    if dotted in _ITEMS_IN_LINES and isinstance(value, list) and value:
        yield f"{indent}{key}:"
        yield from (f"{indent}  - {_flow(item)}" for item in value)
    else:
        yield f"{indent}{_flow(key)}: {_flow(value)}"


def _comment(text: str | None, indent: str) -> list[str]:
    if not text:
        return []
    sentence = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
    return textwrap.wrap(
        sentence,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flow(value: Any) -> str:
    """A value in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
