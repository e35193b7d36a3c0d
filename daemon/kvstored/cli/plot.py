"""A line chart as SVG text: x on a logarithmic axis, y from 0. No plotting library for six lines."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import log

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 60, 190, 20, 50
COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
"""Paul Tol's bright palette: told apart by the colour-blind as well."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line. points: (x > 0, y >= 0), in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def _percent(value: float) -> str:
    return f"{value:.0%}"


def stacked(charts: Sequence[str]) -> str:
    """Charts one below the other, as one SVG document."""
    inner = "".join(
        f'<svg y="{HEIGHT * i}" ' + one.removeprefix('<svg xmlns="http://www.w3.org/2000/svg" ')
        for i, one in enumerate(charts)
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT * len(charts)}">\n{inner}</svg>\n'


def chart(lines: Iterable[Line], x_label: str, y_label: str, y_text: Callable[[float], str] = _percent) -> str:
    """The chart as an SVG document. y_text: what stands beside the y axis."""
    drawn = list(lines)
    xs = sorted({x for line in drawn for x, _ in line.points})
    top = max((y for line in drawn for _, y in line.points), default=0) or 1.0
    low, high = log(xs[0]), log(xs[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (log(x) - low) / (high - low) if high > low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    size = f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>']
    for step in range(6):
        left, y = at(xs[0], top * step / 5)
        parts.append(f'<path d="M{left:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(y_text(top * step / 5))}</text>'
        )
    for value in xs:
        x, y = at(value, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{value:.4g}</text>')
    for i, line in enumerate(drawn):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 16 * (i + 1)
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{y}" fill="{colour}">{escape(line.name)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">{escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 6}">{escape(y_label)}</text></svg>')
    return "\n".join(parts) + "\n"
