"""Between messages and the engine: entries on their way in and out, checked before anything is allocated.

`PutStream` turns the frames of a Put into tensors; `Reading` takes hits out of the store for a Get, a bounded lot at a
time. Neither knows gRPC, so another door can use the same two. Each belongs to one call.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import torch
import xxhash

from kvstore import arrays
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge, InvalidEntry
from kvstore.hit import Fidelity, Hit, Priority
from kvstore.keys import KEYS_PER_CALL_MAX, check_key, check_keys, check_namespace
from kvstore.residency.read_path import Found, Resident
from kvstore.residency.transcode import Room
from kvstore.store import Store
from kvstored.budget import Budget
from kvstored.parcels import Parcel, parcel
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, Frame, Gather, Scatter, cut_frames
from kvstored_client.wire.messages import TIERS, fidelity_name, priority_name, read_specs, relative_errors, tensor_specs

HEADER_MAX_NBYTES = 64 << 10
"""256 tensors with the longest names and shapes have 45 KiB; protobuf turns hostile bytes into 12 times their size."""
LOOKED_UP = 64
"""Keys looked up at once to fill a lot: those that do not fit are looked up again for the next."""

AT_HAND_MAX = 2
AT_HAND_NBYTES = 4 << 20
"""Entries that stay encoded and are taken out on the event loop itself, and their bytes: 0.05 to 0.3 ms each."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an entry is kept; entries with equal options can be put together."""

    ttl_s: float | None
    sliding: bool
    pin: bool
    fidelity: Fidelity
    priority: Priority
    namespace: str


class Incoming:
    """One entry being received. `nbytes` is what it will hold; nothing is allocated before `begin`."""

    def __init__(self, header: pb.PutHeader, limit_nbytes: int) -> None:
        """Check a header. Raises InvalidEntry or EntryTooLarge, with the value and the limit."""
        self.key = check_key(header.key)
        if len(header.tensors) > arrays.TENSORS_MAX:
            raise EntryTooLarge(f"an entry has at most {arrays.TENSORS_MAX} tensors, got {len(header.tensors)}")
        self.specs = read_specs(header.tensors)
        self.nbytes = arrays.check_specs(self.specs, limit_nbytes)
        if header.nbytes != self.nbytes:
            raise InvalidEntry(f"the header announces {header.nbytes} bytes, its tensors add up to {self.nbytes}")
        if not (math.isfinite(header.ttl_s) and header.ttl_s >= 0):
            raise InvalidEntry(f"ttl_s must be finite and at least 0, got {header.ttl_s}")
        self.options = Options(
            header.ttl_s or None,
            not header.absolute_ttl,
            header.pin,
            fidelity_name(header.fidelity),
            priority_name(header.priority),
            check_namespace(header.namespace),
        )
        self.parent = check_key(header.parent) if header.parent else None
        self.root = header.root and self.parent is None
        self.tensors: dict[str, torch.Tensor] = {}
        self._scatter: Scatter | None = None
        self._sum = xxhash.xxh3_64()

    def begin(self, room: Room) -> None:
        """Allocate the tensors: in `room` if there is any, else in ordinary memory."""
        self.tensors = room(self.specs) or {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu")
            for name, spec in self.specs.items()
        }
        self._scatter = None

    def take(self, chunk: memoryview) -> None:
        """The next bytes. Raises BadFrame for more than were announced."""
        if self._scatter is None:  # made here: what comes over the lease socket is never taken in pieces
            self._scatter = Scatter([arrays.as_bytes(x) for x in self.tensors.values()])
        self._sum.update(chunk)
        self._scatter.write(chunk)

    @property
    def _filled_nbytes(self) -> int:
        return 0 if self._scatter is None else self._scatter.filled_nbytes

    def finish(self, xxh3: int) -> None:
        """The entry's end. Raises BadFrame if bytes are missing or are not those that were sent."""
        if self._filled_nbytes != self.nbytes:
            raise BadFrame(self.progress)
        if xxh3 and xxh3 != self._sum.intdigest():
            raise BadFrame(
                f"checksum {self._sum.intdigest():016x} of the bytes received is not the sender's {xxh3:016x}"
            )

    @property
    def progress(self) -> str:
        """For a message about an entry that is not whole."""
        return f"received {self._filled_nbytes} of {self.nbytes} bytes of key {self.key.hex():.32}"


