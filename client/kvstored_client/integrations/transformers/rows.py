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


def read_rows(ids: Any, mask: Any, pad_token_id: int | None) -> Rows | None:
    """The rows of a batch; None for what is not a left-padded batch of token ids."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < 1 or ids.is_floating_point():
        return None
    if mask is None:
        if pad_token_id is not None and bool((ids == pad_token_id).any()):
            return None  # transformers would guess a mask from these, by rules of its own
        pads = [0] * ids.shape[0]
    else:
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            return None
        seen = mask.long()
        pads = [int(n) for n in (seen == 0).sum(1)]
        if not torch.equal(seen, Rows([], pads, ids.shape[1]).mask(seen.device)):
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
