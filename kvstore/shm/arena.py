"""Tensors in shared memory: memfd segments that processes of the same user may map read-only.

A block lives as long as any tensor over it: the hot tier, a lease or a stream only hold the tensors, and the room is
free when the last of them is gone. Each segment belongs to one user id (or `Owner`), for its whole life, and only
processes of that user get its descriptor: they may keep it mapped. So a segment is never given to another user; an
empty one is closed where there is no room for a new one. While several users want room each has an equal share: one
that has more gets no block at all for as long as one with less was refused lately, so its segments run empty as its
entries leave hot. Thread-safe.
"""

import ctypes
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch

from kvstore import arrays
from kvstore.dtypes import TensorSpec
from kvstore.shm.freelist import FreeList
from kvstore.shm.layout import CLOSED, aligned, layout_of

SEGMENT_NBYTES = 128 << 20
"""A client maps it in 7 ms; a larger entry gets a segment of its own size."""
PREFAULT_NBYTES = 32 << 20
"""Bytes touched ahead of their use, once per put: no more is wasted if the next put never comes."""
REFUSED_S = 60.0
"""How long a user that was refused room is waited for: it asks with each get and put."""
_SLICE_NBYTES = 4 << 20
_MADV_POPULATE_WRITE = 23
_F_ADD_SEALS = 1033
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_FUTURE_WRITE = 1, 2, 4, 16

_RAM = torch.device("cpu")

_madvise = ctypes.CDLL(None, use_errno=True).madvise  # through ctypes: mmap.madvise would hold the GIL
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


Owner = int | str
"""A user id, or a name for one user's processes as what they are to the daemon now."""


Room = Callable[[Mapping[str, TensorSpec]], dict[str, torch.Tensor] | None]
"""Where tensors are made: room for an entry of these specs, or None where ordinary memory must do."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

Register = Callable[[int, int], Callable[[], None] | None]
"""Registers memory, (address, bytes), with a device. Returns what undoes it; None: it was not registered."""


class Handed(Protocol):
    """What a client is told of a segment, and the descriptors that come along."""

    @property
    def number(self) -> int:
        """By which blocks name it."""
        ...

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        ...

    @property
    def nbytes(self) -> int:
        """Of its memory."""
        ...

    @property
    def device(self) -> bytes:
        """The UUID of the GPU in whose memory it lies; b"": in RAM."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it is given back."""
        ...

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Of its memory, and of the table where its blocks' generations are elsewhere."""
        ...


