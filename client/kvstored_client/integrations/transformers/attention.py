"""Full attention: K and V of every token are kept, so any shared prefix of any other prompt can be restored.

Shapes: transformers holds [batch, kv_heads, tokens, head_dim] for each layer, RoPE applied; the store's layout "lthd"
is (layers, tokens, kv_heads, head_dim), in chunks.
"""

from typing import Any

import torch

from kvstore.hit import Hit
from kvstore.prefix import Namespace
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers.layer import ROOM_TOKENS, RoomyLayer
from kvstored_client.integrations.transformers.rows import Rows


class Attention:
    """Restores and keeps prefixes of one model whose layers all are full attention."""

    def __init__(self, guard: Guard, identity: dict[str, Any], chunk_tokens: int) -> None:
        self._guard = guard
        self._identity = identity
        self._chunk_tokens = chunk_tokens
        self._space = self._namespace(guard)

    def _namespace(self, cache: Any) -> Namespace:
        from kvstore.keys import Identity

        return Namespace(cache, Identity(**self._identity), self._chunk_tokens)

    def restore(self, rows: Rows, cache: Any, device: torch.device) -> int:
        """Fill an empty cache with the longest prefix that all rows have. Returns its length in padded positions.

        Never the last token: a cache over the whole prompt leaves the model nothing to run, and the answer is wrong.
        """
        found = [self._space.get_prefix_hits(tokens) for tokens in rows.tokens]
        length = min(pad + n for pad, (n, _) in zip(rows.pads, found, strict=True))
        length = min(length, rows.width - 1)
        if length <= min(rows.pads):
            return 0
        identity = self._identity
        shape = (identity["layers"], len(rows.pads), identity["kv_heads"], length + ROOM_TOKENS, identity["head_dim"])
        buffers = []
        for name in ("k", "v"):
            whole = torch.empty(shape, dtype=getattr(torch, identity["dtype"]), device=device)
            for row, (_, hits) in enumerate(found):
                # Padding is masked, but a NaN left in memory times zero would still be one.
                whole[:, row, :, : rows.pads[row]] = 0
                _fill(whole[:, row, :, :length], hits, name, rows.pads[row])
            buffers.append(whole)
        cache.layers = [RoomyLayer(k, v, length) for k, v in zip(*buffers, strict=True)]
        return length

    def keep(self, prompt: Rows, whole: Rows, cache: Any) -> None:
        """Put what the cache holds of each row, later: the prompt as it was, and the prompt with its answer."""
        length = cache.get_seq_length()
        # Layers grow by concatenation, so these very tensors are never changed: no copy is needed until they are put.
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        nbytes = sum(k.numel() * k.element_size() + v.numel() * v.element_size() for k, v in layers)

        def put() -> None:
            space = self._namespace(self._guard.cache)
            for row, pad in enumerate(prompt.pads):
                tokens = whole.tokens[row][: length - pad]
                n = min(len(prompt.tokens[row]), len(tokens))
                if _held(self._guard.cache, space, [tokens[:n], tokens]):
                    continue
                k, v = (
                    torch.stack([layer[which][row, :, pad : pad + len(tokens)] for layer in layers]).transpose(1, 2)
                    for which in (0, 1)
                )
                space.put_prefix(tokens[:n], k[:, :n], v[:, :n])
                if len(tokens) > n:
                    space.put_prefix(tokens, k, v)

        self._guard.later(put, nbytes)


def _held(cache: Any, space: Namespace, prefixes: list[list[int]]) -> bool:
    """Whether all chunks of these prefixes are held. Counts as use, as a put of them does."""
    chains = [space.keys(tokens) for tokens in prefixes]
    if any(cache.match(keys) < len(keys) for keys in chains):
        return False
    for keys in chains:
        cache.touch(keys)
    return True


def _fill(target: torch.Tensor, hits: list[Hit], name: str, start: int) -> None:
    """Copy chunks (layers, tokens, kv_heads, head_dim) into (layers, kv_heads, positions, head_dim) from a position."""
    for hit in hits:
        chunk = hit.tensors[name].transpose(1, 2)
        end = min(start + chunk.shape[2], target.shape[2])
        if start >= end:
            return
        target[:, :, start:end] = chunk[:, :, : end - start]
        start = end
