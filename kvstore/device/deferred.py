"""A driver without a GPU, for tests: it copies as late as CUDA may, in the worst order, and notices what ended early.

Device memory is host memory, and what is exported of it a memfd, so that another process can map it. What a stream is
to do is kept and done only when an event is waited for, then only what that event needs: what no stream was told to
wait for is not done before. The copies of a batch are done in an order that `shuffle` chooses. `released` says that
memory was given back: a copy that is still to be done with it is counted in `early`; `poison` also fills it with 0xDB.
Thread-safe: one lock.
"""

import ctypes
import hashlib
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.device import DriverError, OutOfMemory

POISON = 0xDB
MEMORY_NBYTES = 1 << 30


@dataclass(eq=False)
class _Stream:
    """One stream's work that is not done. done: how many pieces of work were."""

    device: int
    due: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0


@dataclass(frozen=True, eq=False)
class _Event:
    stream: _Stream
    position: int


class _Memory:
    """Host memory that stands for a device's: this process's own, or another one's, only to be read."""

    def __init__(self, nbytes: int, descriptor: int | None = None) -> None:
        """descriptor: of another process's, which stays the caller's. Raises ValueError or OSError."""
        self.nbytes = nbytes
        own = os.memfd_create("kvstored-deferred", os.MFD_CLOEXEC) if descriptor is None else os.dup(descriptor)
        weakref.finalize(self, os.close, own)
        self.descriptor = own
        if descriptor is None:
            os.ftruncate(own, nbytes)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if descriptor is None else 0)
        self._bytes = np.frombuffer(mmap.mmap(own, nbytes, mmap.MAP_SHARED, protection), dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)


@dataclass(frozen=True, eq=False)
class _Over:
    """What an array over memory holds on to."""

    __array_interface__: dict[str, Any]
    owner: object


@dataclass(eq=False)
class _Copies:
    runs: list[tuple[int, int, int]]


