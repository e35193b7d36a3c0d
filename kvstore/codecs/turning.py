"""Which means of keys turn, and how fast: chosen for each pair of channels of each head, from the keys alone.

What keys share turns with the position as RoPE turns it, so its angle a token can be seen in the keys: the phase of
sum z[t] conj z[t-1], made finer by two longer lags. Angles of a common RoPE (`THETAS`) replace what was seen where they
fit it: then all layers share one table, and encoding what was decoded finds the same angles again. A pair turns only
where that takes much more energy than a still mean does; so noise never turns. Pure, any thread.
Rejected: the angles from the namespace's RoPE. Found in the keys they do as well (KL 2.97e-3 against 2.98e-3 on
Qwen2.5-0.5B), need no configuration, and hold for YaRN, partial rotary and unknown bases.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from kvstore.kernels import KvKernel
from kvstore.kernels.cpu import Phases, Rotary, Rows, Turns
from kvstore.kernels.reference_kv import GROUP
from kvstore.kernels.reference_turn import bytes_of

THETAS = (1e4, 1e6, 5e5, 1e5, 5e4, 1.3e5, 1.5e5, 2e5, 2.5e5, 1.5e6, 2e6, 4e6, 5e6, 8e6, 1e7, 7.5e7)
"""Bases of RoPE that models have; the first that fits is taken."""
SAMPLED = 1
"""Groups that angles are sought in; means are then chosen on all of them."""
TURNING_MIN = 16
"""Tokens: with fewer, a table of angles costs more than it saves."""
_GAIN = 5.0
"""Times its deviation in noise: what turning means must take beyond still ones."""
_CANDIDATE = 45.0
"""What a pair that turns takes at least beyond its still mean, in energies of one value without its mean."""
_SEEN = 3.5
"""Times the noise of sum z[t] conj z[t-lag]: what shows that a pair turns."""
_MISFIT = 0.05
"""Of a head's energy: what a table of angles may leave. On eight texts and three models 0.02 wrote twice as many tables
and left more error: what a slab's first group shows of its angles is noisier than that."""
_TABLES_BITS, _TABLE_BITS, _SHORT_BITS = 0.0625, 0.18, 0.05
"""Bits a value that several tables of angles may cost, a single one, and one in a chunk of less than a group."""


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """The means of a plane of keys: coded, as floats, and which of them turn. known: by the angles of a common RoPE.

    energies: `kv_content` of what they are the means of, where it was asked for.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    floats: torch.Tensor
    turns: Turns | None
    known: bool
    energies: torch.Tensor | None


class Seen(NamedTuple):
    """What `kv_phases` found.

    power: (outer, inner); pooled: (outer, pairs, lags, 2); shown: (outer, pairs); heads: (outer,).
    """

    power: np.ndarray
    pooled: np.ndarray
    shown: np.ndarray
    heads: np.ndarray


def means_of(
    x: torch.Tensor, rows: Rows, rotary: Rotary, kernel: KvKernel, *, content: bool = False, like: Means | None = None
) -> Means:
    """The means of rows of x, each head's in the frame that leaves less of it.

    content: whether the energies are wanted. like: means of nearly the same values, whose angles are taken if known.
    """
    tangents, known, sampled, power = None, False, min(SAMPLED, rows.groups), np.empty(0)
    if _may_turn(rows, rotary):
        seen = Seen(*(part.cpu().numpy() for part in kernel.kv_phases(x, rows, rotary, _phases(rows, rotary))))
        power = seen.power
        if like is not None and like.known and like.turns is not None:
            tangents, known = like.turns.tangents, True
        elif np.isfinite(seen.pooled).all():  # where not, coding refuses the values
            found, known = _tangents(seen, rows)
            tangents = None if found is None else torch.from_numpy(found).to(x.device)
    still, sums, gains, energies = kernel.kv_sums(x, rows, rotary, tangents, content=content)
    turns = None
    if tangents is not None:
        heads = _turning(gains.sum(dim=2).cpu().numpy(), power, rows, _tokens(rows, sampled))
        if heads.any():
            mask = np.broadcast_to(heads[..., None], gains.shape)
            turns = Turns(rotary, tangents, torch.from_numpy(bytes_of(mask)).to(x.device))
    return Means(*kernel.kv_code_means(rows, turns, still, sums), turns, known, energies)


def _may_turn(rows: Rows, rotary: Rotary) -> bool:
    """Whether there is room for a table of angles."""
    bits = _TABLE_BITS if rows.tokens >= GROUP else _SHORT_BITS
    return rows.tokens >= TURNING_MIN and rotary.channels > 0 and bits * rows.outer * rows.tokens * rows.inner >= 16


def _turning(gains: np.ndarray, power: np.ndarray, rows: Rows, sampled: int) -> np.ndarray:
    """Which heads turn: those where turning means take more energy than noise ever does. Returns bool (outer, inner).

    All pairs of a head together: their sum is seldom near the limit, and falls on the same side when what was
    decoded is encoded again. sampled: the tokens that `power` is of.
    """
    limit = power * (_GAIN * np.sqrt(4 * rows.groups * rows.d) / (sampled * rows.d))
    turns: np.ndarray = gains > limit
    return turns


def _tokens(rows: Rows, sampled: int) -> int:
    """Tokens in the first groups."""
    return rows.tokens if sampled == rows.groups else sampled * GROUP


def _lags(rows: Rows) -> tuple[int, int, int]:
    n = min(rows.tokens, GROUP)
    return 1, max(2, n // 8), n // 2


def _phases(rows: Rows, rotary: Rotary) -> Phases:
    """What is looked at, and what shows that a pair turns."""
    n, sampled, lags = min(rows.tokens, GROUP), min(SAMPLED, rows.groups), _lags(rows)
    values = n * sampled
    seen = _SEEN * np.sqrt((n - lags[-1]) * sampled) / values
    return Phases(sampled, lags, n / (n - lags[-1]), seen, _CANDIDATE / (values * rotary.channels))


def _tangents(seen: "Seen", rows: Rows) -> tuple[np.ndarray | None, bool]:
    """tan(w/2) for each pair of each slab, float32 (outer, pairs), 0 where nothing turns; None where none does.

    And whether they are all those of a common RoPE.
    """
    n, lags = min(rows.tokens, GROUP), _lags(rows)
    if not seen.shown.any():
        return None, False
    pooled = seen.pooled.view(np.complex128)[..., 0]  # (outer, pairs, lags)
    length = np.sqrt(np.square(seen.pooled[..., -1, :]).sum(axis=-1)) * (n / (n - lags[-1]))
    weight = np.where(seen.shown, length, 0.0)
    turns: np.ndarray = np.logical_or.reduce(seen.shown, axis=1)
    own = _angles(pooled, lags)
    least = _MISFIT * np.maximum(seen.heads, 1)
    table = _common(own, weight, n)
    fit = _misfits(own, table, weight, n) <= least
    if (fit | ~turns).all():
        return _halved(np.where(turns[:, None], table, 0.0)), True
    tables = np.concatenate((_known(own.shape[1]), _angles(pooled.sum(axis=0, keepdims=True), lags)))
    misfits = _misfits(own, tables[:, None], weight, n).T
    fits = misfits <= least[:, None]
    chosen = fits.argmax(axis=1)
    angles = np.where(fit[:, None], table, np.where(fits.any(axis=1)[:, None], tables[chosen], own))
    angles[~turns] = 0.0
    if np.unique(angles, axis=0).shape[0] * 16 > _TABLES_BITS * rows.outer * rows.tokens * rows.inner:
        angles = np.where((turns & fit)[:, None], table, 0.0)
        return _halved(angles), True
    return _halved(angles), bool((fit | (fits.any(axis=1) & (chosen < len(THETAS))) | ~turns).all())


def _halved(angles: np.ndarray) -> np.ndarray:
    return np.tan(angles / 2).clip(-1e6, 1e6).astype(np.float32)


def _common(own: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
    """The known table that leaves least of all slabs together. Returns (pairs,)."""
    known = _known(own.shape[1])
    return known[int(np.argmin(_misfits(own, known[:, None], weight, n).sum(axis=-1)))]  # type: ignore[no-any-return]


def _angles(sums: np.ndarray, lags: tuple[int, ...]) -> np.ndarray:
    """The angle a token of each pair, each longer lag making the one before finer. sums: complex (..., pairs, lags)."""
    re, im = np.moveaxis(sums.real, -1, 0), np.moveaxis(sums.imag, -1, 0)
    found: np.ndarray = np.arctan2(im[0], re[0])
    for at, lag in enumerate(lags[1:], start=1):
        c, s = np.cos(lag * found), np.sin(lag * found)
        found = found + np.arctan2(im[at] * c - re[at] * s, re[at] * c + im[at] * s) / lag
    return found


@lru_cache(maxsize=16)
def _known(pairs: int) -> np.ndarray:
    """Angles a token of each pair under each known base: (bases, pairs), never to be written."""
    return np.stack([theta ** (-np.arange(pairs) / pairs) for theta in THETAS])


def _misfits(own: np.ndarray, tables: np.ndarray, weight: np.ndarray, n: int) -> np.ndarray:
    """What tables leave over n tokens where `own` angles leave none, in energies of a head. Returns (..., outer).

    own, weight: (outer, pairs); tables: (..., pairs).
    """
    off = own - tables
    turns = off * (0.5 / np.pi)
    off -= np.rint(turns, out=turns) * (2 * np.pi)
    off *= n / np.sqrt(12)
    np.square(off, out=off)
    np.minimum(off, 1.0, out=off)
    off *= weight
    left: np.ndarray = off.sum(axis=-1)
    return left
