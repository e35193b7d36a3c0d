"""Tokens of keys to which attention keeps returning, found in the keys alone: each is worth its 16 bits.

What all keys of a head share holds attention away from them: queries look the other way. A token whose key lacks that
part, as a prompt's first token does, draws attention from everywhere, and does far more of the harm than its share: by
gradients over eight texts one token in 256 does a tenth of what coded keys do to SmolLM2 and a quarter to Gemma 3 270M,
and of the first four tokens the first does more than 99%. Pure, any thread.
Rejected: tokens far from the mean (a sixth of the harm on SmolLM2). Rows of one head in place of tokens: as much for a
quarter of the bits on SmolLM2, but a tenth of it on Gemma 3, and another form of record.
"""

import numpy as np
import torch

from kvstore.kernels import KvKernel
from kvstore.kernels.cpu import Along, Rows

TOKENS_EACH = 256
"""Tokens of a chunk for each that is kept beyond the first: 0.06 bits a key."""
LACKING = 0.75
"""Of the mean key of some head: what a token's key lacks of it, along it. Ordinary tokens: 0.1; the first: 1."""
_SURE = 0.25
"""Standard deviation of that over a head's tokens: above, the head has no mean to speak of."""
_SLABS, _EACH = 8, 8
"""Slabs that are looked at, at most, and tokens for each that means are taken of."""
_FIRST = 4
"""Tokens at a prompt's start that no mean is taken of."""
_FAR = 4.0
"""Times the median energy about the mean: one of the first tokens that is as far is kept, whatever it lacks."""


@np.errstate(over="ignore")  # energies that are not finite: such values are refused when they are coded
def sinks_of(rows: torch.Tensor, kernel: KvKernel, *, start: bool) -> tuple[int, ...]:
    """Tokens to keep in 16 bits, ascending. rows: (outer, tokens, inner, d); start: the first is a prompt's first."""
    outer, tokens, inner, d = rows.shape
    most, first = tokens // TOKENS_EACH, _FIRST if start else 0
    if not most and not start:
        return ()
    some = rows[:: max(1, -(-outer // _SLABS))]
    where = Rows(len(some), tokens, inner, d, some.stride(0) if len(some) > 1 else tokens * inner * d, 1, 32, 0)
    apart, lacking = (x.cpu().numpy() for x in kernel.kv_along(some, where, Along(first, _EACH, _SURE, LACKING)))
    kept = {0, *_far(apart.sum(axis=0), first)} if start else set()
    if most:
        lacks = lacking.max(axis=0)
        lacks[list(kept)] = 0.0
        best = np.argsort(-lacks, kind="stable")[:most]
        kept |= set(best[lacks[best] > 0].tolist())
    return tuple(sorted(kept))


def _far(apart: np.ndarray, first: int) -> list[int]:
    """Of the first tokens those that are far from the means. apart: squared distances (tokens,)."""
    usual = np.sort(apart[first::_EACH])
    return np.flatnonzero(apart[:first] > _FAR * usual[(usual.size - 1) // 2]).tolist()
