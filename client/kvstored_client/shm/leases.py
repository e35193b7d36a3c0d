"""What a lease holds: hits whose tensors lie in the daemon's memory, until its block ends.

A lease is given back with the last reference to it, whatever that is: a window over its bytes keeps it, too.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast, overload

import numpy as np

from kvstore import arrays
from kvstore.errors import LeaseKept, RecordCorrupt
from kvstore.hit import Hit
from kvstored_client.buffers import Window
from kvstored_client.interrupts import damage
from kvstored_client.shm.gets import Block, block_of, items_of
from kvstored_client.shm.mapped_device import MappedDevice
from kvstored_client.shm.mapping import MappedSegment
from kvstored_client.shm.pool import Connection, ConnectionPool, Segments, UseStream
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import get_call
from kvstored_client.wire.messages import GetOptions

HITS_AT_ONCE = 16
"""Hits that are made together where all are looked at in turn."""


def lease(
    pool: ConnectionPool,
    hand: list[Connection],
    keys: Sequence[bytes],
    how: GetOptions,
    framework: str,
    tails: Sequence[bytes],
) -> "LeasedHits":
    """The bytes themselves, until the hits end. tails: see `LeasedHits.first_tail`. Raises as `gets.get`."""
    connection = pool.take(hand)
    reply = connection.exchange(get_call(keys, how.asking_for(tails)), pool.timeout_s)
    if how.device:
        connection.segments.let_go()
    items = items_of(reply, len(keys), leading=how.leading)
    owner = Lease(connection, framework)
    hits = LeasedHits(owner, connection.segments, reply, items, keys)
    connection.hold(owner, reply.lease)
    return hits


class LeasedTensors(Mapping[str, Any]):
    """The tensors of a leased hit, made when first looked at, until the lease ends. specs: of them, once decoded.

    together: those of hits that were made with this one, if any. The first that is looked at makes the tensors of all.
    """

    def __init__(self, lease: "Lease", block: "Block", together: "Sequence[weakref.ref[LeasedTensors]]") -> None:
        self._lease: Lease | None = lease
        self._together = together
        self.block = block
        self.made: dict[str, Any] | None = None
        self.arrays: list[Any] = []
        """All that was made: the tensors, or the parts of packed ones."""
        self.specs = block.specs

    def _held(self) -> dict[str, Any]:
        if self._lease is None:
            raise LeaseKept("this lease has ended: its tensors are only there inside the block")
        if self.made is None:
            try:
                others = [of for ref in self._together if (of := ref()) is not None and of.made is None]
                self._lease.view(others or [self])
            except Exception as error:  # noqa: BLE001 - the boundary; interrupts pass it
                raise damage(error, "a block") from None
            assert self.made is not None
        return self.made

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def end(self) -> None:
        """Let go of the tensors. Those of torch's become empty, whoever holds them: no name for one is left here."""
        made, self.arrays = self.arrays, []
        self._lease = self.made = None
        for x in made:
            if not isinstance(x, np.ndarray):
                x.set_()


class _Held:
    """What tensors on a GPU hold of a lease."""

    __slots__ = ("__weakref__", "_lease")

    def __init__(self, lease: "Lease") -> None:
        self._lease = lease


