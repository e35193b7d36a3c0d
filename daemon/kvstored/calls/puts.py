"""Entries on their way in: the messages of a put, checked before anything is allocated, then tensors.

`Incoming` is one entry by any door; `PutStream` reads the frames of a Put. Each belongs to one call. Knows no gRPC.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import xxhash

from kvstore import arrays
from kvstore.codecs.packing import checked_entry
from kvstore.entries.compact import PACK_MAX_NBYTES
from kvstore.entries.entry import ArrivingTensors, EncodedTensor, Entry
from kvstore.errors import EntryTooLarge, InvalidEntry
from kvstore.keys import KEYS_PER_CALL_MAX, Key, check_key
from kvstore.options import PutOptions
from kvstore.residency.transcode import made_entry
from kvstore.shm.arena import Owner, Room, empty_tensors, filled_from, made_in
from kvstore.view import StoreView
from kvstored.calls.budget import Budget
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import BadFrame, Bytes, Frame, Scatter
from kvstored_client.wire.messages import fidelity_name, priority_name, read_specs
from kvstored_client.wire.packed import Coded, attrs_of, check_ratio, coded_of, parts_of

HEADER_MAX_NBYTES = 64 << 10
"""256 tensors with the longest names and shapes have 45 KiB; protobuf turns hostile bytes into 12 times their size."""
KNOWN_MAX_NBYTES = 4 << 10
"""Of a description that is remembered, serialized: 256 of them take 12 MB at most, whatever a client sends."""


@dataclass(frozen=True, slots=True)
class Description:
    """What a PutHeader says beside its keys and bytes, checked: the same for all entries of one shape kept alike.

    sizes: bytes of each tensor.
    """

    specs: arrays.CheckedSpecs
    sizes: tuple[int, ...]
    options: PutOptions
    root: bool


def _read_description(rest: bytes) -> Description:
    """Check a serialized PutHeader without its keys, bytes and packed tensors. Raises InvalidEntry or EntryTooLarge."""
    header = pb.PutHeader.FromString(rest)
    if len(header.tensors) > arrays.TENSORS_MAX:
        raise EntryTooLarge(f"an entry has at most {arrays.TENSORS_MAX} tensors, got {len(header.tensors)}")
    specs = arrays.CheckedSpecs(read_specs(header.tensors))
    options = PutOptions(
        header.ttl_s or None,
        not header.absolute_ttl,
        header.pin,
        fidelity_name(header.fidelity),
        priority_name(header.priority),
        header.namespace,
    )
    return Description(specs, tuple(spec.nbytes for spec in specs.values()), options, header.root)


_known_description = lru_cache(maxsize=256)(_read_description)


class Incoming:
    """One entry being received. `nbytes` is what it will hold; nothing is allocated before `begin` or `lying`."""

    def __init__(self, header: pb.PutHeader, key: Key, parent: Key | None, limit_nbytes: int) -> None:
        """Check a header, and take it over: see `incoming`."""
        self.key, self.parent = key, parent
        said_nbytes, packed = header.nbytes, tuple(header.packed)
        for field in ("key", "parent", "nbytes", "packed"):
            header.ClearField(field)
        rest = header.SerializeToString()
        found = (_known_description if len(rest) <= KNOWN_MAX_NBYTES else _read_description)(rest)
        self.specs, self.sizes, self.options = found.specs, found.sizes, found.options
        self.nbytes = found.specs.nbytes
        if self.nbytes > limit_nbytes:
            arrays.check_specs(self.specs, limit_nbytes)
        self.packed: dict[str, tuple[Coded, dict[str, object]]] = {}
        """What comes encoded, by tensor."""
        self.made: Entry | None = None
        if packed:
            self._read_packed(packed)
        if said_nbytes != self.nbytes:
            raise InvalidEntry(f"the header announces {said_nbytes} bytes, its tensors add up to {self.nbytes}")
        self.root = found.root and self.parent is None
        self.tensors: Mapping[str, torch.Tensor] = {}
        self._scatter: Scatter | None = None
        self._filled_nbytes = 0

    def _read_packed(self, messages: Sequence[pb.PackedTensor]) -> None:
        """What is sent are the parts of these tensors. Raises InvalidEntry or EntryTooLarge for what cannot be."""
        specs, options = self.specs, self.options
        if options.fidelity == "exact":
            raise InvalidEntry("fidelity exact is for values bit for bit as put, and packed ones have lost some")
        if len(messages) != len(specs):
            raise InvalidEntry(f"{len(specs)} tensors packed as {len(messages)}")
        coded = [coded_of(spec, message) for spec, message in zip(specs.values(), messages, strict=True)]
        check_ratio(self.nbytes, coded)
        self.packed = {
            name: (one, attrs_of(message)) for name, one, message in zip(specs, coded, messages, strict=True)
        }
        self.sizes = tuple(nbytes for one in coded for nbytes in one.sizes)
        self.nbytes = sum(self.sizes)

    def begin(self, room: Room) -> None:
        """Allocate what `take` fills: in `room` if there is any, else in ordinary memory. Of a packed one the parts."""
        if self.packed:
            self.tensors = empty_tensors(parts_of(coded for coded, _ in self.packed.values()))
        else:
            self.tensors = made_in(room, self.specs)
        self._sum = xxhash.xxh3_64()

    def fill(self, room: Room, sources: Sequence[Bytes]) -> None:
        """Copy all of it from `sources` at once: what comes packed is checked before it is kept.

        room: shared memory for encoded entries. Nobody can change the copy, so what was checked is what is kept.
        Raises InvalidEntry.
        """
        parts = parts_of(coded for coded, _ in self.packed.values())
        self.tensors = made_in(room, parts) if self.nbytes > PACK_MAX_NBYTES else empty_tensors(parts)
        filled_from(sources, self.tensors)
        self.made = self._checked()

    def _checked(self) -> Entry:
        parts = iter(self.tensors.values())
        tensors = {
            name: EncodedTensor(coded.spec, coded.encoding, {suffix: next(parts) for suffix in coded.parts}, attrs)
            for name, (coded, attrs) in self.packed.items()
        }
        return checked_entry(self.key, tensors, block=getattr(self.tensors, "place", None))

    @property
    def entry(self) -> Entry:
        """What to put, once it is whole or arriving: handed over. Raises InvalidEntry for one packed wrongly."""
        if self.made is None:
            self.made = self._checked() if self.packed else made_entry(self.key, self.specs, self.tensors)
        return self.made

    def take(self, chunk: memoryview, xxh3: int | None = None) -> None:
        """The next bytes. xxh3: the sender's checksum, behind the last of them; 0: it has none.

        Raises BadFrame for more bytes than were announced; at the end also if some are missing or are not those sent.
        """
        if chunk:
            if self._scatter is None:  # made here: what comes over the lease socket is never taken in pieces
                self._scatter = Scatter([arrays.as_bytes(x) for x in self.tensors.values()])
            self._sum.update(chunk)
            self._scatter.write(chunk)
            self._filled_nbytes += len(chunk)
        if xxh3 is None:
            return
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


def incoming(headers: Sequence[pb.PutHeader], limit_nbytes: int) -> list[Incoming]:
    """Check headers, and take them over. Raises InvalidEntry or EntryTooLarge, with the value and the limit."""
    keys = [(check_key(header.key), check_key(header.parent) if header.parent else None) for header in headers]
    return [Incoming(header, *named, limit_nbytes) for header, named in zip(headers, keys, strict=True)]


def lying(
    entries: Sequence[Incoming], sources: Sequence[Sequence[Bytes]], room: Room | None, encoded_room: Room, owner: Owner
) -> list[ArrivingTensors]:
    """Have entries whose bytes lie in `sources`, those of each tensor in the order of the specs. Returns what arrives.

    What comes packed is copied at once, to `encoded_room`, the rest later, to `room`; None: by the store itself, to a
    device, once, before it can be found. owner: whose segments it is to lie in there. Raises InvalidEntry.
    """
    arriving: list[ArrivingTensors] = []
    for entry, of_entry in zip(entries, sources, strict=True):
        if entry.packed:
            entry.fill(encoded_room, of_entry)
        else:
            tensors = ArrivingTensors(entry.specs, partial(_copied, entry.specs, room, of_entry), owner)
            entry.made = Entry(entry.key, tensors)
            arriving.append(tensors)
    return arriving


def _copied(specs: arrays.CheckedSpecs, room: Room | None, sources: Sequence[Bytes]) -> Mapping[str, torch.Tensor]:
    if room is None:
        pairs = zip(specs.items(), sources, strict=True)
        return {name: arrays.from_bytes(spec, x, "torch") for (name, spec), x in pairs}
    return filled_from(sources, made_in(room, specs))


class PutStream:
    """The frames of one Put: at most one entry open, whole ones collected in `ready`."""

    def __init__(self, limit_nbytes: int, budget: Budget, room: Room) -> None:
        self._limit_nbytes = limit_nbytes
        self._budget = budget
        self._room = room
        self._open: Incoming | None = None
        # Until the first header says what comes: 256 calls with a frame each had a gigabyte in no account.
        budget.take(budget.call_nbytes)
        self._taken_nbytes = budget.call_nbytes
        self._frames_nbytes = budget.call_nbytes
        """What is counted for frames, which may be under way until `end`."""
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
        entry, end = self._open, frame.end
        if entry is None:
            if frame.chunk or end is not None:
                raise BadFrame("bytes or an end before a header")
            return
        entry.take(frame.chunk, None if end is None else pb.EntryEnd.FromString(bytes(end)).xxh3)
        if end is not None:
            self.ready.append(entry)
            self.ready_nbytes += entry.nbytes
            self._open = None

    def _begin(self, header: pb.PutHeader) -> None:
        if self._open is not None:
            raise BadFrame(f"a header before the end of an entry: {self._open.progress}")
        self._keys += 1
        if self._keys > KEYS_PER_CALL_MAX:
            raise InvalidEntry(f"a call names at most {KEYS_PER_CALL_MAX} keys, got {self._keys}")
        (entry,) = incoming((header,), self._limit_nbytes)
        nbytes = self._budget.with_frames(entry.nbytes)
        self._budget.take(nbytes, instead_of=self._frames_nbytes)
        self._taken_nbytes += nbytes - self._frames_nbytes
        self._frames_nbytes = nbytes - entry.nbytes
        self._open = entry
        entry.begin(self._room)

    def end(self) -> None:
        """No more frames come. Raises BadFrame for an entry without its end."""
        if self._open is not None:
            raise BadFrame(f"an entry without its end: {self._open.progress}")
        self._give_back(self._frames_nbytes)
        self._frames_nbytes = 0

    @property
    def progress(self) -> str:
        """For a message about a stream that stopped."""
        return self._open.progress if self._open is not None else f"received {self._keys} entries"

    def release(self) -> None:
        """What was ready has been handed to the store: its bytes are no longer in flight."""
        self._give_back(self.ready_nbytes)
        self.ready, self.ready_nbytes = [], 0

    def close(self) -> None:
        """Give back what is still counted, whatever happened."""
        self._give_back(self._taken_nbytes)

    def _give_back(self, nbytes: int) -> None:
        self._taken_nbytes -= nbytes
        self._budget.give_back(nbytes)


def put_ready(store: StoreView, entries: Sequence[Incoming]) -> int:
    """Put whole entries, in order, handing over their tensors. Blocks. Returns how many were stored."""
    stored = 0
    for run in (entries,) if len(entries) == 1 else list(_runs(entries)):
        first = run[0]
        chain = first.root or run[-1].parent is not None
        made = [incoming.entry for incoming in run]
        stored += store.put_entries(made, first.options, chain=chain, parent=first.parent)
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
