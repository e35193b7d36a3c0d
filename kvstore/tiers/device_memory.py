"""Entries in a device's memory: segments of it, blocks in them, and tensors that lie in a block.

A block lives as long as whoever refers to it: the hot tier, a get that copies out of it, a view that was leased. Its
room is used again when the last of them is gone, so nobody ever copies out of a block that is another entry's by now.
Whoever has the device work on a block holds it until the device has done that. A segment is given back to the device
when it is empty and there are more than the limit allows, or with the last block after `close`.

A server shares segments: other processes map them, only to read, and cannot be made to let go. So a segment belongs to
one user for its whole life, as in `shm.arena`, and has a table in shared memory with the generation of each block. That
is overwritten before the block's room is used again: who reads it after a copy knows whose bytes these were.
Thread-safe.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count

import torch

from kvstore.device import DriverError, MemoryDriver, OutOfMemory
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import NO_ATTRS, TENSOR_OVERHEAD_NBYTES, EncodedTensor, Entry, error_in
from kvstore.shm.arena import Owner, Place, Segment
from kvstore.shm.freelist import FreeList
from kvstore.shm.layout import TABLE_SHIFT, aligned, layout, table_nbytes

SEGMENT_NBYTES = 256 << 20
"""One allocation of the device's: a larger entry gets one of its own size."""
NUMBERS_FROM = 1 << 30
"""Of shared segments: apart from the arena's, which count up from 1, and from ingest segments."""


class SharedSegment:
    """What other processes are handed of a segment: descriptors of its memory and of its table. Keeps no memory.

    device: the GPU's UUID. closed: it is given back.
    """

    def __init__(self, number: int, owner: Owner, nbytes: int, device: bytes, descriptor: int) -> None:
        """descriptor: of the memory, taken over. Raises OSError without another one for the table."""
        try:
            self._table = Segment(number, owner, table_nbytes(nbytes))
        except BaseException:
            os.close(descriptor)
            raise
        self.number = number
        self.owner = owner
        self.nbytes = nbytes
        self.device = device
        self.closed = False
        self.descriptors: tuple[int, ...] = (descriptor, self._table.fd)

    def set_generation(self, start: int, generation: int) -> None:
        """Of the block that begins there; 0: of none."""
        if not self.closed:
            self._table.words[start >> TABLE_SHIFT] = generation

    def close(self) -> None:
        """Tell whoever maps it to let go, and close the descriptors."""
        if not self.closed:
            self.closed = True
            self._table.close_empty()
            os.close(self.descriptors[0])


class DeviceSegment:
    """One run of a device's memory. It is given back when nobody refers to it any more.

    owner: whose entries lie in it. shared: what others are handed of it; None: it is not shared.
    """

    def __init__(self, driver: MemoryDriver, device: int, nbytes: int, owner: Owner, number: int) -> None:
        """number: of what is shared; 0: nothing."""
        memory = driver.allocate(device, nbytes)
        self.address: int = memory.address
        self.nbytes = nbytes
        self.owner = owner
        self.free = FreeList(nbytes)
        self.shared: SharedSegment | None = None
        try:
            if number:
                self.shared = SharedSegment(number, owner, nbytes, driver.uuid(device), driver.export(memory))
        except (DriverError, OSError):  # answers are copied, as if this were another GPU's
            pass
        finally:
            weakref.finalize(self, _give_back, driver, memory, self.shared).atexit = False


def _give_back(driver: MemoryDriver, memory: object, shared: SharedSegment | None) -> None:
    if shared is not None:
        shared.close()
    driver.free(memory)


class Block:
    """A run of a segment. Its room is used again when nobody refers to it any more.

    place: where others that map its segment find it; None: nobody does.
    """

    __slots__ = ("__weakref__", "address", "nbytes", "place", "segment")

    def __init__(self, segment: DeviceSegment, start: int, nbytes: int, generation: int) -> None:
        self.segment = segment
        self.address: int = segment.address + start
        self.nbytes = nbytes
        self.place: Place | None = None
        if segment.shared is not None:
            segment.shared.set_generation(start, generation)
            self.place = Place(segment.shared, start, generation)


