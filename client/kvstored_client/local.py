"""Get, lease and put through shared memory: what `Client` does when daemon and worker share a host.

A get copies out of the daemon's segment and checks afterwards that the block was not used again meanwhile; a lease
hands out the bytes themselves; a put fills the connection's own ingest segment and the daemon copies from there.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvstore import arrays
from kvstore.errors import KvstoreError
from kvstore.hit import Hit, TensorInfo
from kvstore.region import layout
from kvstored_client._pb import cache_pb2 as pb
from kvstored_client.frames import Bytes
from kvstored_client.mapping import Copier, Window
from kvstored_client.messages import PAYLOAD_BYTES_PER_S, TIER_NAMES, read_receipt, read_specs
from kvstored_client.near import Connection, Near, UseStream
from kvstored_client.receive import check_out, is_direct
from kvstored_client.send import Outgoing

KEYS_PER_PACKET = 512
COMMIT_NBYTES = 64 << 20
"""Payload of one commit: what a connection's ingest segments need to hold for a batch of any length."""


class LeaseKept(KvstoreError):
    """A tensor of a lease is still referred to after its block: copy what is needed inside."""


class LeasedTensors(Mapping[str, Any]):
    """The tensors of a leased hit, until the lease ends."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors: dict[str, Any] | None = tensors

    def _held(self) -> dict[str, Any]:
        if self._tensors is None:
            raise LeaseKept("this lease has ended: its tensors are only there inside the block")
        return self._tensors

    def __getitem__(self, name: str) -> Any:
        return self._held()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def end(self) -> None:
        """Let go of the tensors; torch tensors handed out become empty, whoever holds them."""
        for x in (self._tensors or {}).values():
            if arrays.is_torch(x):
                x.set_()
        self._tensors = None


def get(
    near: Near, keys: list[bytes], framework: str, *, leading: bool, out: Mapping[str, Any] | None
) -> tuple[list[Hit | None], int, int]:
    """(hits by position, stale blocks, boot epoch). Raises UseStream, Silent, OutMismatch or the daemon's error."""
    hits: list[Hit | None] = [None] * len(keys)
    stale = epoch = 0
    with near.connection() as connection:
        for start in range(0, len(keys), KEYS_PER_PACKET):
            part = keys[start : start + KEYS_PER_PACKET]
            call = pb.LeaseCall(get=pb.GetRequest(keys=part, leading=leading))
            reply = connection.call(call, near.timeout_s)
            epoch = reply.boot_epoch
            try:
                for item in reply.leased:
                    index = start + item.header.index
                    hits[index] = _copied(near.copier, connection, item, keys[index], framework, out)
                    stale += hits[index] is None
            finally:
                connection.release(reply.lease)
            if leading and len(reply.leased) < len(part):
                break
    return hits, stale, epoch


def _copied(
    copier: Copier, connection: Connection, item: pb.Leased, key: bytes, framework: str, out: Mapping[str, Any] | None
) -> Hit | None:
    specs, block, places = _block(connection, item)
    if out is not None:
        check_out(specs, out)
    tensors: dict[str, Any] = {}
    for name, spec in specs.items():
        at, nbytes = places[name]
        source = block[at : at + nbytes]
        if out is not None and is_direct(out[name]):
            copier.copy(arrays.as_bytes(out[name]), source)
            tensors[name] = out[name]
            continue
        fresh = np.empty(nbytes, dtype=np.uint8)
        copier.copy(fresh, source)
        tensors[name] = arrays.from_bytes(spec, fresh, framework if out is None else "torch")
        if out is not None:
            out[name].copy_(tensors[name])
            tensors[name] = out[name]
    # After the copy: the daemon overwrites the generation before it uses a block again.
    if _generation(block) != item.generation:
        return None
    return _hit(item, key, tensors)


def _block(connection: Connection, item: pb.Leased) -> tuple[dict[str, TensorInfo], Bytes, dict[str, tuple[int, int]]]:
    specs = read_specs(item.header.tensors)
    arrays.check_specs(specs)
    places, nbytes = layout(specs)
    segment = connection.segments.get(item.segment)
    if item.start + nbytes > segment.nbytes:
        raise UseStream(f"a block that ends at {item.start + nbytes} in a segment of {segment.nbytes}")
    return specs, segment.array[item.start : item.start + nbytes], places


def _generation(block: Bytes) -> int:
    return int(block[:8].view(np.uint64)[0])


def _hit(item: pb.Leased, key: bytes, tensors: Mapping[str, Any]) -> Hit:
    head = item.header
    tier = TIER_NAMES.get(head.tier, "unknown")
    return Hit(key, tensors, tier, head.encoding, head.lossy, head.age_s, read_receipt(head))


