"""The one palette: what each part of a picture or page is coloured. Knows neither pictures nor pages.

A picture names a role, such as ``merge``; whoever draws it looks the role up here.
"""

from __future__ import annotations

from collections.abc import Mapping

_ROLES = {
    "source": "#7d8ea6",
    "base": "#b4bfcc",
    "uniform": "#d9902f",
    "merge": "#5b8fc9",
    "pruned": "#c3ccd6",
    "best": "#1f8a5b",
    "line": "#1f8a5b",
    "cold": "#f3f6f9",  # the low end of a heat map
    "warm": "#0b5d8f",  # the high end
}

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "ink": "#1c2733",
    "quiet": "#5f6c7b",
    "rule": "#e1e6ec",
    "panel": "#f6f8fa",
    **_ROLES,
}
"""Role to colour on a light ground, and wherever the ground is unknown."""

DARK: Mapping[str, str] = {
    "ground": "#12171d",
    "ink": "#e6ebf1",
    "quiet": "#96a3b3",
    "rule": "#2b343f",
    "panel": "#1a2129",
    "source": "#8fa1ba",
    "base": "#5c6877",
    "uniform": "#e6a751",
    "merge": "#6ea3dd",
    "pruned": "#46525f",
    "best": "#3fbf86",
    "line": "#3fbf86",
    "cold": "#1d2630",
    "warm": "#58b4ee",
}
"""The same roles on a dark ground."""

PAPER: Mapping[str, str] = {
    "ground": "#ffffff",
    "ink": "#000000",
    "quiet": "#444444",
    "rule": "#cccccc",
    "panel": "#ffffff",
    **_ROLES,
}
"""The same roles in print."""

NEUTRAL = "#808080"
"""For what must be seen on a light and on a dark ground."""


def css() -> str:
    """The palette as CSS variables, ``var(--merge)``, which follow the reader's system and the medium."""
    return (
        f"{_root(LIGHT)}\n@media (prefers-color-scheme: dark) {{ {_root(DARK)} }}\n@media print {{ {_root(PAPER)} }}\n"
    )


def _root(colours: Mapping[str, str]) -> str:
    return f":root {{ {' '.join(f'--{role}: {colour};' for role, colour in colours.items())} }}"
