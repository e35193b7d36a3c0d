"""Tokens of keys to which attention keeps returning, found in the keys alone: each is worth its 16 bits.

What all keys of a head share holds attention away from them: queries look the other way. A token whose key lacks that
part, as a prompt's first token does, draws attention from everywhere, and does far more of the harm than its share: by
gradients over eight texts one token in 256 does a tenth of what coded keys do to SmolLM2 and a quarter to Gemma 3 270M,
and of the first four tokens the first does more than 99%. Pure, any thread.
Rejected: tokens far from the mean (a sixth of the harm on SmolLM2). Rows of one head in place of tokens: as much for a
quarter of the bits on SmolLM2, but a tenth of it on Gemma 3, and another form of record.
"""

import torch

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


def sinks_of(rows: torch.Tensor, *, start: bool) -> tuple[int, ...]:
    """Tokens to keep in 16 bits, ascending. rows: (outer, tokens, inner, d); start: the first is a prompt's first."""
    outer, tokens, _inner, _d = rows.shape
    most, first = tokens // TOKENS_EACH, _FIRST if start else 0
    if not most and not start:
        return ()
    some = rows[:: max(1, -(-outer // _SLABS))].to(torch.float32)
    sampled = some[:, first::_EACH]
    mean = sampled.mean(dim=1)
    kept = {0, *_far(some[:, :first], sampled, mean)} if start else set()
    if most:
        deviations = _lacking(some, mean, first)
        deviations[list(kept)] = 0.0
        best, at = torch.topk(deviations, most)
        kept |= set(at[best > 0].tolist())
    return tuple(sorted(kept))


def _far(firsts: torch.Tensor, sampled: torch.Tensor, mean: torch.Tensor) -> list[int]:
    usual, far = ((x - mean[:, None]).square().sum(dim=(0, 2, 3)) for x in (sampled, firsts))
    return [int(at) for at in (far > _FAR * usual.median()).nonzero().view(-1)]


def _lacking(some: torch.Tensor, mean: torch.Tensor, first: int) -> torch.Tensor:
    """How far each token lacks the mean, in standard deviations of the head where that is most; 0 if nowhere by much.

    Returns float32 (tokens,) on the CPU.
    """
    along = (some * mean[:, None]).sum(dim=-1)  # five times as fast as a batch of products with vectors
    lacks = 1.0 - along / mean.square().sum(dim=-1).clamp(min=1e-30)[:, None]
    spread = lacks[:, first:].std(dim=1, keepdim=True)
    counts = (spread < _SURE) & (lacks > LACKING)
    return torch.where(counts, lacks / spread.clamp(min=1e-6), 0.0).amax(dim=(0, 2)).cpu()