@contextmanager
def lease(near: Near, keys: list[bytes], framework: str, *, leading: bool) -> Iterator[list[Hit | None]]:
    """The bytes themselves, for the length of a block. Raises as `get`, and LeaseKept at the end of the block."""
    hits: list[Hit | None] = [None] * len(keys)
    views: list[LeasedTensors] = []
    windows: list[weakref.ref[Window]] = []
    with near.connection() as connection:
        reply = connection.call(pb.LeaseCall(get=pb.GetRequest(keys=keys, leading=leading)), near.timeout_s)
    # Given back by the last of its windows: not before the end of the block, and not while a tensor still points there.
    left = _Countdown(connection, reply.lease, len(reply.leased))
    for item in reply.leased:
        view, window = _viewed(connection, item, framework, left)
        views.append(view)
        windows.append(weakref.ref(window))
        hits[item.header.index] = _hit(item, keys[item.header.index], view)
        del window
    try:
        yield hits
    finally:
        for view in views:
            view.end()
    if any(window() is not None for window in windows):
        raise LeaseKept("a tensor of this lease is still referred to: copy it inside the block")


class _Countdown:
    """Releases a lease with the last of its windows."""

    def __init__(self, connection: Connection, number: int, windows: int) -> None:
        self._connection = connection
        self._lease = number
        self._left = windows

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            self._connection.release(self._lease)


def _viewed(
    connection: Connection, item: pb.Leased, framework: str, on_end: "_Countdown"
) -> tuple[LeasedTensors, Window]:
    specs, block, places = _block(connection, item)
    window = Window(connection.segments.get(item.segment), item.start, block.size, on_end)
    data = window.array(writable=framework == "torch")
    tensors = {
        name: arrays.from_bytes(spec, data[places[name][0] : sum(places[name])], framework)
        for name, spec in specs.items()
    }
    if framework == "torch":
        # A view remembers what it is a view of, and would keep the memory after `end` has emptied it.
        tensors = {name: x.new_empty(0).set_(x) for name, x in tensors.items()}
    return LeasedTensors(tensors), window


def put(near: Near, batch: Sequence[Outgoing]) -> tuple[int, int, int]:
    """(entries stored, boot epoch, commits). A long batch goes in several commits, root first: a chain has no holes."""
    stored = epoch = commits = start = 0
    while start < len(batch):
        stop, nbytes = start + 1, batch[start].nbytes
        while stop < len(batch) and stop - start < KEYS_PER_PACKET and nbytes + batch[stop].nbytes <= COMMIT_NBYTES:
            nbytes += batch[stop].nbytes
            stop += 1
        reply = _commit(near, batch[start:stop])
        stored, epoch, commits, start = stored + reply.stored, reply.boot_epoch, commits + 1, stop
    return stored, epoch, commits


def _commit(near: Near, entries: Sequence[Outgoing]) -> pb.PutReply:
    nbytes = sum(entry.nbytes for entry in entries)
    timeout_s = near.timeout_s + nbytes / PAYLOAD_BYTES_PER_S
    with near.connection(_owner(near, entries)) as connection:
        windows: list[Window] = []  # kept until the daemon has copied
        call = pb.LeaseCall()
        for entry in entries:
            item = call.put.entries.add(header=entry.header)
            for x in entry.tensors.values():
                segment, start = _ingested(near, connection, x, windows, timeout_s)
                item.places.add(segment=segment, start=start)
        return connection.call(call, timeout_s).put


def _owner(near: Near, entries: Sequence[Outgoing]) -> Connection | None:
    """The connection whose ingest segment the first tensor already lies in."""
    x = next(iter(entries[0].tensors.values()))
    found = _lies_in(near, x)
    return found[0] if found is not None else None


def _lies_in(near: Near, x: Any) -> tuple[Connection, int, int] | None:
    if arrays.is_torch(x):
        if x.device.type != "cpu" or not x.is_contiguous() or x.is_conj() or x.is_neg():
            return None
        address, nbytes = x.data_ptr(), x.nbytes
    else:
        if not (x.flags.c_contiguous and x.dtype.isnative):
            return None
        address, nbytes = x.ctypes.data, x.nbytes
    return near.owner_of(address, nbytes) if nbytes else None


def _ingested(near: Near, connection: Connection, x: Any, windows: list[Window], timeout_s: float) -> tuple[int, int]:
    found = _lies_in(near, x)
    if found is not None and found[0] is connection:
        return found[1], found[2]
    data = arrays.as_bytes(x)
    if not data.size:
        return 0, 0
    window, segment, start = connection.room(data.size, timeout_s)
    windows.append(window)
    near.copier.copy(window.array(writable=True), data)
    return segment, start


def empty(near: Near, spec: TensorInfo, framework: str) -> Any:
    """A tensor in this client's own shared memory, not cleared: filling it is all a put has to copy."""
    nbytes = arrays.check_specs({"x": spec})
    with near.connection() as connection:
        window, _, _ = connection.room(max(nbytes, 1), near.timeout_s)
        return arrays.from_bytes(spec, window.array(writable=True)[:nbytes], framework)
