"""The paged buffers of a vLLM worker: blocks gathered into a few tensors of all layers, and written back to others.

What an entry holds, for a chunk of B blocks of T tokens, L layers:

    k, v    (L, B * T, heads, head_dim), of layers (blocks, 2, T, heads, head_dim)
    kv      (L, B, heads, T, 2 * head_dim), of layers where K and V lie side by side: (blocks, heads, T, 2 * head_dim)
    latent  (L, B * T, size), of MLA's layers (blocks, T, size): one for keys and values

A few tensors, and not one a layer, since each tensor costs a call as much as some KiB of its bytes. Layers of several
shapes or types have a set of tensors each, numbered: `k.0`, `k.1`. The names say what is K and what is V: codecs below
the hot tier go by them. Moved as they are, bit for bit; floats of 8 bits travel as bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_APART_DIM = 5
"""(blocks, 2, tokens, heads, head_dim)."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of an entry. layers: views of the paged buffers, the block first.

    joined: blocks and tokens are one dimension of the entry's tensor.
    """

    name: str
    layers: tuple[torch.Tensor, ...]
    joined: bool

    def spec(self, blocks: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a chunk's tensor."""
        each = self.layers[0]
        inner = (blocks * each.shape[1], *each.shape[2:]) if self.joined else (blocks, *each.shape[1:])
        return (len(self.layers), *inner), each.dtype


class PagedBuffers:
    """Of one worker. kv_caches: by layer's name, the block is their first dimension."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], head_dim: int) -> None:
        kinds: dict[tuple[object, ...], list[torch.Tensor]] = {}
        for _, layer in sorted(kv_caches.items()):
            kinds.setdefault((layer.shape[1:], layer.dtype), []).append(_bytes_of_float8(layer))
        self._parts: list[_Part] = []
        for at, layers in enumerate(kinds.values()):
            number = f".{at}" if len(kinds) > 1 else ""
            self._parts += [_Part(name + number, part, joined) for name, part, joined in _split(layers, head_dim)]

    def block_nbytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(layer[0].numel() * layer.element_size() for part in self._parts for layer in part.layers)

    def gather(self, blocks: Sequence[int]) -> dict[str, torch.Tensor]:
        """A chunk's tensors in CPU memory, copied: the blocks may be used anew at once. Waits for the device."""
        found = {}
        for part in self._parts:
            first = part.layers[0]
            at = torch.tensor(blocks, device=first.device)
            whole = torch.empty(
                (len(part.layers), len(blocks), *first.shape[1:]), dtype=first.dtype, device=first.device
            )
            for out, layer in zip(whole, part.layers, strict=True):
                torch.index_select(layer, 0, at, out=out)
            found[part.name] = (whole.flatten(1, 2) if part.joined else whole).cpu()
        return found

    def fill(self, blocks: Sequence[int], tensors: Mapping[str, torch.Tensor], of: int, first: int = 0) -> bool:
        """Write blocks of a chunk, from its `first` one on, to these places. of: how many blocks the chunk has.

        False: the tensors are not such a chunk's, and nothing was written.
        """
        wanted = {part.name: part.spec(of) for part in self._parts}
        if {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()} != wanted:
            return False
        for part in self._parts:
            each = part.layers[0]
            whole = tensors[part.name]
            if part.joined:
                whole = whole.view(len(part.layers), of, each.shape[1], *whole.shape[2:])
            chosen = whole[:, first : first + len(blocks)].to(each.device)
            at = torch.tensor(blocks, device=each.device)
            for layer, x in zip(part.layers, chosen, strict=True):
                layer.index_copy_(0, at, x)
        return True


def _split(layers: Sequence[torch.Tensor], head_dim: int) -> list[tuple[str, tuple[torch.Tensor, ...], bool]]:
    """Layers of one shape as parts: name, views, joined."""
    first = layers[0]
    if first.shape[-1] == 2 * head_dim:
        return [("kv", tuple(layers), False)]  # side by side in the last dimension
    if first.dim() == _APART_DIM and first.shape[1] == 2:  # K and V
        return [(name, tuple(layer[:, i] for layer in layers), True) for i, name in enumerate("kv")]
    return [("latent", tuple(layers), True)]


def _bytes_of_float8(layer: torch.Tensor) -> torch.Tensor:
    return layer.view(torch.uint8) if layer.element_size() == 1 else layer
