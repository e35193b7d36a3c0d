"""Hits on their way out: taken from the store for one call, a bounded lot at a time, and as messages.

`Reading` belongs to one call. It knows no gRPC, so both doors use it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain

from kvstore import arrays
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge
from kvstore.hit import Hit
from kvstore.keys import check_keys
from kvstore.residency.read_path import Found, Resident
from kvstore.residency.transcode import Room
from kvstore.store import Store
from kvstored.calls.budget import Budget
from kvstored.calls.encoded_reply import EncodedReply, encoded_reply
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import Gather, cut_frames
from kvstored_client.wire.messages import TIERS, relative_errors, tensor_specs

LOOKED_UP = 64
"""Keys looked up at once to fill a lot: those that do not fit are looked up again for the next."""

AT_HAND_MAX = 2
AT_HAND_NBYTES = 4 << 20
"""Entries that stay encoded and are taken out on the event loop itself, and their bytes: 0.05 to 0.3 ms each."""


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

    def next_lot(self) -> list[tuple[int, Hit | EncodedReply | None]]:
        """Some positions with their hits, or None for a miss; empty at the end. The last lot's tensors end here."""
        self._end_lot()
        if self._ended:
            return []
        start = self._at
        stop = self._count_lot()
        found = self._store.lease_as_held(
            self._keys[start:stop],
            self._accept,
            from_nbytes=self._accept_from_nbytes,
            leading=self._leading,
            room=self._room,
        )
        self._lots += 1
        hits = [encoded_reply(hit) if isinstance(hit, Found) else hit for hit in self._lease.enter_context(found)]
        if start + len(hits) < stop:  # a chain ends at its first miss
            hits.append(None)
            stop = len(self._keys)
        self._at, self._ended = start + len(hits), stop == len(self._keys)
        nbytes = 0
        for hit in hits:
            if hit is not None:
                if isinstance(hit, EncodedReply):
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

    def _count_lot(self) -> int:
        """Where the next lot stops, its decoded bytes counted.

        Before anything is read: what is under way is in memory, and threads enough for a gigabyte read at once.
        """
        while True:
            stop, decoded_nbytes = self._measure_lot()
            try:
                self._count(decoded_nbytes)
            except EntryTooLarge:
                # A single entry, that would be refused at each get. A record that only says so goes: it is a miss.
                key = self._keys[stop - 1]
                if self._store.holds_truly(key) or self._store.locate([key]) != [None]:
                    raise
            else:
                return stop

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


def hit_header(index: int, hit: Hit | EncodedReply, boot_epoch: int = 0) -> bytes:
    """What is said of a hit before its bytes: a GetHeader, serialized."""
    if isinstance(hit, EncodedReply):
        own = pb.GetHeader(index=index, tier=TIERS[hit.tier], age_s=hit.age_s, boot_epoch=boot_epoch)
        return hit.contents.serialized + own.SerializeToString()
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


def hit_frames(index: int, hit: Hit | EncodedReply, boot_epoch: int) -> Iterator[bytes]:
    """The frames that answer one key of a Get."""
    header = hit_header(index, hit, boot_epoch)
    if isinstance(hit, EncodedReply):
        contents = hit.contents
        return cut_frames(header, Gather(contents.payload, contents.ends), contents.xxh3)
    return cut_frames(header, Gather([arrays.as_bytes(x) for x in hit.tensors.values()]))
