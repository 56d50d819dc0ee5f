"""Charts as inline SVG that take their colours from the page, so that they read in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 280, 48, 36, 28, 12
MOST_LAYERS, MOST_DRAWS = 200, 250
"""Rows and columns of a heat map that can still be told apart; a file that names more must not blow up the page."""


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
        label: Its name in the legend.
        points: x, y, and optionally the ends of the interval of y.
        basis: What makes it comparable: judge and prompts. Series of another basis are not drawn beside it.
        notes: What to say of each point besides its numbers; empty for nothing.
    """

    label: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    basis: str
    notes: Sequence[str] = ()


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, y_max: float | None = None) -> str:
    """Lines with shaded intervals; says in words which series it left out because they are not comparable."""
    filled = [s for s in series if s.points]
    if not filled:
        return ""
    drawn = [s for s in filled if s.basis == filled[0].basis]
    left_out = [s.label for s in filled if s.basis != filled[0].basis]
    xs = [point[0] for s in drawn for point in s.points]
    ys = [y for s in drawn for point in s.points for y in (point[1], point[3]) if y is not None]
    x_low, x_high, y_high = min(xs), max(xs), y_max or max(ys) or 1.0

    def place(x: float, y: float) -> str:
        span = (x_high - x_low) or 1.0
        return (
            f"{LEFT + (x - x_low) / span * (WIDTH - LEFT - RIGHT):.1f},"
            f"{TOP + (1 - min(y, y_high) / y_high) * (HEIGHT - TOP - BOTTOM):.1f}"
        )

    parts = [_axes(x_low, x_high, y_high, x_label, y_label)]
    for number, s in enumerate(drawn):
        banded = [p for p in s.points if p[2] is not None and p[3] is not None]
        if banded:
            upper = [place(p[0], p[3] or 0) for p in banded]
            lower = [place(p[0], p[2] or 0) for p in reversed(banded)]
            parts.append(f'<polygon class="band s{number % 6}" points="{" ".join(upper + lower)}"/>')
        path = " ".join(place(p[0], p[1]) for p in s.points)
        parts.append(f'<polyline class="line {_style(number)}" points="{path}"/>')
        for index, p in enumerate(s.points):
            x, y = place(p[0], p[1]).split(",")
            title = escape(f"{s.label}: {p[1]:.1f} at {p[0]:g}{f', {s.notes[index]}' if s.notes else ''}")
            parts.append(f'<circle class="dot s{number % 6}" cx="{x}" cy="{y}" r="3"><title>{title}</title></circle>')
    legend = "".join(f'<span class="key {_style(number)}">{escape(s.label)}</span> ' for number, s in enumerate(drawn))
    note = f"<p>Not comparable, so not drawn: {escape(', '.join(left_out))}.</p>" if left_out else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{legend}</figcaption></figure>{note}"


def bar_chart(bars: Mapping[str, Sequence[float]], *, series: Sequence[str]) -> str:
    """A group of horizontal bars for each label, one bar for each of `series`, with its value at its end.

    A mark runs through the bars at 1.
    """
    thickness, gap, left, right = 14, 12, 130, 60
    longest = max((value for values in bars.values() for value in values), default=1.0) or 1.0
    scale = (WIDTH - left - right) / longest
    parts, y = [], TOP
    for label, values in bars.items():
        middle = y + thickness * len(values) / 2 + 4
        parts.append(f'<text x="{left - 6}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for number, value in enumerate(values):
            width = value * scale
            parts.append(
                f'<rect class="dot s{number}" x="{left}" y="{y}" width="{width:.1f}" height="{thickness}"/>'
                f'<text x="{left + width + 4:.1f}" y="{y + thickness - 3}">{value:.2f}</text>'
            )
            y += thickness
        y += gap
    parts.append(f'<line class="grid" x1="{left + scale:.1f}" x2="{left + scale:.1f}" y1="{TOP}" y2="{y}"/>')
    legend = "".join(f'<span class="key s{number}">{escape(name)}</span> ' for number, name in enumerate(series))
    svg = f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(", ".join(series))}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{legend}</figcaption></figure>"


def _style(number: int) -> str:
    """Classes of a line's colour; from the seventh line on the colours come again, dashed."""
    return f"s{number % 6} dashed" if number >= 6 else f"s{number}"


def heat_map(draws: Sequence[Mapping[str, Any]], probes: Sequence[Mapping[str, Any]]) -> str:
    """Which layers were drawn when: one column per draw, one row per layer, the first layer at the bottom.

    Says so where it shows only the lowest layers or only every n-th draw.
    """
    if not draws:
        return ""
    asked = len(probes[0]["scores"]) if probes else 1 + max((max(d["layers"], default=0) for d in draws), default=0)
    num_layers, stride = min(asked, MOST_LAYERS), -(-len(draws) // MOST_DRAWS)
    shown = draws[::stride]
    parts = [
        f'<rect class="off" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/>',
        *(cell for column, draw in enumerate(shown) for cell in _cells(draw, column, len(shown), num_layers)),
    ]
    bottom = HEIGHT - BOTTOM
    labels = (
        f'<text x="{LEFT - 6}" y="{bottom - 4}" text-anchor="end">0</text>'
        f'<text x="{LEFT - 6}" y="{TOP + 12}" text-anchor="end">{num_layers - 1}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 14}">step {escape(str(shown[0]["step"]))}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 14}" text-anchor="end">step {escape(str(shown[-1]["step"]))}</text>'
    )
    notes = f"; layers from {num_layers} on are left out" if asked > num_layers else ""
    notes += f"; one draw in {stride} is shown" if stride > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="layers drawn">{"".join(parts)}{labels}</svg>'
    return f"<figure>{svg}<figcaption>layers, the first at the bottom; filled where drawn{notes}</figcaption></figure>"


def _cells(draw: Mapping[str, Any], column: int, num_columns: int, num_layers: int) -> Iterator[str]:
    width, height = (WIDTH - LEFT - RIGHT) / num_columns, (HEIGHT - TOP - BOTTOM) / num_layers
    for layer in sorted({layer for layer in draw["layers"] if 0 <= layer < num_layers}):
        x, y = LEFT + column * width, TOP + (num_layers - 1 - layer) * height
        title = f"<title>step {escape(str(draw['step']))}, layer {layer}</title>"
        yield f'<rect class="on" x="{x:.1f}" y="{y:.1f}" width="{width:.2f}" height="{height:.2f}">{title}</rect>'


def _axes(x_low: float, x_high: float, y_high: float, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    rows = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in ticks(0, y_high)
        for y in [TOP + (1 - value / y_high) * (bottom - TOP)]
    )
    columns = "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{value:g}</text>'
        for value in ticks(x_low, x_high)
        for x in [LEFT + (value - x_low) / ((x_high - x_low) or 1.0) * (right - LEFT)]
    )
    return (
        f'{rows}{columns}<text x="{(LEFT + right) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="{LEFT - 40}" y="{TOP - 10}">{escape(y_label)}</text>'
    )


def ticks(low: float, high: float) -> list[float]:
    """At most seven round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if (high - low) / step <= 6 + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]