class Segment:
    """One memfd, mapped writable in this process and read-only in clients."""

    def __init__(
        self, number: int, owner: Owner, nbytes: int, register: Register | None = None, *, readers_only: bool = True
    ) -> None:
        """register: with a device, at once."""
        self.number = number
        self.owner = owner
        self.nbytes = nbytes
        self.device = b""
        self.fd = os.memfd_create(f"kvstored-{owner}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            self._map = mmap.mmap(self.fd, nbytes)
        except BaseException:
            os.close(self.fd)
            raise
        # After mapping: the seal forbids new writable mappings and leaves this one. Without SHRINK a client could
        # truncate the file, and the daemon's next access would be a bus error.
        seals = _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL | (_F_SEAL_FUTURE_WRITE if readers_only else 0)
        fcntl.fcntl(self.fd, _F_ADD_SEALS, seals)
        self.bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.words = self.bytes[: nbytes // 8 * 8].view(np.uint64)
        self.address = int(self.bytes.ctypes.data)
        self.free = FreeList(nbytes)
        self.ready_nbytes = 0
        self.closed = False
        self._unregister: Callable[[], None] | None = None
        self._registering = threading.Lock()
        if register is not None:
            self.register(register)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a client is handed of it."""
        return (self.fd,)

    def register(self, register: Register) -> None:
        """Have a device copy from and to this memory directly, until it is closed."""
        with self._registering:
            if not self.closed:
                self._unregister = register(self.address, self.nbytes)

    def prefault(self) -> None:
        """Touch the next pages without changing them: otherwise the first write to each MiB costs 0.7 ms more."""
        start = self.ready_nbytes
        nbytes = min(PREFAULT_NBYTES, self.nbytes - start)
        self.ready_nbytes += nbytes
        for at in range(start, start + nbytes, _SLICE_NBYTES):
            if _madvise(self.address + at, min(_SLICE_NBYTES, start + nbytes - at), _MADV_POPULATE_WRITE):
                return

    def close(self) -> None:
        """Close the descriptor. The memory is freed with the last mapping and tensor, here or in a client."""
        self._let_go()
        os.close(self.fd)

    def _let_go(self) -> None:
        with self._registering:
            self.closed = True
            if self._unregister is not None:
                self._unregister()
                self._unregister = None

    def close_empty(self) -> None:
        """Close one that no block lies in, and end the mapping here, whoever still refers to the segment."""
        self._let_go()  # before it is unmapped
        self.ready_nbytes = self.nbytes
        self.words[0] = CLOSED  # so that clients let go of it, too
        self.bytes = self.words = np.empty(0, dtype=np.uint8)
        with suppress(BufferError):
            self._map.close()
        self.close()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block lies."""

    segment: Handed
    start: int
    generation: int


class _Given(weakref.ref["np.ndarray[Any, np.dtype[np.uint8]]"]):
    """A block that is in use; its callback runs when the last tensor over it is gone."""

    __slots__ = ("generation", "segment", "start")
    segment: Segment
    start: int
    generation: int


class BlockTensors(dict[str, torch.Tensor]):
    """The tensors of one entry in one block.

    place: where that is; None where no tensor has a byte to hold it by. spans: (start, bytes) of each, from there.
    """

    __slots__ = ("place", "spans")

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], place: Place | None, spans: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__(tensors)
        self.place, self.spans = place, spans


def empty_tensors(specs: Mapping[str, TensorSpec], device: torch.device = _RAM) -> dict[str, torch.Tensor]:
    """Tensors to fill, in ordinary memory or on a device."""
    return {
        name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for name, spec in specs.items()
    }


def made_in(room: Room, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Tensors to fill: in `room` if there is any, else in ordinary memory."""
    return room(specs) or empty_tensors(specs)


def filled_from(sources: Sequence[Bytes], tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors just made, filled with the bytes of each, in order, without the GIL."""
    if isinstance(tensors, BlockTensors) and tensors.place is not None and isinstance(tensors.place.segment, Segment):
        block = tensors.place.segment.bytes[tensors.place.start :]
        targets: Iterable[Bytes] = [block[at : at + nbytes] for at, nbytes in tensors.spans]
    else:
        targets = map(arrays.as_bytes, tensors.values())
    for target, source in zip(targets, sources, strict=True):
        np.copyto(target, source)
    return tensors


class Arena:
    """All segments. `limit_nbytes` bounds their sum; beyond it tensors lie in ordinary memory.

    register: of a device that copies from and to segments; set before the first one is made. numbers: of the segments;
    two arenas of one daemon share them.
    """

    def __init__(
        self,
        limit_nbytes: int,
        *,
        segment_nbytes: int = SEGMENT_NBYTES,
        clock: Callable[[], float] = time.monotonic,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self.numbers = count(1) if numbers is None else numbers
        self.limit_nbytes = limit_nbytes
        self.register: Register | None = None
        self._clock = clock
        self._refused: dict[Owner, float] = {}
        self._segment_nbytes = min(segment_nbytes, limit_nbytes)
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._leaving: set[Segment] = set()
        self._thinning = threading.Lock()
        self._generation = 0
        # A callback runs where the last reference dies, even inside a garbage collection in the middle of `take`. So
        # it only appends, which needs no lock; the next allocation takes the room back.
        self._given: dict[int, _Given] = {}
        self._dead: deque[_Given] = deque()
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="kvstored-prefault")

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def used_nbytes(self) -> int:
        """Bytes of all blocks in use."""
        with self._lock:
            self._reclaim()
            return sum(segment.free.used_nbytes for segment in self._segments)

    def gauges(self, *others: "Arena") -> dict[str, float]:
        """Numbers for the statistics, of this and others together.

        arena_fragmentation: share of the free room that is not in largest holes.
        """
        used = sum(arena.used_nbytes for arena in (self, *others))
        frees = [segment.free for arena in (self, *others) for segment in arena.segments()]
        free, largest = sum(f.nbytes - f.used_nbytes for f in frees), sum(f.largest_nbytes for f in frees)
        return {
            "arena_nbytes": sum(f.nbytes for f in frees),
            "arena_used_nbytes": used,
            "arena_segments": len(frees),
            "arena_fragmentation": max(0.0, 1 - largest / free) if free else 0.0,
        }

    def segments(self) -> list[Segment]:
        """Those there are now."""
        with self._lock:
            return self._segments.copy()

    def empty(
        self, specs: Mapping[str, TensorSpec], owner: Owner | None = None, *, grow: bool = True
    ) -> BlockTensors | None:
        """Tensors of one entry in one block of a user's own segments (this process's by default). None: no room.

        What is returned says where the block is (`place`), so that nobody has to look for it afterwards.
        grow: make a new segment where there is no room.
        """
        places, nbytes = layout_of(tuple(specs.items()))
        found = self._take(os.geteuid() if owner is None else owner, nbytes, grow=grow)
        if found is None:
            return None
        segment, start, generation = found
        block = segment.bytes[start : start + nbytes]
        segment.words[start >> 3] = generation
        # A numpy view of a view drops the view in between; torch keeps `block` itself for every tensor made from it.
        given = self._given[generation] = _Given(block, self._dead.append)
        given.segment, given.start, given.generation = segment, start, generation
        tensors: dict[str, torch.Tensor] = {}
        for name, (at, size) in places.items():
            spec = specs[name]
            dtype = getattr(torch, spec.dtype)
            # A tensor without bytes needs no place and must not keep the block alive.
            flat = (
                torch.frombuffer(block, dtype=dtype, count=size // dtype.itemsize, offset=at)
                if size
                else torch.empty(0, dtype=dtype, device="cpu")
            )
            tensors[name] = flat.reshape(spec.shape)
        spans = tuple(places.values())
        holds = any(size for _, size in spans)
        return BlockTensors(tensors, Place(segment, start, generation) if holds else None, spans)

    def place_in(
        self, tensors: Mapping[str, Any], places: Mapping[str, tuple[int, int]], nbytes: int, owner: Owner
    ) -> Place | None:
        """The block of an entry's tensors; None unless they lie in one block of this user, placed as by `layout`.

        places, nbytes: their layout.
        """
        block: int | None = None
        for name, (at, size) in places.items():
            if not size:
                continue
            start = tensors[name].data_ptr() - at
            if block is None:
                block = start
            if start != block or not tensors[name].is_contiguous():
                return None
        if block is None:
            return None
        for segment in self._segments.copy():
            start = block - segment.address
            if start >= 0 and start + nbytes <= segment.nbytes and segment.free.holds(start):
                if segment.owner != owner:
                    return None
                return Place(segment, start, int.from_bytes(segment.bytes[start : start + 8], "little"))
        return None

    @contextmanager
    def thinning(self) -> Iterator[frozenset[Segment]]:
        """The segments whose blocks the others of their users have room for, for the caller to move them there.

        No block is made in these meanwhile. At the end every empty segment is closed: this process keeps its pages no
        longer, and a client only until it looks. One caller at a time.
        """
        with self._thinning:
            with self._lock:
                self._reclaim()
                self._leaving = self._spare()
            try:
                yield frozenset(self._leaving)
            finally:
                with self._lock:
                    self._leaving = set()
                    self._reclaim()
                    for segment in self._empty():
                        self._close(segment)

    def close(self) -> None:
        """Stop prefaulting and close the descriptors."""
        self._ahead.shutdown(cancel_futures=True)
        with self._lock:
            for segment in self._segments:
                segment.close()
            self._segments.clear()

    def _take(self, owner: Owner, nbytes: int, *, grow: bool) -> tuple[Segment, int, int] | None:
        with self._lock:
            self._reclaim()
            if self._refused and self._gives_way(owner):
                return None
            for segment in self._segments:
                mine = segment.owner == owner and segment not in self._leaving
                found = self._from(segment, nbytes) if mine else None
                if found is not None:
                    return found
            if not grow:
                return None
            made = self._make(owner, nbytes)
            if made is not None:
                self._refused.pop(owner, None)
                return self._from(made, nbytes)
            # A user id per entry of the tokens file, or of this host's users in the socket's group.
            if any(segment.owner != owner for segment in self._segments):
                self._refused[owner] = self._clock()
            return None

    def _make(self, owner: Owner, nbytes: int) -> Segment | None:
        """A new segment, in place of empty ones where they are in the way; None: no room."""
        room = self.limit_nbytes - self.nbytes
        wanted = aligned(nbytes) if room >= aligned(nbytes) else max(nbytes, self._segment_nbytes)
        for segment in self._empty():
            if room >= wanted:
                break
            self._close(segment)
            room += segment.nbytes
        size = -(-max(nbytes, min(self._segment_nbytes, room)) // mmap.PAGESIZE) * mmap.PAGESIZE
        if size > room:
            return None
        try:
            made = Segment(next(self.numbers), owner, size)
        except OSError:  # out of descriptors or memory: tensors lie in ordinary memory, as without room
            return None
        self._segments.append(made)
        if self.register is not None:
            with suppress(RuntimeError):  # out of threads: it is copied more slowly
                self._ahead.submit(made.register, self.register)
        return made

    def _empty(self) -> list[Segment]:
        return [s for s in self._segments if not s.free.used_nbytes]

    def _close(self, segment: Segment) -> None:
        self._segments.remove(segment)
        segment.close_empty()

    def _spare(self) -> set[Segment]:
        """Of each user's segments the emptiest, as long as the free room of the rest is as large as what they hold."""
        spare: set[Segment] = set()
        for owner in {segment.owner for segment in self._segments}:
            mine = sorted((s for s in self._segments if s.owner == owner), key=lambda s: s.free.used_nbytes)
            room, held = sum(s.free.nbytes - s.free.used_nbytes for s in mine), 0
            for segment in mine:
                room -= segment.free.nbytes - segment.free.used_nbytes
                held += segment.free.used_nbytes
                if held > room:
                    break
                spare.add(segment)
        return spare

    def _gives_way(self, owner: Owner) -> bool:
        """Whether a user has more than its share while another one, that has less, was refused lately."""
        oldest = self._clock() - REFUSED_S
        self._refused = {user: at for user, at in self._refused.items() if at > oldest}
        held = dict.fromkeys((owner, *self._refused), 0)
        for segment in self._segments:
            held[segment.owner] = held.get(segment.owner, 0) + segment.nbytes
        share = self.limit_nbytes // len(held)
        return held[owner] > share and any(held[user] < share for user in self._refused if user != owner)

    def _from(self, segment: Segment, nbytes: int) -> tuple[Segment, int, int] | None:
        start = segment.free.take(nbytes)
        if start is None:
            return None
        self._generation += 1
        if start + nbytes > segment.ready_nbytes - PREFAULT_NBYTES // 2 and segment.ready_nbytes < segment.nbytes:
            with suppress(RuntimeError):  # out of threads: the first writer pays
                self._ahead.submit(segment.prefault)
        return segment, start, self._generation

    def _reclaim(self) -> None:
        while self._dead:
            given = self._dead.popleft()
            del self._given[given.generation]
            # Before the room can be used again: a late reader finds this number and drops its copy.
            given.segment.words[given.start >> 3] = 0
            given.segment.free.give(given.start)
