"""RoomyLayer: transformers' DynamicLayer over a buffer with room behind the restored tokens.

DynamicLayer concatenates: each new token copies all K and V into fresh memory, which after a restore of 1,024 tokens
costs as much as the token's own forward. Here a token is written behind the others. What was written is never
changed, so a put may read it at any time. Everything else (crop, reorder, repeat) replaces the tensors, as in the
parent; the layer then concatenates like its parent.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

ROOM_TOKENS = 256
"""At most so many behind the restored ones: an answer's usual length. Of huge pages, room costs what tokens do."""


class RoomyLayer(DynamicLayer):
    """A full-attention layer that holds `length` tokens of a larger buffer (batch, kv_heads, tokens, head_dim)."""

    keys: torch.Tensor | None
    values: torch.Tensor | None

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._buffers = (keys, values)
        self._length = length
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (x[:, :, : self._length] for x in self._buffers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens; as in the parent."""
        end = self._length + key_states.shape[-2]
        if not self._intact(key_states) or end > self._buffers[0].shape[2]:
            found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = new
        self._length = end
        self._show()
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _intact(self, key_states: torch.Tensor) -> bool:
        """Whether keys and values still are what this layer made them, and new ones are of as many rows."""
        shown: tuple[Any, Any] = (self.keys, self.values)
        same = [x is not None and x.data_ptr() == y.data_ptr() for x, y in zip(shown, self._buffers, strict=True)]
        rows, tokens = self._buffers[0].shape[0], self.get_seq_length()
        return all(same) and tokens == self._length and key_states.shape[0] == rows