class PutStream:
    """The frames of one Put: at most one entry open, whole ones collected in `ready`."""

    def __init__(self, limit_nbytes: int, budget: Budget, room: Room) -> None:
        self._limit_nbytes = limit_nbytes
        self._budget = budget
        self._room = room
        self._open: Incoming | None = None
        # Until the first header says what comes: 256 calls with a frame each had a gigabyte in no account.
        budget.take(budget.call_nbytes)
        self._taken_nbytes = self._frames_nbytes = budget.call_nbytes
        self._keys = 0
        self.ready: list[Incoming] = []
        self.ready_nbytes = 0

    def take(self, frame: Frame) -> None:
        """The next frame. Raises BadFrame, InvalidEntry, EntryTooLarge or Busy."""
        if frame.miss is not None:
            raise BadFrame("a put has no misses")
        if frame.header is not None:
            if len(frame.header) > HEADER_MAX_NBYTES:
                raise EntryTooLarge(f"a header has at most {HEADER_MAX_NBYTES} bytes, got {len(frame.header)}")
            self._begin(pb.PutHeader.FromString(bytes(frame.header)))
        if (frame.chunk or frame.end is not None) and self._open is None:
            raise BadFrame("bytes or an end before a header")
        if frame.chunk and self._open is not None:
            self._open.take(frame.chunk)
        if frame.end is not None and self._open is not None:
            self._open.finish(pb.EntryEnd.FromString(bytes(frame.end)).xxh3)
            self.ready.append(self._open)
            self.ready_nbytes += self._open.nbytes
            self._open = None
            self._expect_frames(0)

    def _begin(self, header: pb.PutHeader) -> None:
        if self._open is not None:
            raise BadFrame(f"a header before the end of an entry: {self._open.progress}")
        self._keys += 1
        if self._keys > KEYS_PER_CALL_MAX:
            raise InvalidEntry(f"a call names at most {KEYS_PER_CALL_MAX} keys, got {self._keys}")
        entry = Incoming(header, self._limit_nbytes)
        self._expect_frames(self._budget.frames_of(entry.nbytes))
        self._budget.take(entry.nbytes)
        self._taken_nbytes += entry.nbytes
        self._open = entry
        entry.begin(self._room)

    def _expect_frames(self, nbytes: int) -> None:
        more = nbytes - self._frames_nbytes
        if more > 0:
            self._budget.take(more)
        else:
            self._budget.give_back(-more)
        self._taken_nbytes += more
        self._frames_nbytes = nbytes

    def check_whole(self) -> None:
        """At the end of the stream. Raises BadFrame for an entry without its end."""
        if self._open is not None:
            raise BadFrame(f"an entry without its end: {self._open.progress}")

    @property
    def progress(self) -> str:
        """For a message about a stream that stopped."""
        return self._open.progress if self._open is not None else f"received {self._keys} entries"

    def release(self, entries: Sequence[Incoming]) -> None:
        """These were handed to the store: their bytes are no longer in flight."""
        nbytes = sum(entry.nbytes for entry in entries)
        self._taken_nbytes -= nbytes
        self.ready_nbytes -= nbytes
        self._budget.give_back(nbytes)

    def close(self) -> None:
        """Give back what is still counted, whatever happened."""
        self._budget.give_back(self._taken_nbytes)
        self._taken_nbytes = 0


class Reading:
    """Hits for a Get, in order of the keys. `next_lot` and `close` block: they are for a worker thread.

    room: where what is decoded is made. frames_nbytes: what the caller makes of a lot beside, at most.
    """

    def __init__(
        self,
        store: Store,
        budget: Budget,
        asked: pb.GetRequest,
        *,
        room: Room | None = None,
        frames_nbytes: int = 0,
    ) -> None:
        """Of a request with checked keys. room: where what must be decoded is made."""
        self._room = room
        self._frames_nbytes = frames_nbytes
        self._accept = frozenset(asked.accept)
        self._accept_from_nbytes = asked.accept_from_nbytes
        self._store = store
        self._budget = budget
        self._keys = check_keys(asked.keys)
        self._leading = asked.leading
        self._at = 0
        self._lots = 0
        self._ended = not self._keys
        self._counted_nbytes = 0
        self._lease = ExitStack()

    def next_lot(self) -> list[tuple[int, Hit | Parcel | None]]:
        """Some positions with their hits, or None for a miss; empty at the end. The last lot's tensors end here."""
        self._end_lot()
        if self._ended:
            return []
        start = self._at
        stop, decoded_nbytes = self._measure_lot()
        # Before anything is read: what is under way is in memory, and threads enough for a gigabyte read at once.
        self._count(decoded_nbytes)
        found = self._store.lease_as_held(
            self._keys[start:stop],
            self._accept,
            from_nbytes=self._accept_from_nbytes,
            leading=self._leading,
            room=self._room,
        )
        self._lots += 1
        hits = [parcel(hit) if isinstance(hit, Found) else hit for hit in self._lease.enter_context(found)]
        if start + len(hits) < stop:  # a chain ends at its first miss
            hits.append(None)
            stop = len(self._keys)
        self._at, self._ended = start + len(hits), stop == len(self._keys)
        nbytes = 0
        for hit in hits:
            if hit is not None:
                if isinstance(hit, Parcel):
                    size = hit.contents.nbytes
                    self._give_back(hit.contents.value_nbytes - size)  # counted as if it were decoded
                else:
                    size = sum(x.nbytes for x in hit.tensors.values())
                nbytes += size
        self._count(min(self._budget.frames_of(nbytes), self._frames_nbytes))
        return list(enumerate(hits, start))

    @property
    def done(self) -> bool:
        """Whether there are no further lots."""
        return self._ended

    @property
    def at_hand(self) -> bool:
        """Whether the next lot takes no longer than the way to another thread and back: few keys, as they are held."""
        keys = self._keys[self._at :]
        return len(keys) <= AT_HAND_MAX and self._store.at_hand(
            keys, self._accept, from_nbytes=self._accept_from_nbytes, at_most_nbytes=AT_HAND_NBYTES
        )

    def close(self) -> None:
        """Let go of the leases. A chain read in several lots is touched once more, as one."""
        self._end_lot()
        if self._lots > 1:
            self._store.touch(self._keys[: self._at])

    def _count(self, nbytes: int) -> None:
        self._budget.take(nbytes)
        self._counted_nbytes += nbytes

    def _give_back(self, nbytes: int) -> None:
        nbytes = min(nbytes, self._counted_nbytes)  # what was found is not always what was looked up before
        self._counted_nbytes -= nbytes
        self._budget.give_back(nbytes)

    def _measure_lot(self) -> tuple[int, int]:
        """Where the next lot stops, and its decoded bytes; hot ones too, since hot may let go of what waits here."""
        stop, decoded = self._at, 0
        starts = range(self._at, len(self._keys), LOOKED_UP)
        for held in chain.from_iterable(self._store.locate(self._keys[i : i + LOOKED_UP]) for i in starts):
            cost = held.nbytes if held is not None else 0
            if decoded and decoded + cost > self._budget.lot_nbytes:
                break
            decoded += cost
            stop += 1
        return stop, decoded

    def _end_lot(self) -> None:
        self._lease.close()
        self._give_back(self._counted_nbytes)


