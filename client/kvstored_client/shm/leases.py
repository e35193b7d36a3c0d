"""What a lease holds: hits whose tensors lie in the daemon's memory, until its block ends.

A lease is given back with the last reference to it, whatever that is: a window over its bytes keeps it, too.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Self, cast, overload

from kvstore import arrays
from kvstore.errors import LeaseKept, RecordCorrupt
from kvstore.hit import Hit
from kvstore.packed import arrays_in
from kvstored_client.buffers import Window
from kvstored_client.interrupts import damage
from kvstored_client.shm.blocks import Block, block_of, check_count, index_of, taken_apart
from kvstored_client.shm.mapped_device import MappedDevice
from kvstored_client.shm.pool import Connection, Segments, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb

HITS_AT_ONCE = 16
"""Hits that are made together where all are looked at in turn."""


class LeasedTensors(Mapping[str, Any]):
    """The tensors of a leased hit, made when first looked at, until the lease ends. specs: of them, once decoded."""

    def __init__(self, lease: "Lease", block: "Block") -> None:
        self._lease: Lease | None = lease
        self._block = block
        self._made: dict[str, Any] | None = None
        self.specs = block.specs

    def _held(self) -> dict[str, Any]:
        if self._lease is None:
            raise LeaseKept("this lease has ended: its tensors are only there inside the block")
        if self._made is None:
            try:
                self._made = self._lease.view(self._block)
            except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
                raise damage(error, "a block") from None
        return self._made

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def end(self) -> dict[str, Any]:
        """Let go of the tensors. Returns those that were made."""
        made, self._lease, self._made = self._made, None, None
        return {} if made is None else made


class _Held:
    """What tensors on a GPU hold of a lease."""

    __slots__ = ("__weakref__", "_lease")

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease


class Lease:
    """What one reply holds. Given back with the last reference to this: the block's, or a window's over its bytes."""

    __slots__ = ("__weakref__", "_connection", "_viewed", "framework")

    def __init__(self, connection: Connection, framework: str) -> None:
        self._connection = connection
        self.framework = framework
        self._viewed: list[tuple[Block, weakref.ref[Window] | weakref.ref[_Held]]] = []

    def view(self, block: "Block") -> dict[str, Any]:
        """Tensors over a leased block."""
        framework = self.framework
        if isinstance(block.mapping, MappedDevice):
            return self._view_there(block, block.mapping)
        window = block.mapping.window(block.start, block.nbytes, self, writable=framework == "torch")
        self._viewed.append((block, weakref.ref(window)))
        data = window.array
        tensors = {
            name: arrays.from_bytes(spec, data[at : at + nbytes], framework)
            for name, (spec, at, nbytes) in block.tensors.items()
        }
        if framework == "torch":
            # A view remembers what it is a view of, and would keep the memory after `end` has emptied it.
            tensors = {name: x.new_empty(0).set_(x) for name, x in tensors.items()}
        return tensors if block.packed is None else block.packed.given_out(tensors.values())

    def _view_there(self, block: "Block", mapping: MappedDevice) -> dict[str, Any]:
        """Tensors of torch's on the GPU, whatever the framework: no other has them."""
        held = _Held(self)
        self._viewed.append((block, weakref.ref(held)))
        tensors = {
            name: mapping.tensor(block.start + at, spec, nbytes, held)
            for name, (spec, at, nbytes) in block.tensors.items()
        }
        return {name: x.new_empty(0).set_(x) for name, x in tensors.items()}

    def end(self) -> None:
        """Raise RecordCorrupt where a block was used again while it was read, LeaseKept where one still is."""
        for block, _ in self._viewed:
            if block.is_gone():
                raise RecordCorrupt(
                    "this lease ended before its block did (server.lease_max_s): what was read may be wrong"
                )
        for _, window in self._viewed:
            if window() is not None:
                raise LeaseKept("a tensor of this lease is still referred to: copy it inside the block")

    def __del__(self) -> None:
        # Only so that it is soon: that it ended is known to the connection already.
        self._connection.wake()


class LeasedHits(Sequence[Hit | None]):
    """The hits of a lease, by position, each made when it is looked at: who reads one of a hundred pays for one."""

    def __init__(
        self, lease: Lease, segments: Segments, reply: pb.LeaseReply, keys: Sequence[bytes], *, leading: bool
    ) -> None:
        self._lease: Lease | None = lease
        self._segments = segments
        self._reply = reply
        self._keys = keys
        self._made: dict[int, Hit] = {}
        check_count(reply, len(keys))
        self._items: Sequence[pb.Leased | bytes | None] = reply.leased
        if not reply.complete:
            items: list[pb.Leased | None] = [None] * len(keys)
            for item in map(taken_apart, reply.leased):
                items[index_of(item.header.index, len(keys))] = item
            self._items = items[: items.index(None)] if leading and None in items else items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, at: int) -> Hit | None: ...

    @overload
    def __getitem__(self, at: slice) -> list[Hit | None]: ...

    def __getitem__(self, at: int | slice) -> Hit | list[Hit | None] | None:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        item = self._items[at]
        if item is None:
            return None
        at %= len(self._items)
        hit = self._made.get(at)
        if hit is None:
            lease, (block,) = self._blocks((item,))
            hit = self._made[at] = block.hit(self._reply, item, self._keys[at], LeasedTensors(lease, block))
        return hit

    def __iter__(self) -> Iterator[Hit | None]:
        runs = (range(at, min(at + HITS_AT_ONCE, len(self))) for at in range(0, len(self), HITS_AT_ONCE))
        return chain.from_iterable(map(self._run, runs))

    def _run(self, positions: Sequence[int]) -> list[Hit | None]:
        """Hits made together, but for those that were looked at already."""
        items = [(at, item) for at in positions if at not in self._made and (item := self._items[at]) is not None]
        lease, blocks = self._blocks([item for _, item in items])
        tensors = [LeasedTensors(lease, block) for block in blocks]
        for (at, item), block, own in zip(items, blocks, tensors, strict=True):
            self._made[at] = block.hit(self._reply, item, self._keys[at], own)
        return [self._made.get(at) for at in positions]

    def _blocks(self, items: Sequence[pb.Leased | bytes]) -> tuple[Lease, list[Block]]:
        """The blocks of items, and the lease that holds them."""
        if self._lease is None:
            raise LeaseKept("this lease has ended: its hits are only there inside the block")
        try:
            return self._lease, [block_of(self._segments, item) for item in items]
        except UseStream as error:
            raise RecordCorrupt(f"what the daemon says of a block cannot be: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        lease, self._lease = self._lease, None
        _emptied([cast("LeasedTensors", hit.tensors).end() for hit in self._made.values()])
        if kind is None and lease is not None:
            lease.end()


def _emptied(made: Sequence[dict[str, Any]]) -> None:
    """Tensors of torch's that were handed out become empty, whoever holds them. No name for one is left afterwards."""
    for tensors in made:
        for x in filter(arrays.is_torch, arrays_in(tensors)):
            x.set_()
