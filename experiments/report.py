"""What is printed of a run: table, JSON lines, Markdown, a plot, and advice for a budget. Nothing is measured here."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from experiments import Found

COLUMNS = (
    "ROW", "STRATEGY", "B/TOKEN", "LESS", "HELD AS", "RESTORE/PREFILL", "MS/TOKEN", "KL", "PPL", "TOP-1", "RETRIEVAL",
    "SAME", "",
)  # fmt: skip
"""LESS: times less than the baseline. MS/TOKEN: times the baseline's, in the same process. SAME: logits bit-equal."""
WORSE = "worse than nothing"
COLOURS = {
    "control": "#000", "attention": "#06c", "eviction": "#093", "quantization": "#c33", "depth": "#939",
    "rank": "#c60", "scheduling": "#666", "smoothing": "#960", "recurrent": "#0aa", "prompt": "#c09", "engine": "#555",
    "roadmap": "#33c",
}  # fmt: skip
KL_LEAST = 1e-6
"""Below it a point is drawn at the foot of the plot: exact, on a logarithmic axis."""


WIDTH = 860
LETTER_WIDTH = 6.4
"""Of a name in the plot, in its font: a little wide."""


def cells(rows: Sequence[Found]) -> list[tuple[str, ...]]:
    """The table's cells, a tuple for each row."""
    whole = next((r.bytes_per_token for r in rows if r.name == "baseline"), None)
    return [_cells(row, whole) for row in rows]


def _cells(row: Found, whole: float | None) -> tuple[str, ...]:
    less = (
        f"{whole / row.bytes_per_token:.1f}x" if whole and row.bytes_per_token and row.category != "recurrent" else "-"
    )
    remark = f"failed: {row.failed}" if row.failed else WORSE if row.worse_than_nothing else ""
    return (
        str(row.row),
        row.name,
        _number(row.bytes_per_token, ",.0f"),
        less,
        row.encoding or "-",
        _number(row.restore_over_prefill, ".3f"),
        _number(row.ms_per_token_over_baseline, ".2f", "x"),
        _number(row.kl, ".2g"),
        _number(row.perplexity_change, "+.1f", "%"),
        _number(row.top1, ".0f", "%"),
        _number(row.retrieval, ".0f", "%"),
        "-" if row.bit_equal is None else "yes" if row.bit_equal else "lossy",
        remark,
    )


def _number(x: float | None, form: str, unit: str = "") -> str:
    return "-" if x is None else f"{x:{form}}{unit}"


def notes(rows: Iterable[Found]) -> list[str]:
    """What strategies measured of their own, and where they differ from their source, a line each."""
    lines = [f"{r.name}: {r.note}" for r in rows if r.note]
    return lines + [f"{r.name}: {r.kept}" for r in rows if r.kept != "faithful" and not r.note]


def markdown(rows: Sequence[Found]) -> str:
    """The table for bench/RESULTS.md."""
    lines = [COLUMNS[:-1], tuple("---" for _ in COLUMNS[:-1])]
    lines += [(*c[:-2], f"{c[-2]} ({c[-1]})" if c[-1] else c[-2]) for c in cells(rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def json_line(row: Found) -> str:
    """One JSON object."""
    return json.dumps(row.as_json())


def comparable(rows: Iterable[Found]) -> list[Found]:
    """Rows a user can choose between: with figures, better than nothing, and of the run's own model."""
    return [
        r
        for r in rows
        if r.kl is not None and r.bytes_per_token is not None and not r.failed and not r.worse_than_nothing
        and r.category != "recurrent" and r.bytes_per_token > 0
    ]  # fmt: skip


def front(rows: Iterable[Found]) -> list[Found]:
    """The Pareto front: nothing else has both fewer bytes and less KL. By bytes, the fewest first."""
    best: list[Found] = []
    for row in sorted(comparable(rows), key=lambda r: (r.bytes_per_token or 0.0, r.kl or 0.0)):
        if not best or (row.kl or 0.0) < (best[-1].kl or 0.0):
            best.append(row)
    return best


def advice(rows: Sequence[Found], *, nbytes: float | None = None, kl: float | None = None) -> str:
    """The line a user came for: what to take under so many bytes a token, or within so much KL."""
    fits = [
        r
        for r in front(rows)
        if (nbytes is None or (r.bytes_per_token or 0.0) <= nbytes) and (kl is None or (r.kl or 0.0) <= kl)
    ]
    bounds = (("under {:,.0f} B a token", nbytes), ("within KL {:g}", kl))
    asked = " and ".join(text.format(bound) for text, bound in bounds if bound is not None)
    if not asked:
        listed = ", ".join(map(_priced, fits))
        return f"nothing is better in both bytes and KL: {listed}" if fits else "no row has figures to choose by"
    if not fits:
        return f"{asked}: nothing measured here, of {len(comparable(rows))} strategies"
    # Within a budget of bytes the least KL, within one of KL the fewest bytes.
    pick = fits[0] if nbytes is None else fits[-1]
    return f"{asked}: {_priced(pick)}; nothing else is better in both"


def _priced(row: Found) -> str:
    return f"{row.name}, {row.bytes_per_token:,.0f} B, KL {row.kl:.2g}"


def plot(rows: Sequence[Found], path: Path) -> None:
    """KL over bytes a token, both logarithmic, as an SVG with the Pareto front drawn. Raises OSError."""
    points = [r for r in rows if r.kl is not None and r.bytes_per_token and not r.failed and r.category != "recurrent"]
    nothing = next((r.kl for r in rows if r.name == "no-context"), None)
    path.write_text(_svg(points, front(rows), nothing) + "\n")


@dataclass(frozen=True)
class Axes:
    """Where bytes a token (10**left to 10**right) and KL (10**low to 10**high) lie on the drawing."""

    left: float
    right: float
    low: int
    high: int

    @classmethod
    def around(cls, points: Sequence[Found]) -> "Axes":
        """The axes that hold these points."""
        kls = [max(r.kl or 0.0, KL_LEAST) for r in points] or [KL_LEAST, 1.0]
        sizes = [r.bytes_per_token or 1.0 for r in points] or [1.0, 10.0]
        return cls(
            math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.1,
            math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)) + 0.1),
        )  # fmt: skip

    def x(self, nbytes: float) -> float:
        """Across."""
        return 60 + (math.log10(nbytes) - self.left) / (self.right - self.left) * 700

    def y(self, kl: float) -> float:
        """Down."""
        return 20 + (self.high - math.log10(max(kl, KL_LEAST))) / (self.high - self.low) * 480


