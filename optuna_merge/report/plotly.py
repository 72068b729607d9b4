"""Pictures as Plotly figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna_merge.report.pictures import Bars, Chart, HeatMap, Picture, Role, Series

_COLOURS: dict[Role, str] = {
    "source": "#7d8ea6",
    "base": "#a3b0bf",
    "uniform": "#d9902f",
    "merge": "#5b8fc9",
    "pruned": "#b3bcc7",
    "best": "#1f8a5b",
    "line": "#1f8a5b",
}


def plotly(picture: Picture) -> dict[str, Any]:
    """A picture as plotly's JSON: data and layout, without a template, so that the dashboard's theme applies."""
    layout: dict[str, Any] = {
        "title": {"text": picture.title, "x": 0.02, "font": {"size": 14}},
        "margin": {"l": 80, "r": 20, "t": 60, "b": 60},
    }
    if isinstance(picture, HeatMap):
        layout |= {
            "xaxis": {"title": {"text": picture.x_title}, "type": "category"},
            "yaxis": {"autorange": "reversed", "type": "category", "automargin": True},
        }
        heat = {
            "type": "heatmap",
            "x": list(picture.columns),
            "y": list(picture.rows),
            "z": [[None if value is None else round(value, 4) for value in row] for row in picture.values],
            "zmin": picture.low,
            "zmax": picture.high,
            "colorscale": [[0, "#eef3f8"], [1, "#0b5d8f"]],
        }
        if len(picture.columns) <= 12 and len(picture.rows) <= 30:
            heat["texttemplate"] = "%{z:.2f}"
        return {"data": [heat], "layout": layout}
    if isinstance(picture, Bars):
        names, roles, values, errors = zip(*picture.rows, strict=True)
        layout |= {
            "xaxis": {"title": {"text": picture.x_title}},
            "yaxis": {"autorange": "reversed", "automargin": True},
        }
        bars = {
            "type": "bar",
            "orientation": "h",
            "y": list(names),
            "x": [round(value, 5) for value in values],
            "marker": {"color": [_COLOURS[role] for role in roles]},
            "error_x": {"type": "data", "array": [round(error or 0, 5) for error in errors], "color": "#808080"},
        }
        return {"data": [bars], "layout": layout}
    layout |= {"xaxis": {"title": {"text": picture.x_title}}, "yaxis": {"title": {"text": picture.y_title}}}
    layout |= _levels(picture)
    return {"data": [_trace(series) for series in picture.series], "layout": layout}


class _Figure:
    """What ``save_plotly_graph_object`` asks of a figure: its JSON. plotly itself is not needed."""

    def __init__(self, figure: Mapping[str, Any]) -> None:
        self._json = json.dumps(figure, separators=(",", ":"), allow_nan=False)

    def to_json(self) -> str:
        return self._json


def _trace(series: Series) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": series.name,
        "x": [round(x, 5) for x in series.x],
        "y": [round(y, 5) for y in series.y],
        "mode": "lines" if series.is_line else "markers",
    }
    if series.is_line:
        trace["line"] = {"color": _COLOURS[series.role], "width": 2, "shape": "hv" if series.is_step else "linear"}
    else:
        size = 13 if series.role == "best" else 8
        trace |= {"marker": {"color": _COLOURS[series.role], "size": size}, "text": list(series.labels)}
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
            "line": {"color": _COLOURS[role], "dash": "dash", "width": 1.5},
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
            "font": {"color": _COLOURS[role]},
        }
        for name, role, value in chart.levels
    ]
    return {"shapes": lines, "annotations": words}
