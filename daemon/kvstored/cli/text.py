"""Text for people: aligned tables, durations. Pure."""

from collections.abc import Mapping, Sequence
from math import isfinite

from kvstore.hit import Form
from kvstore.printable import printable, size

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def duration(seconds: float) -> str:
    """93784 -> "1d2h"; 0.0123 -> "12ms"."""
    if not isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{max(seconds, 0.0) * 1000:.0f}ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.1f}s"
    if seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f}m{seconds % _MINUTE_S // 1:.0f}s"
    if seconds < _DAY_S:
        return f"{seconds // _HOUR_S:.0f}h{seconds % _HOUR_S // _MINUTE_S:.0f}m"
    return f"{seconds // _DAY_S:.0f}d{seconds % _DAY_S // _HOUR_S:.0f}h"


def quantity(name: str, value: float) -> str:
    """A number with the unit in its name: `..._nbytes`, `..._s`, `..._ratio`, else a count."""
    if name.endswith("_nbytes"):
        return size(value)
    if name.endswith("_s"):
        return duration(value)
    if name.endswith("_ratio"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.3f}"


def accuracy(error: float) -> str:
    """A receipt in words: 0.08123 -> "relative error 0.0812", 0 -> "bit for bit as put"."""
    if not error:
        return "bit for bit as put"
    return f"relative error {error:.3g}" if isfinite(error) else "lossy, error never measured"


def form_text(form: Form) -> str:
    """A form in words: "kv-learned, 2.52 bits a value, predicted KL 3.0e-04"."""
    bits = f"{form.encoding}, {form.bits:.2f} bits a value"
    if not form.kl:
        return bits if form.kl is None else f"{bits}, as put"
    return f"{bits}, predicted KL {form.kl:.1e} nats a token, basis {form.basis[:16]}"


def receipt_dict(receipt: Mapping[str, float]) -> dict[str, float | None]:
    """A receipt for JSON, which has no infinity: null if it was not measured."""
    return {name: error if isfinite(error) else None for name, error in receipt.items()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table; the first `left` columns are aligned left, the others right. Controls are escaped."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
