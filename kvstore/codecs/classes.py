"""Classes of symbols: how widely a coefficient's symbols scatter, and which class codes a row of them in fewest bits.

Class 0 has zeros alone and costs nothing; class c > 0 is for a deviation of 2^((c - 1) / 4 - 3.5) steps: 0.09 to 64.
The class of each coefficient is chosen for each chunk, so a text of another domain than was learned from costs little.
Pure, any thread.
"""

import numpy as np
import torch

from kvstore.codecs.rans import ESCAPE, SYMBOLS, TOTAL, Array, Tables

CLASSES = 40
DELTA = CLASSES
"""The table behind those of the classes: of how far the chosen class lies from the learned one."""
ESCAPE_BITS = 16.0
_REACH = 6.0
_NEVER = 1e9


def deviation(of: int) -> float:
    """Steps: the deviation that a class is for."""
    return float(2 ** ((of - 1) / 4 - 3.5))


def reach(of: int) -> int:
    """The largest magnitude that has a frequency in a class; beyond it a value is an escape."""
    return 0 if of == 0 else min(127, int(np.ceil(_REACH * deviation(of))) + 3)


def expected(of: int) -> Array:
    """Probabilities of symbols -128 to 127 in a class before anything was seen: a Laplacian, rounded to steps."""
    at = np.arange(-128, 128)
    if of == 0:
        found = (at == 0).astype(np.float64)
    else:
        rate = np.sqrt(2) / deviation(of)
        inner = 1 - np.exp(-rate / 2)
        found = np.where(at == 0, inner, np.exp(-rate * np.abs(at)) * np.sinh(rate / 2) if rate < 300 else 0.0)
        found = np.where(np.abs(at) > reach(of), 0.0, found)
    found[0] = 1e-4
    return np.asarray(found / found.sum())


def counted(probabilities: Array, allowed: Array) -> Array:
    """Frequencies that sum to 4,096, at least 1 where `allowed`: uint16 (256,)."""
    share = np.where(allowed, probabilities, 0.0)
    share = share / share.sum()
    spare = TOTAL - int(allowed.sum())
    found = np.where(allowed, 1 + np.floor(share * spare), 0).astype(np.int64)
    found[int(found.argmax())] += TOTAL - int(found.sum())
    return found.astype(np.uint16)


def tables_of(histograms: Array, deltas: Array) -> Tables:
    """Tables of the classes, and behind them that of class differences.

    histograms: how often each class had each symbol, float64 (40, 256); deltas: each difference, (256,).
    """
    rows = []
    for of in range(CLASSES):
        seen = histograms[of] + histograms[of][(256 - np.arange(256)) % 256] * (np.arange(256) > 0)
        prior = expected(of)
        allowed = np.abs(np.arange(-128, 128)) <= reach(of)
        allowed[0] = True
        rows.append(counted((seen + 64 * prior) / (seen.sum() + 64), allowed))
    smooth = 0.3 ** np.abs(np.arange(-128, 128)) + 1e-5
    rows.append(counted((deltas + 8 * smooth) / (deltas.sum() + 8 * smooth.sum()), np.abs(np.arange(-128, 128)) <= 128))
    return Tables(np.stack(rows))


def lengths(tables: Tables) -> torch.Tensor:
    """Bits of each symbol in each class, escapes for what has no frequency: float32 (40, 256)."""
    known = torch.from_numpy(tables.lengths[:CLASSES].copy())
    escape = known[:, :1] + ESCAPE_BITS
    known = torch.minimum(known, escape)
    known[:, 0] = escape[:, 0]
    known[0] = _NEVER
    known[0, SYMBOLS // 2] = 0.0
    return known


def histograms_of(symbols: torch.Tensor) -> torch.Tensor:
    """How often each row has each symbol: float32 (rows, 256). symbols: int8 (rows, n)."""
    rows = symbols.shape[0]
    at = torch.arange(rows, dtype=torch.int32)[:, None] * SYMBOLS + (symbols.to(torch.int32) - ESCAPE)
    return torch.bincount(at.view(-1), minlength=rows * SYMBOLS).view(rows, SYMBOLS).to(torch.float32)


def chosen(histograms: torch.Tensor, tables: Tables, learned: torch.Tensor) -> torch.Tensor:
    """The class of each row in which it costs fewest bits, the class itself counted: uint8 (rows,).

    learned: the classes that cost least to name.
    """
    costs = histograms @ lengths(tables).T
    away = torch.arange(CLASSES)[None] - learned.to(torch.int64)[:, None] - ESCAPE
    costs = costs + torch.from_numpy(tables.lengths[DELTA])[away]
    return costs.argmin(dim=1).to(torch.uint8)