class Deferred:
    """See `device.MemoryDriver`. batches, runs: calls of `copy` and runs; early: copies whose memory was given back.

    registered: bytes by address. before_copy: called before each run is copied. memory_nbytes: what each device has;
    others_nbytes: what others have taken of it. kernels: whether the codecs are said to have kernels for it, which are
    the CPU's then. host: all drivers of one name have the same devices. exports, maps: whether it does.
    """

    def __init__(
        self,
        shuffle: Callable[[list[Any]], None] = list.reverse,
        *,
        refuse: bool = False,
        devices: int = 2,
        memory_nbytes: int = MEMORY_NBYTES,
        kernels: bool = False,
        host: str = "",
    ) -> None:
        self._host = host
        self.exports = self.maps = True
        self.mapped: set[_Memory] = set()
        self._devices = devices
        self.memory_nbytes = memory_nbytes
        self.others_nbytes = 0
        self.kernels = kernels
        self.bounds: dict[int, int] = {}
        self._allocated: dict[_Memory, int] = {}
        self._shuffle = shuffle
        self._refuse = refuse
        self._lock = threading.RLock()
        self._current: dict[int, _Stream] = {}
        self._pending: list[_Copies] = []
        self.registered: dict[int, int] = {}
        self.read_only: list[bool] = []
        self.batches = self.runs = self.early = 0
        self.kept: list[Any] = []
        self.before_copy: Callable[[], None] = _nothing

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Noted."""
        if self._refuse:
            raise DriverError("refused, as it was asked to")
        self.registered[address] = nbytes
        self.read_only.append(read_only)

    def unregister(self, address: int) -> None:
        """Noted."""
        if self.registered.pop(address, None) is None:
            raise DriverError(f"{address:#x} was not registered")

    def stream(self, device: int) -> Any:
        """A new one."""
        return _Stream(device)

    def current(self, device: int) -> Any:
        """One for a device, whatever the thread."""
        return self._current.setdefault(device, _Stream(device))

    def computing(self, device: int) -> AbstractContextManager[object]:  # noqa: ARG002 - what computes does so at once
        """There is nothing to set apart."""
        return nullcontext()

    def compute(self, device: int, work: Callable[[], None]) -> None:
        """A kernel: work on the current stream, to be done when it must be."""
        with self._lock:
            self.current(device).due.append(work)

    def copy(self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool) -> None:  # noqa: ARG002 - in any order
        """Kept for later."""
        with self._lock:
            copies = _Copies(list(zip(to, of, nbytes, strict=True)))
            self.batches += 1
            self.runs += len(copies.runs)
            self._pending.append(copies)
            stream.due.append(lambda: self._do(copies))

    def _do(self, copies: _Copies) -> None:
        runs = list(copies.runs)
        self._shuffle(runs)
        for target, source, n in runs:
            self.before_copy()
            ctypes.memmove(target, source, n)
        self._pending.remove(copies)

    def record(self, stream: Any) -> Any:
        """An event."""
        with self._lock:
            return _Event(stream, stream.done + len(stream.due))

    def wait(self, stream: Any, event: Any) -> None:
        """The stream's next work after the event."""
        with self._lock:
            stream.due.append(lambda: self._reach(event))

    def synchronize(self, event: Any) -> None:
        """Do what the event needs, and no more."""
        with self._lock:
            self._reach(event)

    def _reach(self, event: _Event) -> None:
        stream = event.stream
        while stream.done < event.position:
            work = stream.due[0]
            work()
            stream.due.pop(0)
            stream.done += 1

    def keep(self, tensor: Any, stream: Any) -> None:  # noqa: ARG002 - the stream frees nothing here
        """Noted."""
        self.kept.append(tensor)

    def memory(self, device: int) -> tuple[int, int]:
        """As it was said when this was made."""
        if device >= self._devices:
            raise DriverError(f"there are {self._devices} devices, no cuda:{device}")
        with self._lock:
            own = sum(nbytes for memory, nbytes in self._allocated.items())
            return self.memory_nbytes - self.others_nbytes - own, self.memory_nbytes

    def allocate(self, device: int, nbytes: int) -> Any:
        """Host memory."""
        with self._lock:
            if nbytes > self.memory(device)[0]:
                raise OutOfMemory(f"{nbytes} bytes on cuda:{device}")
            made = _Memory(nbytes)
            self._allocated[made] = nbytes
            return made

    def free(self, memory: Any) -> None:
        """The host gets it back when no tensor lies over it any more."""
        self.released(memory.address, memory.nbytes)
        with self._lock:
            del self._allocated[memory]

    def where(self, device: int) -> Any:  # noqa: ARG002 - all of them are in host memory
        """The host."""
        import torch

        return torch.device("cpu")

    def tensor(self, device: int, address: int, nbytes: int, owner: object) -> Any:  # noqa: ARG002 - as above
        """Over the same memory: what is computed with it is computed at once."""
        import torch

        interface = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        return torch.from_numpy(np.asarray(_Over(interface, owner)))

    def computes(self, device: int) -> bool:  # noqa: ARG002 - as above
        """As it was said when this was made."""
        return self.kernels

    def uuid(self, device: int) -> bytes:
        """By the host's name and the number."""
        return hashlib.blake2b(f"{self._host} {device}".encode(), digest_size=16).digest()

    def export(self, memory: Any) -> int:
        """Of the memfd."""
        if not self.exports:
            raise DriverError("exports nothing, as it was asked to")
        return os.dup(memory.descriptor)

    def map(self, device: int, descriptor: int, nbytes: int) -> Any:
        """Its pages, for reading."""
        if not self.maps or device >= self._devices:
            raise DriverError("maps nothing, as it was asked to")
        try:
            made = _Memory(nbytes, descriptor)
        except (OSError, ValueError) as error:
            raise DriverError(f"{nbytes} bytes cannot be mapped: {error}") from None
        self.mapped.add(made)
        return made

    def unmap(self, memory: Any) -> None:
        """The pages go with the last tensor over them."""
        self.released(memory.address, memory.nbytes)
        self.mapped.remove(memory)

    def bound(self, device: int, nbytes: int) -> None:
        """Noted."""
        self.bounds[device] = nbytes

    def settle(self, device: int = 0) -> None:
        """Do all that the current stream is to do."""
        self.synchronize(self.record(self.current(device)))

    def released(self, address: int, nbytes: int) -> None:
        """Memory was given back: its owner uses it again from now on."""
        with self._lock:
            for copies in self._pending:
                for target, source, n in copies.runs:
                    self.early += any(here < address + nbytes and address < here + n for here in (target, source))

    def poison(self, address: int, nbytes: int) -> None:
        """The same of memory that may be written to: it is."""
        self.released(address, nbytes)
        ctypes.memset(address, POISON, nbytes)

    @property
    def pending(self) -> int:
        """Batches that are not done."""
        return len(self._pending)


def _nothing() -> None:
    """What happens before a copy, unless a test says otherwise."""
