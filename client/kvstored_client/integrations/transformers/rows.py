"""A batch of prompts as rows of real tokens: what is padding, what is not, and where positions are shared.

A batch's cache has one length for all rows, in padded positions: position p of a row with `pad` tokens of padding on
its left is its own token p - pad.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rows:
    """Left-padded prompts. tokens: each row's own, without padding. pads: how many stood before them. width: of all."""

    tokens: list[list[int]]
    pads: list[int]
    width: int

    def own(self, row: int, position: int) -> int:
        """A padded position as the row's own."""
        return max(0, position - self.pads[row])

    def mask(self, device: Any) -> torch.Tensor:
        """The attention mask: 0 for padding."""
        positions = torch.arange(self.width, device=device)
        return (positions >= torch.tensor(self.pads, device=device).unsqueeze(1)).long()


def read_rows(ids: Any, mask: Any = None) -> Rows | None:
    """The rows of a batch; None for what is not a left-padded batch of ids. mask: None where nothing is padding."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or min(ids.shape) < 1:
        return None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        return None
    pads = [0] * ids.shape[0]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            return None
        pads = [int(n) for n in (mask == 0).sum(1)]
        if not torch.equal(mask.to(torch.float64), Rows([], pads, ids.shape[1]).mask(mask.device).to(torch.float64)):
            return None
    tokens = [[int(t) for t in row[pad:]] for row, pad in zip(ids.tolist(), pads, strict=True)]
    return Rows(tokens, pads, ids.shape[1]) if all(tokens) else None


def grown(rows: Rows, sequences: torch.Tensor, ends: frozenset[int]) -> Rows:
    """The rows with what was generated after them, each up to its first end-of-sequence token."""
    tokens = []
    for row, pad in zip(sequences.tolist(), rows.pads, strict=True):
        new = row[rows.width :]
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        tokens.append([int(t) for t in row[pad : rows.width + stop]])
    return Rows(tokens, rows.pads, int(sequences.shape[1]))