def resident_hit(entry: Entry, age_s: float) -> Hit:
    """A held entry as a hit: the very tensors."""
    tensors = {name: held.parts[""] for name, held in entry.tensors.items()}
    return Hit(entry.key, tensors, "hot", entry.encoding, entry.lossy, age_s, entry.receipt)


def resident_hits(resident: Resident) -> list[tuple[int, Hit | None]]:
    """All of them, by position."""
    pairs = zip(resident.entries, resident.metas, strict=True)
    return [(i, resident_hit(entry, resident.now - meta.created_at)) for i, (entry, meta) in enumerate(pairs)]


def hit_header(index: int, hit: Hit | Parcel, boot_epoch: int = 0) -> bytes:
    """What is said of a hit before its bytes: a GetHeader, serialized."""
    if isinstance(hit, Parcel):
        own = pb.GetHeader(index=index, tier=TIERS[hit.tier], age_s=hit.age_s, boot_epoch=boot_epoch)
        return hit.contents.said + own.SerializeToString()
    specs = {name: arrays.describe(name, x) for name, x in hit.tensors.items()}
    return pb.GetHeader(
        index=index,
        tensors=tensor_specs(specs),
        nbytes=sum(x.nbytes for x in hit.tensors.values()),
        tier=TIERS[hit.tier],
        encoding=hit.encoding,
        lossy=hit.lossy,
        age_s=hit.age_s,
        boot_epoch=boot_epoch,
        relative_errors=relative_errors(hit.receipt, lossy=hit.lossy),
    ).SerializeToString()


def hit_frames(index: int, hit: Hit | Parcel, boot_epoch: int) -> Iterator[bytes]:
    """The frames that answer one key of a Get."""
    header = hit_header(index, hit, boot_epoch)
    if isinstance(hit, Parcel):
        contents = hit.contents
        return cut_frames(header, Gather(contents.payload, contents.ends), contents.xxh3)
    return cut_frames(header, Gather([arrays.as_bytes(x) for x in hit.tensors.values()]))


def put_ready(store: Store, entries: Sequence[Incoming]) -> int:
    """Put whole entries, in order, handing over their tensors. Blocks. Returns how many were stored."""
    stored = 0
    for run in _runs(entries):
        how = run[0].options
        stored += store.put_many(
            [(entry.key, dict(entry.tensors)) for entry in run],
            ttl_s=how.ttl_s,
            sliding=how.sliding,
            pin=how.pin,
            fidelity=how.fidelity,
            priority=how.priority,
            namespace=how.namespace,
            own=True,
            chain=run[0].root or run[-1].parent is not None,
            parent=run[0].parent,
        )
    return stored


def _runs(entries: Sequence[Incoming]) -> Iterator[list[Incoming]]:
    """Entries to be put together: kept alike, and either one chain or none of them in a chain."""
    run: list[Incoming] = []
    for entry in entries:
        if run:
            continues = entry.parent == run[-1].key and (len(run) == 1 or run[-1].parent is not None)
            unchained = entry.parent is None and run[-1].parent is None and not (entry.root or run[-1].root)
            if entry.options != run[0].options or not (continues or unchained):
                yield run
                run = []
        run.append(entry)
    if run:
        yield run