class Lease:
    """What one reply holds. Given back with the last reference to this: the block's, or a window's over its bytes."""

    __slots__ = ("__weakref__", "_connection", "_owners", "_viewed", "framework")

    def __init__(self, connection: Connection, framework: str) -> None:
        self._connection = connection
        self.framework = framework
        self._viewed: list[Block] = []
        self._owners: list[weakref.ref[Window] | weakref.ref[_Held]] = []

    def view(self, wanted: "Sequence[LeasedTensors]") -> None:
        """Make tensors over leased blocks."""
        windows: dict[MappedSegment, Window] = {}
        for of in wanted:
            block, mapping = of.block, of.block.mapping
            self._viewed.append(block)
            if isinstance(mapping, MappedDevice):
                of.arrays = self._view_there(block, mapping)
                continue
            window = windows.get(mapping)
            if window is None:  # over all of the segment; whatever is made of it keeps this lease
                writable = self.framework == "torch"
                window = windows[mapping] = Window(mapping.address, mapping.nbytes, (mapping, self), writable=writable)
                # Kept here it would keep itself.
                self._owners.append(weakref.ref(window))
            data, start = np.asarray(window), block.start
            of.arrays = [
                arrays.from_bytes(spec, data[start + at : start + at + nbytes], self.framework)
                for spec, at, nbytes in block.tensors.values()
            ]
        for of in wanted:
            named = dict(zip(of.block.tensors, of.arrays, strict=True))
            of.made = named if of.block.packed is None else of.block.packed.given_out(of.arrays)

    def _view_there(self, block: "Block", mapping: MappedDevice) -> list[Any]:
        """Tensors of torch's on the GPU, whatever the framework: no other has them."""
        held = _Held(self)
        self._owners.append(weakref.ref(held))
        lying = block.tensors.values()
        tensors = [mapping.tensor(block.start + at, spec, nbytes, held) for spec, at, nbytes in lying]
        # A view remembers what it is a view of, and would keep the memory after `end` has emptied it.
        return [x.new_empty(0).set_(x) for x in tensors]

    def end(self) -> None:
        """Raise RecordCorrupt where a block was used again while it was read, LeaseKept where one still is."""
        for block in self._viewed:
            if block.is_gone():
                raise RecordCorrupt(
                    "this lease ended before its block did (server.lease_max_s): what was read may be wrong"
                )
        for owner in self._owners:
            if owner() is not None:
                raise LeaseKept("a tensor of this lease is still referred to: copy it inside the block")

    def __del__(self) -> None:
        # Only so that it is soon: that it ended is known to the connection already.
        self._connection.wake()


class LeasedHits(Sequence[Hit | None]):
    """The hits of a lease, by position, each made when it is looked at: who reads one of a hundred pays for one."""

    def __init__(
        self,
        lease: Lease,
        segments: Segments,
        reply: pb.LeaseReply,
        items: "Sequence[pb.Leased | bytes | None]",
        keys: Sequence[bytes],
    ) -> None:
        """items: what the reply says of each key."""
        self._lease: Lease | None = lease
        self._segments = segments
        self._reply = reply
        self._items = items
        self._keys = keys
        self._made: dict[int, Hit] = {}
        self.first_tail = reply.tail - 1 if reply.tail else None
        """Which of the tails that were asked for is the first held, their number if none is; None: nobody looked."""

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
            hit = self._made[at] = block.hit(self._reply, item, self._keys[at], LeasedTensors(lease, block, ()))
        return hit

    def __iter__(self) -> Iterator[Hit | None]:
        runs = (range(at, min(at + HITS_AT_ONCE, len(self))) for at in range(0, len(self), HITS_AT_ONCE))
        return chain.from_iterable(map(self._run, runs))

    def _run(self, positions: Sequence[int]) -> list[Hit | None]:
        """Hits made together, but for those that were looked at already."""
        items = [(at, item) for at in positions if at not in self._made and (item := self._items[at]) is not None]
        lease, blocks = self._blocks([item for _, item in items])
        together: list[weakref.ref[LeasedTensors]] = []
        tensors = [LeasedTensors(lease, block, together) for block in blocks]
        together += map(weakref.ref, tensors)
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

    def end(self, *, interrupted: bool) -> None:
        """The block is left: let go of everything. interrupted: by an exception, which is told instead of what follows.

        Raises as `Lease.end`.
        """
        lease, self._lease = self._lease, None
        for hit in self._made.values():
            cast("LeasedTensors", hit.tensors).end()
        if not interrupted and lease is not None:
            lease.end()