class DeviceArena:
    """All segments on one device. `limit_nbytes` bounds their sum; a lower one holds once blocks are gone.

    shares: whether segments that are made from now on can be handed to other processes.
    """

    def __init__(
        self, driver: MemoryDriver, device: int, limit_nbytes: int, *, segment_nbytes: int = SEGMENT_NBYTES
    ) -> None:
        self.device = device
        self.limit_nbytes = limit_nbytes
        self.shares = False
        self._driver = driver
        self._segment_nbytes = segment_nbytes
        self._lock = threading.Lock()
        self._segments: list[DeviceSegment] = []
        self._closed = False
        self._numbers = count(NUMBERS_FROM)
        self._generations = count(1)
        # As in `shm.arena`: a finalizer may run in the middle of `take`, so it only appends.
        self._dead: deque[tuple[DeviceSegment, int]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self._segments)

    def gauges(self) -> dict[str, float]:
        """Numbers for the statistics."""
        with self._lock:
            self._reclaim()
            used_nbytes = sum(segment.free.used_nbytes for segment in self._segments)
            return {"device_nbytes": self.nbytes, "device_used_nbytes": used_nbytes}

    def take(self, nbytes: int, owner: Owner | None = None) -> Block | None:
        """A block of any content, in a segment of a user's own: by default this process's. None: no room for it.

        What no segment of a user's has room for lies in one of this process's, which that user is not handed.
        """
        own: Owner = os.geteuid()
        user = own if owner is None else owner
        with self._lock:
            self._reclaim()
            segment = self._fitting(nbytes, user) or self._make(nbytes, user) or self._fitting(nbytes, own)
            start = None if segment is None else segment.free.take(nbytes)
            if segment is None or start is None:
                return None
            block = Block(segment, start, nbytes, next(self._generations))
            weakref.finalize(block, self.given_back, segment, start).atexit = False
            return block

    def given_back(self, segment: DeviceSegment, start: int) -> None:
        """The last reference to a block is gone."""
        if not self._closed:  # else its segment goes with it
            self._dead.append((segment, start))

    def close(self) -> None:
        """Let go of all segments: those that blocks lie in are given back with the last of these."""
        with self._lock:
            self._closed = True
            self._segments.clear()
            self._dead.clear()

    def _fitting(self, nbytes: int, owner: Owner) -> DeviceSegment | None:
        fits = (s for s in self._segments if s.owner == owner and s.free.largest_nbytes >= aligned(nbytes))
        return next(fits, None)

    def _make(self, nbytes: int, owner: Owner) -> DeviceSegment | None:
        wanted = aligned(nbytes)
        self._drop_empty(self.limit_nbytes - wanted)
        room = self.limit_nbytes - self.nbytes
        if room < wanted:
            return None
        for size in dict.fromkeys((max(wanted, min(self._segment_nbytes, room)), wanted)):
            try:
                made = DeviceSegment(self._driver, self.device, size, owner, next(self._numbers) if self.shares else 0)
            except OutOfMemory:  # somebody else has what was free at the start
                continue
            self._segments.append(made)
            return made
        return None

    def _drop_empty(self, most_nbytes: int) -> None:
        """Give empty segments back until all of them have at most so many bytes."""
        for segment in [s for s in self._segments if not s.free.used_nbytes]:
            if self.nbytes <= most_nbytes:
                return
            self._segments.remove(segment)

    def _reclaim(self) -> None:
        while self._dead:
            segment, start = self._dead.popleft()
            if segment.shared is not None:
                # Before the room can be used again: a late reader finds this and drops its copy.
                segment.shared.set_generation(start, 0)
            segment.free.give(start)
        self._drop_empty(self.limit_nbytes)


class _Part(Mapping[str, torch.Tensor]):
    """The one part of a raw tensor on a device: a copy on the host, made when it is asked for."""

    __slots__ = ("_copied",)

    def __init__(self, copied: Callable[[], torch.Tensor]) -> None:
        self._copied = copied

    def __getitem__(self, suffix: str) -> torch.Tensor:
        if suffix:
            raise KeyError(suffix)
        return self._copied()

    def __iter__(self) -> Iterator[str]:
        return iter(("",))

    def __len__(self) -> int:
        return 1


class DeviceTensors(Mapping[str, EncodedTensor]):
    """The raw tensors of an entry in a block, by name. Who looks at their numbers gets a copy on the host.

    addresses: where each lies. attrs: of the tensors that have a receipt, by name. copied: makes that of one tensor.
    """

    __slots__ = ("_copied", "addresses", "attrs", "block", "nbytes", "specs", "value_nbytes")

    def __init__(
        self,
        block: Block,
        specs: Mapping[str, TensorSpec],
        attrs: Mapping[str, Mapping[str, object]],
        copied: Callable[["DeviceTensors", str], torch.Tensor],
    ) -> None:
        self.block = block
        self.specs = specs
        self.addresses = {name: block.address + at for name, (at, _) in layout(specs)[0].items()}
        self.attrs = attrs
        self.value_nbytes = sum(spec.nbytes for spec in specs.values())
        self.nbytes = self.value_nbytes + sum(len(name) + TENSOR_OVERHEAD_NBYTES for name in specs)
        self._copied = copied

    @property
    def place(self) -> Place | None:
        """Where other processes find the block, if any may."""
        return self.block.place

    @property
    def encodings(self) -> list[str]:
        """`Entry.encodings`."""
        return ["raw"] * len(self.specs)

    @property
    def receipt(self) -> dict[str, float]:
        """`Entry.receipt`."""
        return {name: error_in("raw", self.attrs.get(name, NO_ATTRS)) for name in self.specs}

    def __getitem__(self, name: str) -> EncodedTensor:
        spec = self.specs[name]
        return EncodedTensor(spec, "raw", _Part(lambda: self._copied(self, name)), self.attrs.get(name, NO_ATTRS))

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def tensors_on_device(entry: Entry) -> DeviceTensors | None:
    """Those of an entry in a device's memory; None for one in the host's."""
    return entry.tensors if isinstance(entry.tensors, DeviceTensors) else None
