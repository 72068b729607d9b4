"""Pictures as SVG, for a page that needs no script and no network. Knows nothing of studies.

Colours are CSS variables of the page (``STYLE``), so that one drawing serves light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from optuna_merge.report.pictures import Bars, Chart, HeatMap, Picture

STYLE = """
:root { --ground: #ffffff; --ink: #1c2733; --quiet: #5f6c7b; --rule: #e1e6ec; --panel: #f6f8fa;
  --source: #7d8ea6; --base: #b4bfcc; --uniform: #d9902f; --merge: #5b8fc9; --pruned: #c3ccd6; --best: #1f8a5b;
  --line: #1f8a5b; --cold: #f3f6f9; --warm: #0b5d8f; }
@media (prefers-color-scheme: dark) { :root { --ground: #12171d; --ink: #e6ebf1; --quiet: #96a3b3; --rule: #2b343f;
  --panel: #1a2129; --source: #8fa1ba; --base: #5c6877; --uniform: #e6a751; --merge: #6ea3dd; --pruned: #46525f;
  --best: #3fbf86; --line: #3fbf86; --cold: #1d2630; --warm: #58b4ee; } }
@media print { :root { --ground: #ffffff; --ink: #000000; --quiet: #444444; --rule: #cccccc; --panel: #ffffff;
  --source: #7d8ea6; --base: #b4bfcc; --uniform: #d9902f; --merge: #5b8fc9; --pruned: #c3ccd6; --best: #1f8a5b;
  --line: #1f8a5b; --cold: #f3f6f9; --warm: #0b5d8f; } }
svg { width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--ink); } svg .quiet { fill: var(--quiet); } svg .rule { stroke: var(--rule); }
"""

_WIDTH = 760
_CHARACTER = 6.6
"""Mean width of a character at 12 px, on the safe side."""


def draw(picture: Picture) -> str:
    """The picture as an ``<svg>`` element; its title is not part of it."""
    if isinstance(picture, HeatMap):
        return _heat_map(picture)
    return _bars(picture) if isinstance(picture, Bars) else _chart(picture)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    name = escape(title, quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">'
    )
    return "\n".join([head, *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _bars(bars: Bars) -> str:
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


def _heat_map(heat: HeatMap) -> str:
    left = min(260, max(len(row) for row in heat.rows) * _CHARACTER + 14)
    width = min(92.0, (_WIDTH - left - 10) / len(heat.columns))
    height = 24 if len(heat.rows) <= 40 else 14
    with_values = width >= 40 and height >= 20
    slanted = width < max(len(column) for column in heat.columns) * _CHARACTER + 4
    top = 14 + (min(12, max(len(column) for column in heat.columns)) * 5 if slanted else 8)
    every = max(1, math.ceil(16 / width))
    parts = []
    for index, column in enumerate(heat.columns):
        x = left + width * (index + 0.5)
        if index % every == 0:
            if slanted:
                parts.append(_text(x, top - 6, column[:24], "start", f' transform="rotate(-40 {x:.1f} {top - 6:.1f})"'))
            else:
                parts.append(_text(x, top - 6, column, "middle"))
    for row, (name, values) in enumerate(zip(heat.rows, heat.values, strict=True)):
        y = top + height * row
        parts.append(_text(left - 8, y + height / 2 + 4, name, "end", "" if height > 14 else ' font-size="10"'))
        for index, value in enumerate(values):
            if value is None:
                continue
            share = (value - heat.low) / ((heat.high - heat.low) or 1)
            share = min(1.0, max(0.0, share))
            x = left + width * index
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{height - 1}"'
                f' fill="color-mix(in oklab, var(--warm) {100 * share:.0f}%, var(--cold))">'
                f"<title>{escape(name)}, {escape(heat.columns[index])}: {value:.4f}</title></rect>"
            )
            if with_values:
                colour = ' style="fill: var(--ground)"' if share > 0.55 else ""
                parts.append(_text(x + width / 2, y + height / 2 + 4, f"{value:.2f}", "middle", colour))
    bottom = top + height * len(heat.rows)
    parts.append(_text(left, bottom + 18, f"{heat.low:g}", "end", ' class="quiet" dx="-6"'))
    for step in range(24):
        parts.append(
            f'<rect x="{left + 6 * step:.1f}" y="{bottom + 8}" width="6" height="12"'
            f' fill="color-mix(in oklab, var(--warm) {100 * step / 23:.0f}%, var(--cold))"/>'
        )
    parts.append(_text(left + 150, bottom + 18, f"{heat.high:g}", more=' class="quiet"'))
    parts.append(_text(_WIDTH - 10, bottom + 18, heat.x_title, "end", ' class="quiet"'))
    return _svg(bottom + 26, heat.title, parts)


def _chart(chart: Chart) -> str:
    left, right, top, plot_height = 62, 16, 12, 300
    plot_width = _WIDTH - left - right
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for y in series.y] + [y for *_, y in chart.levels]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    (x0, x1), (y0, y1) = (_padded(x_ticks, xs), _padded(y_ticks, ys))

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * plot_width, top + (y1 - y) / (y1 - y0) * plot_height

    bottom = top + plot_height
    parts = []
    for tick in y_ticks:
        _, y = at(x0, tick)
        parts.append(f'<path class="rule" d="M{left} {y:.1f}h{plot_width}"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:g}", "end", ' class="quiet"'))
    for tick in x_ticks:
        x, _ = at(tick, y0)
        parts.append(
            _text(x, bottom + 18, f"{tick:,g}" if abs(tick) < 1e6 else f"{tick:.3g}", "middle", ' class="quiet"')
        )
    for name, role, value in chart.levels:
        _, y = at(x0, value)
        parts.append(
            f'<path d="M{left} {y:.1f}h{plot_width}" stroke="var(--{role})" stroke-width="1.5" stroke-dasharray="6 4"/>'
        )
        below = y + 15 if y + 20 < bottom else y - 6
        parts.append(_text(_WIDTH - right - 4, below, f"{name} {value:.4f}", "end", f' style="fill: var(--{role})"'))
    for series in chart.series:
        places = [at(x, y) for x, y in zip(series.x, series.y, strict=True)]
        if series.is_line:
            path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
            path += "".join(f"H{x:.1f}V{y:.1f}" if series.is_step else f"L{x:.1f} {y:.1f}" for x, y in places[1:])
            parts.append(f'<path d="{path}" fill="none" stroke="var(--{series.role})" stroke-width="2"/>')
        else:
            radius = 6 if series.role == "best" else 4
            labels = series.labels or [""] * len(places)
            for (x, y), label, value_x, value_y in zip(places, labels, series.x, series.y, strict=True):
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="var(--{series.role})"'
                    ' stroke="var(--ground)" stroke-width="0.8">'
                    f"<title>{escape(label)}: {value_x:.4g}, {value_y:.4f}</title></circle>"
                )
    parts.append(f'<path d="M{left} {bottom}h{plot_width}" stroke="var(--quiet)"/>')
    parts.append(_text(left + plot_width / 2, bottom + 36, chart.x_title, "middle"))
    middle = top + plot_height / 2
    parts.append(_text(14, middle, chart.y_title, "middle", f' transform="rotate(-90 14 {middle:.0f})"'))
    x = float(left)
    for series in chart.series:
        mark = f'<rect x="{x:.1f}" y="{bottom + 50}" width="12" height="4" y2="0" fill="var(--{series.role})"/>'
        if not series.is_line:
            mark = f'<circle cx="{x + 6:.1f}" cy="{bottom + 52}" r="4" fill="var(--{series.role})"/>'
        parts += [mark.replace(' y2="0"', ""), _text(x + 18, bottom + 56, series.name)]
        x += 36 + len(series.name) * _CHARACTER
    return _svg(bottom + 66, chart.title, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high`` or a little less, five to nine of them."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)] or [low]


def _padded(ticks: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    low, high = min(*values, *ticks), max(*values, *ticks)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin
