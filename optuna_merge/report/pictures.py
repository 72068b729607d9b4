"""A picture as plain data: a chart, bars or a heat map.

Knows neither studies nor how a picture is drawn: ``svg.py`` and ``plotly.py`` draw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["source", "base", "uniform", "merge", "pruned", "best", "line"]
"""What something stands for; it decides the colour (``palette.py``)."""


@dataclass(frozen=True)
class Series:
    """Points or a line of a chart.

    Attributes:
        name: Its name in the legend.
        role: Its role, which decides its colour.
        x: One value for each point.
        y: One value for each point.
        labels: What is said about each point; empty for nothing.
        is_line: Join the points instead of marking them.
        is_step: Join them by steps.
    """

    name: str
    role: Role
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] = ()
    is_line: bool = False
    is_step: bool = False


@dataclass(frozen=True)
class Chart:
    """Series over two axes; ``levels`` are horizontal lines: a name, a role and a height each."""

    key: str
    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    levels: Sequence[tuple[str, Role, float]] = ()


@dataclass(frozen=True)
class Bars:
    """Horizontal bars; ``rows`` has a name, a role, a length and a standard error (None if unknown) each."""

    key: str
    title: str
    x_title: str
    rows: Sequence[tuple[str, Role, float, float | None]]


@dataclass(frozen=True)
class HeatMap:
    """Values in rows and columns, None where there is none; the colours go from ``low`` to ``high``."""

    key: str
    title: str
    x_title: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    low: float
    high: float


Picture = Chart | Bars | HeatMap
