"""Draws a picture as SVG, for a page without scripts or network. Knows nothing of studies.

Colours are the CSS variables of ``palette.py``, so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from optuna_merge.report.pictures import Bars, Chart, HeatMap, Picture, Role, Series

STYLE = """
svg { width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--ink); } svg .quiet { fill: var(--quiet); } svg .rule { stroke: var(--rule); }
"""
"""CSS that the page of a drawing needs, beside the palette."""

_WIDTH = 760
_CHARACTER = 6.6
"""Mean width of a character at 12 px, rounded up."""
_QUIET = ' class="quiet"'


def draw(picture: Picture) -> str:
    """The picture as an ``<svg>`` element, without its title."""
    if isinstance(picture, HeatMap):
        return _draw_heat_map(picture)
    return _draw_bars(picture) if isinstance(picture, Bars) else _draw_chart(picture)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">'
    )
    return "\n".join([head, *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _draw_bars(bars: Bars) -> str:
    row_height, top = 28, 6
    left = min(300, max(len(name) for name, *_ in bars.rows) * _CHARACTER + 16)
    ends = [value + (error or 0) for _, _, value, error in bars.rows]
    low = min(0.0, *(value for _, _, value, _ in bars.rows), 0.0)
    scale = (_WIDTH - left - 130) / ((max(0.0, *ends) - low) or 1)
    zero = left - low * scale
    parts = []
    for index, (name, role, value, error) in enumerate(bars.rows):
        y = top + row_height * index
        bold = ' font-weight="600"' if role == "best" else ""
        start, length = zero + min(0.0, value) * scale, abs(value) * scale
        end = zero + value * scale
        parts.append(_text(left - 10, y + 15, name, "end", bold))
        parts.append(
            f'<rect x="{start:.1f}" y="{y + 1}" width="{length:.1f}" height="20" rx="2" fill="var(--{role})"/>'
        )
        shown = f"{value:.4f}"
        if error is not None:
            parts.append(
                f'<path d="M{end - error * scale:.1f} {y + 11}h{2 * error * scale:.1f}" stroke="var(--ink)"'
                ' stroke-width="1.5"/>'
            )
            shown += f" ± {error:.4f}"
        parts.append(_text(max(end, zero) + (error or 0) * scale + 8, y + 15, shown, more=bold))
    return _svg(top + row_height * len(bars.rows), bars.title, parts)


def _draw_heat_map(heat: HeatMap) -> str:
    left = min(260, max(len(row) for row in heat.rows) * _CHARACTER + 14)
    width = min(92.0, (_WIDTH - left - 10) / len(heat.columns))
    height = 24 if len(heat.rows) <= 40 else 14
    longest = max(len(column) for column in heat.columns)
    slanted = width < longest * _CHARACTER + 4
    top = 14 + (min(12, longest) * 5 if slanted else 8)
    bottom = top + height * len(heat.rows)
    parts = [*_column_names(heat, left, top, width, slanted=slanted)]
    for index, name in enumerate(heat.rows):
        y = top + height * index
        parts.append(_text(left - 8, y + height / 2 + 4, name, "end", "" if height > 14 else ' font-size="10"'))
        parts += _cells(heat, index, left, y, width, height)
    parts += _colour_key(heat, left, bottom)
    parts.append(_text(_WIDTH - 10, bottom + 18, heat.x_title, "end", _QUIET))
    return _svg(bottom + 26, heat.title, parts)


def _column_names(heat: HeatMap, left: float, top: float, width: float, *, slanted: bool) -> list[str]:
    """Every name, or every n-th one where columns are narrow."""
    every = max(1, math.ceil(16 / width))
    parts = []
    for index in range(0, len(heat.columns), every):
        x, name = left + width * (index + 0.5), heat.columns[index]
        if slanted:
            parts.append(_text(x, top - 6, name[:24], "start", f' transform="rotate(-40 {x:.1f} {top - 6:.1f})"'))
        else:
            parts.append(_text(x, top - 6, name, "middle"))
    return parts


def _cells(heat: HeatMap, row: int, left: float, y: int, width: float, height: int) -> list[str]:
    """The cells of one row, each with its value where there is room for it."""
    parts = []
    for index, (column, value) in enumerate(zip(heat.columns, heat.values[row], strict=True)):
        if value is None:
            continue
        share = min(1.0, max(0.0, (value - heat.low) / ((heat.high - heat.low) or 1)))
        x = left + width * index
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{height - 1}" fill="{_blend(share)}">'
            f"<title>{escape(heat.rows[row])}, {escape(column)}: {value:.4f}</title></rect>"
        )
        if width >= 40 and height >= 20:
            colour = ' style="fill: var(--ground)"' if share > 0.55 else ""
            parts.append(_text(x + width / 2, y + height / 2 + 4, f"{value:.2f}", "middle", colour))
    return parts


def _colour_key(heat: HeatMap, left: float, bottom: float) -> list[str]:
    n_steps = 24
    steps = [
        f'<rect x="{left + 6 * step:.1f}" y="{bottom + 8}" width="6" height="12"'
        f' fill="{_blend(step / (n_steps - 1))}"/>'
        for step in range(n_steps)
    ]
    return [
        _text(left, bottom + 18, f"{heat.low:g}", "end", f'{_QUIET} dx="-6"'),
        *steps,
        _text(left + 150, bottom + 18, f"{heat.high:g}", more=_QUIET),
    ]


def _blend(share: float) -> str:
    """The colour of a heat map's value, at a share in [0, 1] of the way from its lowest to its highest."""
    return f"color-mix(in oklab, var(--warm) {100 * share:.0f}%, var(--cold))"


