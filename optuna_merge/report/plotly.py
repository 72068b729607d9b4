"""Draws a picture as the JSON of a Plotly figure, without the package plotly. Knows nothing of studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optuna_merge.report.palette import LIGHT, NEUTRAL
from optuna_merge.report.pictures import Bars, Chart, HeatMap, Picture, Series


def plotly(picture: Picture) -> dict[str, Any]:
    """A picture as Plotly's data and layout, without a template, so that the dashboard's theme applies."""
    if isinstance(picture, HeatMap):
        data, layout = _heat_map(picture)
    elif isinstance(picture, Bars):
        data, layout = _bars(picture)
    else:
        data, layout = _chart(picture)
    common = {
        "title": {"text": picture.title, "x": 0.02, "font": {"size": 14}},
        "margin": {"l": 80, "r": 20, "t": 60, "b": 60},
    }
    return {"data": data, "layout": common | layout}


_Drawn = tuple[list[dict[str, Any]], dict[str, Any]]
"""Data and layout."""


def _heat_map(heat: HeatMap) -> _Drawn:
    data = {
        "type": "heatmap",
        "x": list(heat.columns),
        "y": list(heat.rows),
        "z": [[None if value is None else round(value, 4) for value in row] for row in heat.values],
        "zmin": heat.low,
        "zmax": heat.high,
        "colorscale": [[0, LIGHT["cold"]], [1, LIGHT["warm"]]],
    }
    if len(heat.columns) <= 12 and len(heat.rows) <= 30:
        data["texttemplate"] = "%{z:.2f}"
    layout = {
        "xaxis": {"title": {"text": heat.x_title}, "type": "category"},
        "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
    }
    return [data], layout


def _bars(bars: Bars) -> _Drawn:
    names, roles, values, errors = zip(*bars.rows, strict=True)
    data = {
        "type": "bar",
        "orientation": "h",
        "y": list(names),
        "x": [round(value, 5) for value in values],
        "marker": {"color": [LIGHT[role] for role in roles]},
        "error_x": {"type": "data", "array": [round(error or 0, 5) for error in errors], "color": NEUTRAL},
    }
    layout = {
        "xaxis": {"title": {"text": bars.x_title}},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    return [data], layout


def _chart(chart: Chart) -> _Drawn:
    layout = {"xaxis": {"title": {"text": chart.x_title}}, "yaxis": {"title": {"text": chart.y_title}}}
    return [_trace(series) for series in chart.series], layout | _levels(chart)


def _trace(series: Series) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.name,
        "x": [round(x, 5) for x in series.x],
        "y": [round(y, 5) for y in series.y],
        "mode": "lines" if series.is_line else "markers",
    }
    if series.is_line:
        trace["line"] = {"color": LIGHT[series.role], "width": 2, "shape": "hv" if series.is_step else "linear"}
    else:
        size = 13 if series.role == "best" else 8
        trace |= {"marker": {"color": LIGHT[series.role], "size": size}, "text": list(series.labels)}
    return trace


def _levels(chart: Chart) -> dict[str, Any]:
    lines: Sequence[dict[str, Any]] = [
        {
            "type": "line",
            "xref": "paper",
            "x0": 0,
            "x1": 1,
            "y0": round(value, 5),
            "y1": round(value, 5),
            "line": {"color": LIGHT[role], "dash": "dash", "width": 1.5},
        }
        for _, role, value in chart.levels
    ]
    words = [
        {
            "xref": "paper",
            "x": 1,
            "y": round(value, 5),
            "text": f"{name} {value:.4f}",
            "showarrow": False,
            "yanchor": "top",
            "xanchor": "right",
            "font": {"color": LIGHT[role]},
        }
        for name, role, value in chart.levels
    ]
    return {"shapes": lines, "annotations": words}
