"""A driver without a GPU, for tests: it copies as late as CUDA may, in the worst order, and notices what ended early.

Device memory is host memory. What a stream is to do is kept and done only when an event is waited for, then only what
that event needs: what no stream was told to wait for is not done before. The copies of a batch are done in an order
that `shuffle` chooses. `released` says that memory was given back: a copy that is still to be done with it is counted
in `early`; `poison` also fills it with 0xDB. Thread-safe: one lock.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstored_client.device import DriverError

POISON = 0xDB


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


@dataclass(eq=False)
class _Copies:
    runs: list[tuple[int, int, int]]
    store: bool


class Deferred:
    """See `device.Driver`. batches, runs: calls of `copy` and runs of bytes; early: copies whose memory was given back.

    registered: bytes by address. before_copy: called before each run is copied.
    """

    def __init__(self, shuffle: Callable[[list[Any]], None] = list.reverse, *, refuse: bool = False) -> None:
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

    def compute(self, device: int, work: Callable[[], None]) -> None:
        """A kernel: work on the current stream, to be done when it must be."""
        with self._lock:
            self.current(device).due.append(work)

    def copy(self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool) -> None:
        """Kept for later."""
        with self._lock:
            copies = _Copies(list(zip(to, of, nbytes, strict=True)), store)
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

    def settle(self, device: int = 0) -> None:
        """Do all that the current stream is to do."""
        self.synchronize(self.record(self.current(device)))

    def released(self, address: int, nbytes: int) -> None:
        """Host memory was given back: its owner uses it again from now on."""
        with self._lock:
            for copies in self._pending:
                for target, source, n in copies.runs:
                    here = target if copies.store else source
                    if here < address + nbytes and address < here + n:
                        self.early += 1

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
