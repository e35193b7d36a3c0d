"""The content of keys and values: rows minus their mean over tokens, where the mean may turn as RoPE turns it.

Attention compares keys with each other: a part that all keys share has no effect (a mean), or the same effect for every
text (a mean that RoPE turns with the position). In models with a bias in their key projection the shared part is nearly
all of |K|, so an error that is small against |K| may be as large as the rest. A receipt is a fraction of the content,
layer by layer and head by head. Frequencies are found in the data, so no model's theta has to be known.
The reference of the kernels: equal to them within 1e-3, sums being taken in other orders. Pure, any thread.
"""

import torch

from kvstore.kernels.cpu import STILL, Rotary, Rows

GROUP = 64
"""Tokens with one mean, as in `reference_kv`; a rest below 32 joins the last group."""
PROMISE = 1.25
"""Times |sum z[t+1] conj z[t]|: what a turning mean may take at most, noise included."""
SHORT = 4
"""For fewer tokens no mean is subtracted."""

_CHUNK_NUMEL = 1 << 18


def groups_of(tokens: int) -> list[tuple[int, int]]:
    """Where each group of tokens begins and ends."""
    count = max(1, (tokens + GROUP // 2) // GROUP)
    return [(g * GROUP, tokens if g == count - 1 else (g + 1) * GROUP) for g in range(count)]


def energies(x: torch.Tensor, rotary: Rotary = STILL) -> torch.Tensor:
    """The energy of each head, without the means of its groups and with them.

    x: (outer, tokens, inner, d). rotary: which channels turn in pairs. For each pair a mean is subtracted only if
    that leaves less energy; the rest is scaled by its degrees of freedom, so that noise keeps its energy.
    Returns float64 (outer, inner, 2).
    """
    outer, tokens, inner, d = x.shape
    found = torch.zeros(outer, inner, 2, dtype=torch.float64, device=x.device)
    half = rotary.channels // 2
    for start, stop in groups_of(tokens):
        group = x[:, start:stop].to(torch.float64)
        whole = group.square().sum(dim=1)
        left = whole
        if stop - start >= SHORT:
            left = torch.minimum(whole, _still(group))
            if half:
                still = torch.add(*_paired(left, rotary))
                turned = _turning(*_paired(group, rotary), still)
                left = torch.cat((turned, left[..., rotary.channels : d]), dim=-1)
        found += torch.stack((left.sum(dim=-1), whole.sum(dim=-1)), dim=-1)
    return found


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distance of two tensors (outer, tokens, inner, d), head by head. Returns float64 (outer, inner)."""
    slabs = max(1, _CHUNK_NUMEL // max(1, x[0].numel()))
    both = zip(torch.split(x, slabs), torch.split(y, slabs), strict=True)
    return torch.cat([(a.double() - b.double()).square_().sum(dim=(1, 3)) for a, b in both])


def missed(error: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The squared error of each head, from those of blocks that each lie in one. Returns float64 (outer, inner)."""
    by_row = error.view(rows.outer, rows.tokens, rows.inner, rows.d // rows.block)
    return by_row.sum(dim=(1, 3), dtype=torch.float64)


def _paired(x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """The two channels of each turning pair. x: (..., d). Returns (..., channels / 2) twice."""
    half = rotary.channels // 2
    turning = x[..., : rotary.channels]
    return (turning[..., ::2], turning[..., 1::2]) if rotary.interleaved else (turning[..., :half], turning[..., half:])


def _still(x: torch.Tensor) -> torch.Tensor:
    """Energy without the mean. x: (outer, n, inner, d). Returns (outer, inner, d)."""
    n = x.shape[1]
    about = x - x[:, :1]
    return (about.square().sum(dim=1) - about.sum(dim=1).square() / n) * (n / (n - 1))


def _turning(re: torch.Tensor, im: torch.Tensor, still: torch.Tensor) -> torch.Tensor:
    """Energy of pairs without the mean, in the frame that turns by the phase of sum z[t+1] conj z[t].

    still: energy without the still mean; it is kept where that sum does not promise to leave less than 3/4 of it.
    """
    n = re.shape[1]
    z = torch.complex(re, im)
    step = (z[:, 1:] * z[:, :-1].conj()).sum(dim=1)
    length = step.abs()
    promised = z.abs().square().sum(dim=1) - PROMISE * length
    back = torch.where(length > 0, step.conj() / torch.where(length > 0, length, 1.0), torch.ones_like(step))
    frame = back[:, None].repeat(1, n, 1, 1)
    frame[:, 0] = 1
    turned = z * frame.cumprod(dim=1)
    turned = turned - turned[:, :1]
    left = turned.abs().square().sum(dim=1) - turned.sum(dim=1).abs().square() / n
    return torch.where(promised < 0.75 * still, torch.minimum(still, left * (2 * n / (2 * n - 3))), still)
