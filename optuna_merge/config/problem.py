"""One problem of a study file, and the line that says so.

Knows how a problem is written and where in the file its key stands; does not know any rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A value that breaks a rule.

    Attributes:
        key: Where in the file, such as ``tasks[0].weight``.
        rule: What must hold, such as ``be at least 1``.
        got: What the file says instead.
        fix: What to do about it.
    """

    key: str
    rule: str
    got: str
    fix: str

    @property
    def text(self) -> str:
        """The problem as one sentence."""
        return f"{self.key} must {self.rule}, got {self.got}; {self.fix}"

    def located(self, path: Path, lines: Mapping[str, int]) -> str:
        """The text after the file's name and line; for a missing key, the line of the section that lacks it.

        Args:
            path: The study file.
            lines: Key to line number; 0: the key does not come from the file.
        """
        key = self.key
        while key and key not in lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return f"{path}:{lines[key]}: {self.text}" if lines.get(key) else f"{path}: {self.text}"


def join_key(outer: str, part: int | str) -> str:
    """The key of one part of a section or list, such as ``tasks[0]`` or ``study.seed``."""
    if isinstance(part, int):
        return f"{outer}[{part}]"
    return f"{outer}.{part}" if outer else part


def short(value: Any) -> str:
    """A value for a message, cut to 80 characters."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