class _Plot:
    """The rectangle between a chart's axes, and where a point lies in it."""

    left, top, height = 62, 12, 300
    right = _WIDTH - 16
    width, bottom = right - left, top + height

    def __init__(self, chart: Chart) -> None:
        xs = [x for series in chart.series for x in series.x]
        ys = [y for series in chart.series for y in series.y] + [y for *_, y in chart.levels]
        self.x_ticks, self.y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
        self._x, self._y = _padded(self.x_ticks, xs), _padded(self.y_ticks, ys)

    def x(self, value: float) -> float:
        low, high = self._x
        return self.left + (value - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        low, high = self._y
        return self.top + (high - value) / (high - low) * self.height


def _draw_chart(chart: Chart) -> str:
    plot = _Plot(chart)
    parts = [*_grid(plot)]
    for name, role, value in chart.levels:
        parts += _level(plot, name, role, value)
    for series in chart.series:
        parts += [_line(plot, series)] if series.is_line else _points(plot, series)
    parts += [*_axes(plot, chart), *_legend(plot, chart)]
    return _svg(plot.bottom + 66, chart.title, parts)


def _grid(plot: _Plot) -> list[str]:
    parts = []
    for tick in plot.y_ticks:
        y = plot.y(tick)
        parts.append(f'<path class="rule" d="M{plot.left} {y:.1f}h{plot.width}"/>')
        parts.append(_text(plot.left - 8, y + 4, f"{tick:g}", "end", _QUIET))
    for tick in plot.x_ticks:
        number = f"{tick:,g}" if abs(tick) < 1e6 else f"{tick:.3g}"
        parts.append(_text(plot.x(tick), plot.bottom + 18, number, "middle", _QUIET))
    return parts


def _level(plot: _Plot, name: str, role: Role, value: float) -> list[str]:
    y = plot.y(value)
    beside = y + 15 if y + 20 < plot.bottom else y - 6
    return [
        f'<path d="M{plot.left} {y:.1f}h{plot.width}" stroke="var(--{role})" stroke-width="1.5"'
        ' stroke-dasharray="6 4"/>',
        _text(plot.right - 4, beside, f"{name} {value:.4f}", "end", f' style="fill: var(--{role})"'),
    ]


def _line(plot: _Plot, series: Series) -> str:
    (x0, y0), *rest = [(plot.x(x), plot.y(y)) for x, y in zip(series.x, series.y, strict=True)]
    path = f"M{x0:.1f} {y0:.1f}"
    path += "".join(f"H{x:.1f}V{y:.1f}" if series.is_step else f"L{x:.1f} {y:.1f}" for x, y in rest)
    return f'<path d="{path}" fill="none" stroke="var(--{series.role})" stroke-width="2"/>'


def _points(plot: _Plot, series: Series) -> list[str]:
    radius = 6 if series.role == "best" else 4
    labels = series.labels or [""] * len(series.x)
    return [
        f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="{radius}" fill="var(--{series.role})"'
        ' stroke="var(--ground)" stroke-width="0.8">'
        f"<title>{escape(label)}: {x:.4g}, {y:.4f}</title></circle>"
        for x, y, label in zip(series.x, series.y, labels, strict=True)
    ]


def _axes(plot: _Plot, chart: Chart) -> list[str]:
    middle = plot.top + plot.height / 2
    return [
        f'<path d="M{plot.left} {plot.bottom}h{plot.width}" stroke="var(--quiet)"/>',
        _text(plot.left + plot.width / 2, plot.bottom + 36, chart.x_title, "middle"),
        _text(14, middle, chart.y_title, "middle", f' transform="rotate(-90 14 {middle:.0f})"'),
    ]


def _legend(plot: _Plot, chart: Chart) -> list[str]:
    parts = []
    x = float(plot.left)
    for series in chart.series:
        fill = f'fill="var(--{series.role})"'
        if series.is_line:
            parts.append(f'<rect x="{x:.1f}" y="{plot.bottom + 50}" width="12" height="4" {fill}/>')
        else:
            parts.append(f'<circle cx="{x + 6:.1f}" cy="{plot.bottom + 52}" r="4" {fill}/>')
        parts.append(_text(x + 18, plot.bottom + 56, series.name))
        x += 36 + len(series.name) * _CHARACTER
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], at most nine of them; ``low`` alone if there is none."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] or [low]


def _padded(ticks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: all ticks and values, and 4 % on either side."""
    low, high = min(*values, *ticks), max(*values, *ticks)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin
