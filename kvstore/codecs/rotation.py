"""How a model's keys turn with the position, and how to turn them back: the keys before RoPE.

A `Rotation` holds angles for each layer, so local and global layers (Gemma), YaRN, partial rotary and any base are one
case; they are measured on the model (`measured`), not read from its configuration. Pure, any thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from kvstore.errors import CodecError

POSITIONS_MAX = 1 << 24
"""Beyond it a float32 angle says nothing."""
FOUND_BELOW = 1 << 17
"""Positions among which `position_of` looks."""
_STEP = 512
_MISFIT_MAX = 1e-3
"""Of the energy of keys: what turning back may leave of a difference. A wrong pairing leaves 0.1 and more."""
_NOISE = 1e-5
"""Radians a token: two layers that differ by less turn alike (float32 keys tell angles to 1e-7)."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """angles: radians a token, float64 (layers, pairs); no pairs: keys do not turn. interleaved: a pair is two
    neighbours, else channel c and c + pairs.
    """

    angles: torch.Tensor
    interleaved: bool

    def turned(self, keys: torch.Tensor, first: int, *, back: bool) -> torch.Tensor:
        """Keys (layers, tokens, heads, dim) turned to their positions, or back from them: float32.

        first: the position of the first token.
        """
        x = keys.to(torch.float32)
        pairs = self.angles.shape[1]
        if not pairs:
            return x
        of = self.tables[1].to(x.device)
        cos, sin = (part.to(x.device)[of][:, :, None] for part in self.frame(first, x.shape[1]))
        if back:
            sin = -sin
        out = x.clone()
        a, b = self.pairs_of(x)
        to_a, to_b = self.pairs_of(out)
        to_a.copy_(a * cos - b * sin)
        to_b.copy_(a * sin + b * cos)
        return out

    @cached_property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The angles that layers differ by, (tables, pairs), and the table of each layer, int64 (layers,)."""
        tables, of = torch.unique(self.angles, dim=0, return_inverse=True)
        return tables, of

    def frame(self, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of each table at each position: float32 (tables, tokens, pairs)."""
        at = torch.arange(first, first + tokens, dtype=torch.float64)
        angle = at[None, :, None] * self.tables[0][:, None, :]
        return angle.cos().to(torch.float32), angle.sin().to(torch.float32)

    def pairs_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the two channels of each pair, (..., pairs)."""
        pairs = self.angles.shape[1]
        if self.interleaved:
            return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        return x[..., :pairs], x[..., pairs : 2 * pairs]

    def position_of(self, keys: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> int:
        """The position of the first of these keys (layers, tokens, heads, dim), found in themselves: 0 to 131,071.

        What keys share turns with the position. mean, spread: of keys before RoPE and their variance, (layers, heads,
        dim). The answer is the most likely position; a wrong one costs bits, never a value, for it is stored.
        """
        if not self.angles.shape[1]:
            return 0
        here = self.turned(keys, 0, back=True).mean(dim=1)
        (a, b), (m, n), (s, t) = self.pairs_of(here), self.pairs_of(mean), self.pairs_of(spread)
        met = torch.complex(a.double(), b.double()) * torch.complex(m.double(), -n.double()) / (s + t).double()
        by_layer = met.sum(dim=1)
        angles, of = self.tables
        summed = torch.zeros(angles.shape, dtype=torch.complex128).index_add_(0, of, by_layer).reshape(-1).numpy()
        turn = angles.reshape(-1).numpy()
        far = summed * np.exp(-1j * np.arange(0, FOUND_BELOW, _STEP)[:, None] * turn)
        near = np.exp(-1j * turn[:, None] * np.arange(_STEP))
        return int((far @ near).real.argmax())


STILL = Rotation(torch.empty(0, 0, dtype=torch.float64), interleaved=False)


def measured(positions: Sequence[int], keys: torch.Tensor) -> Rotation:
    """The rotation of keys that differ in their position alone: (probes, layers, samples, heads, dim).

    positions: of each probe, the first 0, the second 1, each later one at most four times the one before. Where no
    pairing explains the keys, they do not turn (learned positions are added before, not here).
    """
    dim = keys.shape[-1]
    best, least = Rotation(torch.empty(keys.shape[1], 0, dtype=torch.float64), interleaved=False), _MISFIT_MAX
    for part in (1, 2, 4):
        pairs = dim // part // 2
        for interleaved in (False, True):
            if not pairs:
                continue
            tried = Rotation(torch.zeros(keys.shape[1], pairs, dtype=torch.float64), interleaved)
            a, b = tried.pairs_of(keys.double())
            z = torch.complex(a, b)
            sums = (z * z[0].conj()).sum(dim=(2, 3))
            tried = Rotation(_alike(_angles(positions, sums)), interleaved)
            misfit = _misfit(tried, positions, keys)
            if misfit < 0.5 * least:
                best, least = tried, misfit
    return best


def _angles(positions: Sequence[int], sums: torch.Tensor) -> torch.Tensor:
    """Each farther probe makes the angle finer. sums: z at a probe times conj z at 0, (probes, layers, pairs)."""
    found = torch.angle(sums[1])
    for at, seen in zip(positions[2:], sums[2:], strict=True):
        found = found + torch.angle(seen * torch.exp(-1j * at * found)) / at
    return found


def _alike(angles: torch.Tensor) -> torch.Tensor:
    """Layers that differ by what was measured badly get one table."""
    tables: list[torch.Tensor] = []
    of = []
    for row in angles:
        near = [at for at, table in enumerate(tables) if float((row - table).abs().max()) < _NOISE]
        of.append(near[0] if near else len(tables))
        tables += [] if near else [row]
    means = [angles[[at for at, table in enumerate(of) if table == which]].mean(dim=0) for which in range(len(tables))]
    return torch.stack([means[which] for which in of])


def _misfit(rotation: Rotation, positions: Sequence[int], keys: torch.Tensor) -> float:
    left = whole = 0.0
    for at, seen in zip(positions[1:], keys[1:], strict=True):
        back = torch.stack([rotation.turned(one[:, None], at, back=True)[:, 0] for one in seen.unbind(1)], dim=1)
        left += float((back - keys[0]).square().sum(dtype=torch.float64))
        whole += float(keys[0].square().sum(dtype=torch.float64))
    if not np.isfinite(left):
        raise CodecError("a model's keys are not finite")
    return left / max(whole, 1e-30)
