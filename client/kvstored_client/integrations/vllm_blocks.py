"""The paged buffers of a vLLM worker: blocks gathered into a few tensors of all layers, and written back to others.

What an entry holds, for a chunk of B blocks of T tokens, L layers:

    k, v    (L, B * T, heads, head_dim), of layers (blocks, 2, T, heads, head_dim)
    kv      (L, B, heads, T, 2 * head_dim), of layers where K and V lie side by side: (blocks, heads, T, 2 * head_dim)
    latent  (L, B * T, size), of MLA's layers (blocks, T, size): one for keys and values

A few tensors, and not one a layer, since each tensor costs a call as much as some KiB of its bytes. Layers of several
shapes or types have a set of tensors each, numbered: `k.0`, `k.1`. The names say what is K and what is V: codecs below
the hot tier go by them. Moved as they are, bit for bit; floats of 8 bits travel as bytes.

Buffers in CPU memory whose layers lie at equal distances, as one allocation after the other does, are one strided array
of numpy's for all layers: a chunk is one assignment for each of its tensors, before a step or beside it. Other blocks
that lie in a few runs are written by one call for all layers: a thread beside the engine's steps that made a call a
layer would wait for the interpreter's lock after each.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from kvstore.dtypes import TensorSpec
from kvstored_client.device import settle_stream
from kvstored_client.device.paged import Paged
from kvstored_client.integrations.vllm_groups import Groups, Places, leading_gone

_APART_DIM = 5
"""(blocks, 2, tokens, heads, head_dim)."""
_RUNS_MAX = 4
"""Runs of places that are written by slices; more are written by their numbers."""
_STRIPE_LAYERS = 4
"""Layers that a strided array has at least, on average. By their names 2 comes after 19, so 32 layers are 7 arrays."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Kind:
    """Layers of one shape and type."""

    def __init__(self, layers: Sequence[torch.Tensor], head_dim: int, number: str) -> None:
        self.layers = [layer.view(torch.uint8) if layer.element_size() == 1 else layer for layer in layers]
        first = self.layers[0]
        self.dtype, self.device = first.dtype, first.device
        if first.shape[-1] == 2 * head_dim:  # side by side in the last dimension
            self.names, self.joined = [f"kv{number}"], False
        elif first.dim() == _APART_DIM and first.shape[1] == 2:  # K and V
            self.names, self.joined = [f"k{number}", f"v{number}"], True
        else:
            self.names, self.joined = [f"latent{number}"], True
        self.block_shape = tuple(first.shape[1:] if len(self.names) == 1 else first.shape[2:])
        self.arrays: list[Any] = []
        if first.device.type == "cpu" and all(layer.is_contiguous() for layer in layers):
            self.arrays = [_array(layer) for layer in self.layers]
        self._stripes = _stripes(self.arrays)
        self._targets = [
            self.layers if len(self.names) == 1 else [layer[:, i] for layer in self.layers]
            for i in range(len(self.names))
        ]
        """Of each tensor of an entry, views of where it lies in each layer."""

    def gather(self, blocks: Sequence[int]) -> torch.Tensor:
        """(layers, blocks, ...), a copy where they are. On a device it is there when its stream comes to it."""
        if self.device.type != "cpu":
            return self._gather_there(blocks)
        shape = (len(self.layers), len(blocks), *self.layers[0].shape[1:])
        whole = torch.empty(shape, dtype=self.dtype)
        runs = list(_runs(blocks))
        if self._stripes and len(runs) <= _RUNS_MAX:
            into = _array(whole)
            for (lo, hi, stripe), (start, end) in product(self._stripes, runs):
                into[lo:hi, start:end] = stripe[:, blocks[start] : blocks[start] + end - start]
            return whole
        if self.arrays:
            at = np.array(blocks)
            for out, array in zip(_array(whole), self.arrays, strict=True):
                array.take(at, 0, out, "clip")  # "raise", the default, copies once more
            return whole
        index = torch.tensor(blocks)
        for one, layer in zip(whole, self.layers, strict=True):
            torch.index_select(layer, 0, index, out=one)
        return whole

    def _gather_there(self, blocks: Sequence[int]) -> torch.Tensor:
        """Each tensor of the entry lies dense, so that it crosses the bus as it is."""
        shape = (len(self.names), len(self.layers), len(blocks), *self.block_shape)
        whole, runs = self.layers[0].new_empty(shape), list(_runs(blocks))
        index = _index(blocks, self.layers[0]) if len(runs) > _RUNS_MAX else None
        for x, layers in zip(whole, self._targets, strict=True):
            if index is not None:
                for one, layer in zip(x, layers, strict=True):
                    torch.index_select(layer, 0, index, out=one)
                continue
            for start, end in runs:
                place = blocks[start]
                torch._foreach_copy_(
                    list(x[:, start:end].unbind(0)), [layer[place : place + end - start] for layer in layers]
                )
        return whole.movedim(0, 2) if len(self.names) > 1 else whole[0]

    def parts(self, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """What was gathered, as an entry has it."""
        split = [whole] if len(self.names) == 1 else [whole[:, :, i] for i in range(len(self.names))]
        return {name: part.flatten(1, 2) if self.joined else part for name, part in zip(self.names, split, strict=True)}

    def spec(self, blocks: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of each of its tensors in a chunk of so many blocks."""
        inner = (blocks * self.block_shape[0], *self.block_shape[1:]) if self.joined else (blocks, *self.block_shape)
        return (len(self.layers), *inner), self.dtype

    def empty(self, blocks: int) -> dict[str, torch.Tensor]:
        """Tensors of a chunk of so many blocks to fill, where the layers are."""
        shape, _ = self.spec(blocks)
        return {name: self.layers[0].new_empty(shape) for name in self.names}

    def paged(self, blocks: Sequence[int], of: int, first: int) -> dict[str, Paged]:
        """See `PagedBuffers.paged`."""
        if len(self.names) == 1:
            return {}
        shape, dtype = self.spec(of)
        spec = TensorSpec(str(dtype).removeprefix("torch."), shape)
        places = [-1] * of
        places[first : first + len(blocks)] = blocks
        return {name: Paged(spec, layers, places) for name, layers in zip(self.names, self._targets, strict=True)}

    def fill(self, blocks: Sequence[int], tensors: Mapping[str, torch.Tensor], of: int, first: int) -> None:
        """See `PagedBuffers.fill`; the tensors are such a chunk's."""
        if self._stripes:
            self._fill_stripes(blocks, tensors, of, first)
            return
        runs = list(_runs(blocks))
        places: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for name, layers in zip(self.names, self._targets, strict=True):
            whole = tensors[name].view(len(layers), of, *self.block_shape)[:, first : first + len(blocks)]
            whole = whole if whole.device == self.device else whole.to(self.device)
            if len(runs) > _RUNS_MAX:
                index = _index(blocks, self.layers[0])
                for layer, x in zip(layers, whole, strict=True):
                    layer.index_copy_(0, index, x)
                continue
            for start, end in runs:
                place = blocks[start]
                places += [layer[place : place + end - start] for layer in layers]
                values += whole[:, start:end].unbind(0)
        if places:
            torch._foreach_copy_(places, values)

    def _fill_stripes(self, blocks: Sequence[int], tensors: Mapping[str, torch.Tensor], of: int, first: int) -> None:
        runs = list(_runs(blocks))
        at = np.array(blocks) if len(runs) > _RUNS_MAX else None
        for i, name in enumerate(self.names):
            found = _array(tensors[name]).reshape(len(self.layers), of, *self.block_shape)[:, first:]
            for lo, hi, stripe in self._stripes:
                into = stripe if len(self.names) == 1 else stripe[:, :, i]
                if at is not None:
                    into[:, at] = found[lo:hi, : len(blocks)]
                    continue
                for start, end in runs:
                    into[:, blocks[start] : blocks[start] + end - start] = found[lo:hi, start:end]


class PagedBuffers:
    """Of one worker. kv_caches: by layer's name, the block is their first dimension."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], head_dim: int) -> None:
        kinds: dict[tuple[object, ...], list[torch.Tensor]] = {}
        for _, layer in sorted(kv_caches.items()):
            kinds.setdefault((layer.shape[1:], layer.dtype), []).append(layer)
        self._kinds = [
            _Kind(layers, head_dim, f".{at}" if len(kinds) > 1 else "") for at, layers in enumerate(kinds.values())
        ]
        self._block_nbytes = sum(x[0].numel() * x.element_size() for kind in self._kinds for x in kind.layers)

    def block_nbytes(self) -> int:
        """Bytes of one block over all layers."""
        return self._block_nbytes

    def gather(self, blocks: Sequence[int]) -> list[torch.Tensor]:
        """A chunk, copied: the blocks may be used anew at once, on a device by what its stream is to do later."""
        return [kind.gather(blocks) for kind in self._kinds]

    def entry(self, gathered: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of an entry, of what was gathered. May copy: not for the thread that the batch waits for."""
        return {
            name: part
            for kind, whole in zip(self._kinds, gathered, strict=True)
            for name, part in kind.parts(whole).items()
        }

    @property
    def on_gpu(self) -> bool:
        """Whether all layers are on one."""
        return bool(self._kinds) and all(layer.is_cuda for kind in self._kinds for layer in kind.layers)

    def settle(self) -> None:
        """Return once what was written is there for every stream: steps run on others than a thread beside them."""
        for kind in self._kinds:
            if kind.device.type == "cuda":
                settle_stream(kind.device)

    def empty(self, of: int) -> dict[str, torch.Tensor]:
        """Tensors of a chunk of so many blocks, where the layers are: what came encoded is decoded into them."""
        return {name: x for kind in self._kinds for name, x in kind.empty(of).items()}

    def specs(self, of: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of the tensors of a chunk of so many blocks, by name, as `packed.specs_of`."""
        found = ((name, kind.spec(of)) for kind in self._kinds for name in kind.names)
        return {name: (str(dtype).removeprefix("torch."), shape) for name, (shape, dtype) in found}

    def paged(self, blocks: Sequence[int], of: int, first: int) -> dict[str, Paged]:
        """Where the tensors of a chunk go, as for `fill`: those that a GPU can decode right into their places."""
        return {name: place for kind in self._kinds for name, place in kind.paged(blocks, of, first).items()}

    def fill(self, blocks: Sequence[int], tensors: Mapping[str, torch.Tensor], of: int, first: int = 0) -> bool:
        """Write blocks of a chunk, from its `first` one on, to these places. of: how many blocks the chunk has.

        False: the tensors are not such a chunk's, and nothing was written.
        """
        wanted = {name: kind.spec(of) for kind in self._kinds for name in kind.names}
        if {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()} != wanted:
            return False
        for kind in self._kinds:
            kind.fill(blocks, tensors, of, first)
        return True


class GroupedBuffers:
    """Of one worker, of all cache groups. A chunk has the tensors of all of them: `g1.k` is the second group's `k`.

    Of a model with one group the tensors have their plain names.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], groups: Groups) -> None:
        self._groups: list[tuple[PagedBuffers, bool]] = []
        for group in groups.all:
            own = {name: kv_caches[name] for name in group.layers if name in kv_caches} if groups.several else kv_caches
            self._groups.append((PagedBuffers(own, group.head_dim), group.reach is not None))
        self._prefixes = [f"g{at}." if groups.several else "" for at in range(len(self._groups))]
        self.on_gpu = bool(self._groups) and all(buffers.on_gpu for buffers, _ in self._groups)
        """Whether all layers are on one. Asked before each load, on the forward's thread."""

    def block_nbytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(buffers.block_nbytes() for buffers, _ in self._groups)

    def gather(self, places: Places) -> list[list[torch.Tensor]]:
        """A chunk, copied: see `PagedBuffers.gather`."""
        found = []
        for (buffers, windowed), blocks in zip(self._groups, places, strict=True):
            whole = buffers.gather(blocks)
            if windowed and (gone := leading_gone(blocks)):
                for x in whole:
                    x[:, :gone] = 0
            found.append(whole)
        return found

    def entry(self, gathered: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of an entry, of what was gathered: see `PagedBuffers.entry`."""
        return {
            prefix + name: part
            for prefix, (buffers, _), own in zip(self._prefixes, self._groups, gathered, strict=True)
            for name, part in buffers.entry(own).items()
        }

    def settle(self) -> None:
        """See `PagedBuffers.settle`."""
        for buffers, _ in self._groups:
            buffers.settle()

    def empty(self, of: int) -> dict[str, torch.Tensor]:
        """See `PagedBuffers.empty`."""
        both = zip(self._prefixes, self._groups, strict=True)
        return {prefix + name: x for prefix, (buffers, _) in both for name, x in buffers.empty(of).items()}

    def specs(self, of: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `PagedBuffers.specs`."""
        both = zip(self._prefixes, self._groups, strict=True)
        return {prefix + name: spec for prefix, (buffers, _) in both for name, spec in buffers.specs(of).items()}

    def paged(self, places: Places, of: int, first: int = 0) -> dict[str, Paged]:
        """See `PagedBuffers.paged`; but for blocks that a window has let go of."""
        found: dict[str, Paged] = {}
        for prefix, (buffers, windowed), blocks in zip(self._prefixes, self._groups, places, strict=True):
            gone = leading_gone(blocks) if windowed else 0
            own = buffers.paged(blocks[gone:], of, first + gone)
            found.update({prefix + name: place for name, place in own.items()})
        return found

    def fill(self, places: Places, tensors: Mapping[str, torch.Tensor], of: int, first: int = 0) -> bool:
        """Write blocks of a chunk, as `PagedBuffers.fill`, but for those that a window has let go of.

        False: the tensors are not such a chunk's. Some groups may have been written.
        """
        for prefix, (buffers, windowed), blocks in zip(self._prefixes, self._groups, places, strict=True):
            own = tensors
            if prefix:
                own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            gone = leading_gone(blocks) if windowed else 0
            if not buffers.fill(blocks[gone:], own, of, first + gone):
                return False
        return True


def _index(blocks: Sequence[int], beside: torch.Tensor) -> torch.Tensor:
    """Their numbers where a tensor is. Does not wait for its device, as `torch.tensor(device=)` does."""
    return beside.new_empty(len(blocks), dtype=torch.int64).copy_(torch.tensor(blocks), non_blocking=True)


def _array(tensor: torch.Tensor) -> Any:
    """A numpy view of its bytes, as integers: numpy knows no bfloat16."""
    return tensor.detach().view(_INTEGERS[tensor.element_size()]).numpy()


def _stripes(arrays: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """(first layer, one behind the last, all of them as one array) of layers at equal distances; [] where few are.

    An array of a stripe keeps the memory of its first layer only: who has it keeps the layers.
    """
    places = [array.ctypes.data for array in arrays]
    found: list[tuple[int, int, Any]] = []
    lo = 0
    while lo < len(places):
        hi = min(lo + 2, len(places))
        step = places[hi - 1] - places[lo]
        while hi < len(places) and places[hi] - places[hi - 1] == step:
            hi += 1
        one = arrays[lo]
        shape, strides = (hi - lo, *one.shape), (step, *one.strides)
        found.append((lo, hi, np.lib.stride_tricks.as_strided(one, shape, strides)))
        lo = hi
    return found if len(found) * _STRIPE_LAYERS <= len(places) else []


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose places follow each other: as an allocator gives them that has much free."""
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            yield start, at
            start = at
