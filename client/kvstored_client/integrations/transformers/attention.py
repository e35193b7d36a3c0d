"""Full attention: K and V of every token are kept, so any shared prefix of any other prompt can be restored.

Shapes: transformers holds [batch, kv_heads, tokens, head_dim] for each layer, RoPE applied; the store's layout "lthd"
is (layers, tokens, kv_heads, head_dim), in chunks. Where K and V differ in width (MLA holds a latent and a
rotated part), both stand side by side in the store, cut in two halves of one width, of which it calls the first K.
"""

from typing import Any

import torch

from kvstore.hit import Hit
from kvstore.keys import Identity
from kvstore.lookup import ELSEWHERE
from kvstore.prefix import Namespace
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers.layer import ROOM_TOKENS, RoomyLayer
from kvstored_client.integrations.transformers.probe import Shape
from kvstored_client.integrations.transformers.rows import Rows


class Attention:
    """Restores and keeps prefixes of one model whose layers all are full attention."""

    def __init__(self, guard: Guard, fields: dict[str, Any], chunk_tokens: int, shape: Shape) -> None:
        """fields: of the identity, all but the tensors' shape and type."""
        self._guard = guard
        self._shape = shape
        layout = "lthd" if shape.k_dim == shape.v_dim else f"lthd, {shape.k_dim}+{shape.v_dim} in two halves"
        self._identity = Identity(
            **fields, dtype=str(shape.dtype).removeprefix("torch."), layers=shape.layers, kv_heads=shape.kv_heads,
            head_dim=-(-(shape.k_dim + shape.v_dim) // 2), layout=layout,
        )  # fmt: skip
        self._chunk_tokens = chunk_tokens
        self._space = self._namespace(guard)

    def _namespace(self, cache: Any) -> Namespace:
        return Namespace(cache, self._identity, self._chunk_tokens)

    @torch.no_grad()
    def restore(self, rows: Rows, cache: Any, device: torch.device) -> int:
        """Fill an empty cache with the longest prefix that all rows have. Returns its length in padded positions.

        Never the last token: a cache over the whole prompt leaves the model nothing to run, and the answer is wrong.
        """
        found = [self._space.get_prefix_hits(tokens) for tokens in rows.tokens]
        length = min(pad + n for pad, (n, _) in zip(rows.pads, found, strict=True))
        length = min(length, rows.width - 1)
        if length <= min(rows.pads):
            return 0
        shape, room = self._shape, length + ROOM_TOKENS
        buffers = []
        for name, dim in (("k", shape.k_dim), ("v", shape.v_dim)):
            size = (shape.layers, len(rows.pads), shape.kv_heads, room, dim)
            whole = torch.empty(size, dtype=shape.dtype, device=device)
            for row, (_, hits) in enumerate(found):
                # Padding is masked, but a NaN left in memory times zero would still be one.
                whole[:, row, :, : rows.pads[row]] = 0
                _fill(whole[:, row, :, :length], [self._of(hit, name) for hit in hits], rows.pads[row])
            buffers.append(whole)
        cache.layers = [RoomyLayer(k, v, length) for k, v in zip(*buffers, strict=True)]
        return length

    def keep(self, prompt: Rows, whole: Rows, cache: Any, *, copy: bool = False) -> None:
        """Put what the cache holds of each row, later: the prompt as it was, and the prompt with its answer.

        copy: the caller will go on with this cache, and may write into its tensors.
        """
        length = cache.get_seq_length()
        # Layers grow by concatenation, so these very tensors are never changed: no copy is needed until they are put.
        layers = [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]
        if copy:
            layers = [(k.clone(), v.clone()) for k, v in layers]
        nbytes = sum(k.numel() * k.element_size() + v.numel() * v.element_size() for k, v in layers)
        self._guard.later(lambda: self._put(prompt, whole, layers, length), nbytes)

    @torch.no_grad()
    def _put(self, prompt: Rows, whole: Rows, layers: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        space = self._namespace(self._guard.cache)
        for row, pad in enumerate(prompt.pads):
            tokens = whole.tokens[row][: length - pad]
            n = min(len(prompt.tokens[row]), len(tokens))
            if _held(self._guard.cache, space, [tokens[:n], tokens]):
                continue
            k, v = self._halves(*(
                torch.stack([layer[which][row, :, pad : pad + len(tokens)] for layer in layers]).transpose(1, 2)
                for which in (0, 1)
            ))  # fmt: skip
            space.put_prefix(tokens[:n], k[:, :n], v[:, :n])
            if len(tokens) > n:
                space.put_prefix(tokens, k, v)

    def _halves(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as the store holds them: of one width. Where they differ, both side by side, cut in the middle."""
        if self._shape.k_dim == self._shape.v_dim:
            return k, v
        half = self._identity.head_dim
        both = torch.nn.functional.pad(torch.cat([k, v], -1), (0, 2 * half - k.shape[-1] - v.shape[-1]))
        return both[..., :half], both[..., half:]

    def _of(self, hit: Hit, name: str) -> torch.Tensor:
        """One chunk's K or V, (layers, tokens, kv_heads, dim)."""
        k_dim, v_dim = self._shape.k_dim, self._shape.v_dim
        if k_dim == v_dim:
            found: torch.Tensor = hit.tensors[name]
            return found
        both = torch.cat([hit.tensors["k"], hit.tensors["v"]], -1)
        return both[..., :k_dim] if name == "k" else both[..., k_dim : k_dim + v_dim]


def _held(cache: Any, space: Namespace, prefixes: list[list[int]]) -> bool:
    """Whether all chunks of these prefixes are held. Counts as use, as a put of them does."""
    chains = [space.keys(tokens) for tokens in prefixes]
    if any(cache.match(keys, lookup=ELSEWHERE) < len(keys) for keys in chains):
        return False
    for keys in chains:
        cache.touch(keys)
    return True


def _fill(target: torch.Tensor, chunks: list[torch.Tensor], start: int) -> None:
    """Copy chunks (layers, tokens, kv_heads, dim) into (layers, kv_heads, positions, dim) from a position."""
    for piece in chunks:
        chunk = piece.transpose(1, 2)
        end = min(start + chunk.shape[2], target.shape[2])
        if start >= end:
            return
        target[:, :, start:end] = chunk[:, :, : end - start]
        start = end
