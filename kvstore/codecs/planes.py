"""A tensor of keys or values as rows, (outer, tokens, inner, head_dim), and which of its tokens are outliers.

outer: the axes before the tokens (layers); inner: those between a token and its rows (heads). Pure, any thread.
"""

from math import prod
from typing import Literal

import torch

from kvstore.codecs.hints import Hints
from kvstore.kernels.reference_kv import GROUP

KEPT_KEYS = 4
"""Tokens at the start of a prefix whose keys stay in 16 bits; elsewhere at most so many outlying ones."""
KEPT_VALUES = 1
"""Values have a scale per token, so an attention sink spoils no other token; only the first one's own error shows
(KL of values alone 1.64e-3 without, 0.40e-3 with it, 0.40e-3 with four)."""
OUTLIER_ENERGY = 4.0
"""Times the median energy about the mean; SmolLM2's tokens beyond the first stay below 3."""

Part = Literal["key", "value", "plain"]
HALVES: tuple[tuple[Part, str], ...] = (("key", ""), ("value", "v."))


def planes_of(x: torch.Tensor, role: str, token_axis: int) -> list[tuple[str, Part, torch.Tensor]]:
    """(prefix of part names, role, rows (outer, tokens, inner, d)); halves of a packed tensor are copies."""
    if role == "packed":
        half = x.shape[-1] // 2
        halves = slice(0, half), slice(half, None)
        key, value = (x[..., part].clone(memory_format=torch.contiguous_format) for part in halves)
        rows = rows_of(key, token_axis), rows_of(value, token_axis)
        return [(prefix, part, x) for (part, prefix), x in zip(HALVES, rows, strict=True)]
    part: Part = "key" if role == "key" else "value" if role == "value" else "plain"
    return [("", part, rows_of(x.contiguous(), token_axis))]


def rows_of(x: torch.Tensor, token_axis: int) -> torch.Tensor:
    """The tensor as (outer, tokens, inner, d); a tensor with too few axes is one run of tokens, or one row."""
    shape = tuple(x.shape)
    if len(shape) < 2:
        return x.reshape(1, 1, 1, -1)
    axis = max(len(shape) + token_axis, 0)
    return x.view(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 : -1]), shape[-1])


def standing_apart(rows: torch.Tensor, part: Part, hints: Hints) -> tuple[int, ...]:
    """The tokens to keep in 16 bits: the first ones of what may be a prefix, else outlying keys."""
    tokens = rows.shape[1]
    most = {"key": KEPT_KEYS, "value": KEPT_VALUES, "plain": 0}[part]
    if hints.prefix_start is None:
        # Unknown: at most one token in 64, so that a short chunk is not mostly 16 bits.
        most = min(most, max(1, tokens // 64))
    most = min(most, tokens - 1)
    if hints.prefix_start is not False:
        return tuple(range(most))
    if part != "key" or tokens < GROUP:
        return ()
    x = rows.to(torch.float32)
    energy = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=(0, 2, 3))
    found = (energy > OUTLIER_ENERGY * energy.median()).nonzero().view(-1)
    if found.numel() > most:
        found = found[energy[found].argsort(descending=True, stable=True)[:most]]
    return tuple(sorted(found.tolist()))


def others(tokens: int, kept: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Indexes of the tokens that are not kept. Returns int64 (tokens - len(kept),)."""
    mask = torch.ones(tokens, dtype=torch.bool, device="cpu")
    mask[list(kept)] = False
    return mask.nonzero().view(-1).to(device)
