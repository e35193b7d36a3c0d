"""Full attention: K and V of every token are kept, so any shared prefix of any other prompt can be restored.

Shapes: transformers holds [batch, kv_heads, tokens, head_dim] for each layer, RoPE applied; the store's layout "lthd"
is (layers, tokens, kv_heads, head_dim), in chunks. Where K and V differ in width (MLA holds a latent and a
rotated part), both stand side by side in the store, cut in two halves of one width, of which it calls the first K.
"""

from typing import Any, NamedTuple

import torch

from kvstore.keys import Identity
from kvstore.lookup import ELSEWHERE
from kvstore.prefix import Namespace
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.transformers.layer import ROOM_TOKENS, RoomyLayer
from kvstored_client.integrations.transformers.memory import empty_pair
from kvstored_client.integrations.transformers.probe import Shape
from kvstored_client.integrations.transformers.rows import Rows


class Restored(NamedTuple):
    """length: padded positions that layers hold. whole: of each row all is held, the last token too."""

    length: int
    whole: bool
    layers: list[Any]


NOTHING = Restored(0, whole=False, layers=[])


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
    def restore(self, rows: Rows, device: torch.device, room_tokens: int = ROOM_TOKENS) -> Restored:
        """The layers of a cache with the longest prefix that all rows have. room_tokens: for what will be added.

        Never the last token: a cache over the whole prompt leaves the model nothing to run, and the answer is wrong.
        """
        shape, room = self._shape, rows.width + room_tokens
        size = (shape.layers, len(rows.pads), shape.kv_heads, room)
        k, v = empty_pair(size, (shape.k_dim, shape.v_dim), shape.dtype, device)
        length, whole = rows.width - 1, True
        for row, (tokens, pad) in enumerate(zip(rows.tokens, rows.pads, strict=True)):
            n = self._fill(tokens, *(x[:, row, :, pad:].transpose(1, 2) for x in (k, v)))
            length, whole = min(length, pad + n), whole and n == len(tokens)
            if length <= min(rows.pads):
                return NOTHING
            # Padding is masked, but a NaN left in memory times zero would still be one.
            k[:, row, :, :pad] = 0
            v[:, row, :, :pad] = 0
        return Restored(length, whole, [RoomyLayer(*each, length) for each in zip(k, v, strict=True)])

    def _fill(self, tokens: list[int], k: torch.Tensor, v: torch.Tensor) -> int:
        """Fill (layers, positions, kv_heads, dim) from the front, right out of the store's memory. Returns how many."""
        if self._shape.k_dim == self._shape.v_dim:
            return self._space.fill_prefix(tokens, k, v)
        size = (k.shape[0], len(tokens), k.shape[2], self._identity.head_dim)
        halves = [torch.empty(size, dtype=k.dtype, device=k.device) for _ in range(2)]
        n = self._space.fill_prefix(tokens, *halves)
        both = torch.cat([x[:, :n] for x in halves], -1)
        k_dim, v_dim = self._shape.k_dim, self._shape.v_dim
        k[:, :n], v[:, :n] = both[..., :k_dim], both[..., k_dim : k_dim + v_dim]
        return n

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
        computed = self._guard.before({"k": k, "v": v} for k, v in layers)

        def put() -> None:
            if computed is not None:
                computed()  # the writer's stream of a GPU waits for nobody
            self._put(prompt, whole, layers, length)

        self._guard.later(put, nbytes)

    @torch.no_grad()
    def _put(self, prompt: Rows, whole: Rows, layers: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        space = self._namespace(self._guard.cache)
        for row, pad in enumerate(prompt.pads):
            tokens = whole.tokens[row][: length - pad]
            n = min(len(prompt.tokens[row]), len(tokens))
            if _held(self._guard.cache, space, [tokens[:n], tokens]):
                continue
            pairs = [(k[row, :, pad : pad + len(tokens)], v[row, :, pad : pad + len(tokens)]) for k, v in layers]
            k, v = self._halves(*_on_host(pairs))
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


def _held(cache: Any, space: Namespace, prefixes: list[list[int]]) -> bool:
    """Whether all chunks of these prefixes are held. Counts as use, as a put of them does."""
    chains = [space.keys(tokens) for tokens in prefixes]
    if any(cache.match(keys, lookup=ELSEWHERE) < len(keys) for keys in chains):
        return False
    for keys in chains:
        cache.touch(keys)
    return True


def _on_host(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of layers (kv_heads, tokens, dim) as (layers, tokens, kv_heads, dim) in this machine's memory.

    One layer after the other: on a GPU all at once would be a second copy of all keys and values there.
    """
    heads, tokens, _ = layers[0][0].shape
    k_dim, v_dim = (x.shape[-1] for x in layers[0])
    whole = empty_pair((len(layers), tokens, heads), (k_dim, v_dim), layers[0][0].dtype, torch.device("cpu"))
    for i, layer in enumerate(layers):
        for to, x in zip(whole, layer, strict=True):
            to[i].copy_(x.transpose(0, 1))
    return whole