def _svg(points: Sequence[Found], best: Sequence[Found], nothing: float | None) -> str:
    axes = Axes.around(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="560" font-family="sans-serif">',
        "<style>text { font-size: 11px }</style>",
        f'<rect width="{WIDTH}" height="560" fill="white"/>',
    ]
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10.0**power)
        name = "0" if 10.0**power <= KL_LEAST else f"1e{power}"
        parts.append(f'<path d="M60 {y:.0f}H760" stroke="#ddd"/><text x="20" y="{y + 4:.0f}">{name}</text>')
    for tick in (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000):
        if axes.left <= math.log10(tick) <= axes.right:
            x = axes.x(tick)
            parts.append(f'<path d="M{x:.0f} 20V500" stroke="#eee"/><text x="{x - 14:.0f}" y="516">{tick:,}</text>')
    parts.append('<text x="300" y="540">bytes a token, held on disk</text><text x="8" y="14">KL, nats</text>')
    if nothing:
        y = axes.y(nothing)
        parts.append(f'<path d="M60 {y:.1f}H760" stroke="#000"/><text x="764" y="{y + 4:.0f}">no context</text>')
    placed = [(row, axes.x(row.bytes_per_token or 1.0), axes.y(row.kl or 0.0)) for row in points]
    if best:
        line = " ".join(f"{axes.x(r.bytes_per_token or 1.0):.1f},{axes.y(r.kl or 0.0):.1f}" for r in best)
        parts.append(f'<polyline points="{line}" fill="none" stroke="#c33" stroke-dasharray="4 3"/>')
    return "\n".join([*parts, *_labelled(placed), "</svg>"])


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def _labelled(placed: Sequence[tuple[Found, float, float]]) -> list[str]:
    """Dots with names; a name is moved until it lies on no other and on no dot, and a line leads to it."""
    parts: list[str] = []
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for _, x, y in placed]
    for row, x, y in sorted(placed, key=lambda p: (p[2], p[1])):
        colour, width = COLOURS[row.category], LETTER_WIDTH * len(row.name)
        left, at = _free(x, y, width, taken)
        taken.append((left, at - 9, left + width, at + 2))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="{left:.1f}" y="{at:.1f}" fill="{colour}">{escape(row.name)}</text>')
        if abs(at - 4 - y) > 6:
            end = left - 1 if left > x else left + width
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{end:.1f} {at - 4:.1f}" stroke="{colour}" stroke-width="0.4"/>')
    return parts


def _free(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[float, float]:
    """Where a name of this width goes: beside its dot, else the least way up or down; right of it before left."""
    for step in range(60):
        for down in (step, -step):
            for left in (x + 7 + step, x - 7 - step - width):
                at = y + 4 + 6 * down
                box = (left, at - 9, left + width, at + 2)
                fits = left >= 55 and box[2] <= WIDTH and box[1] >= 15 and at <= 512
                if fits and not any(_overlap(box, other) for other in taken):
                    return left, at
    return x + 7, y + 4


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
