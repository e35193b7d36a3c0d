"""Copies between a client's shared memory and tensors on a GPU: one batch a request, on streams of its own.

    Driver      what is asked of CUDA, and all that is: `cuda` has the real one, `deferred` one without a GPU
    Transfers   the copies of one client
    Batch       the copies of one request, from `start` until `finish` has returned

Rules. The memory of a lease, or of a put, is read or written by the GPU until the batch has finished: it is given back
after that, and never before. Whether a block was used again is asked after that, too. A copy into a tensor waits for
all that its device's current stream was to do before, and so does a copy out of one. When a call returns the copies are
done, so any stream may use the tensors. Registering memory makes copies faster and changes no result: it is done beside
the calls, bounded, and may fail. Thread-safe. Imports neither torch nor CUDA.
"""

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, product, repeat
from math import prod
from typing import Any, Protocol

from kvstore import arrays
from kvstored_client.aside import Aside

logger = logging.getLogger(__name__)

RUNS_MAX = 16_384
"""Dense runs of one tensor that are copied as they lie: 64 layers of 256 blocks. What is cut finer is made dense."""
REGISTER_MAX_NBYTES = 64 << 30
"""Page-locked memory of one client: the segments it reads from and those it puts through. Registering takes 0.1 s a GiB
with pages of 4 KiB."""


class Driver(Protocol):
    """What is asked of CUDA. Streams and events are its own objects. Each raises DriverError for what CUDA refuses."""

    def register(self, address: int, nbytes: int, *, read_only: bool) -> None:
        """Page-lock host memory, so that it is copied at the bus's speed. read_only: it is mapped for reading."""
        ...

    def unregister(self, address: int) -> None:
        """Undo `register`, before the memory is unmapped."""
        ...

    def stream(self, device: int) -> Any:
        """A new stream."""
        ...

    def current(self, device: int) -> Any:
        """The stream on which the calling thread's work for a device is."""
        ...

    def copy(self, to: Sequence[int], of: Sequence[int], nbytes: Sequence[int], stream: Any, *, store: bool) -> None:
        """Have runs of bytes copied, in any order among themselves, after all that the stream was to do before.

        to, of: addresses on the host and the stream's device, registered or not. store: from the device to the host.
        """
        ...

    def record(self, stream: Any) -> Any:
        """An event: over when the stream has done all that it was to do until now."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Have a stream do what comes next after an event."""
        ...

    def synchronize(self, event: Any) -> None:
        """Return once an event is over."""
        ...

    def keep(self, tensor: Any, stream: Any) -> None:
        """A tensor is used by a stream: its memory is not given to others before the stream is done with it."""
        ...


class DriverError(Exception):
    """CUDA refused a call."""


class Segment(Protocol):
    """A segment of shared memory that is mapped."""

    address: int
    nbytes: int
    writable: bool


class Runs:
    """The dense runs of a tensor on a device, in the order of its elements. nbytes: of each."""

    def __init__(self, x: Any) -> None:
        nbytes, outer = x.element_size(), list(zip(x.shape, x.stride(), strict=True))
        while outer and (outer[-1][0] == 1 or outer[-1][1] * x.element_size() == nbytes):
            nbytes *= outer.pop()[0]
        outer = [(size, stride) for size, stride in outer if size != 1]
        self.count = prod(size for size, _ in outer) if x.numel() else 0
        self.nbytes = nbytes
        self._start = x.data_ptr()
        self._steps = [range(0, size * stride * x.element_size(), stride * x.element_size()) for size, stride in outer]
        self.overlap = any(not stride for _, stride in outer)

    @classmethod
    def of(cls, x: Any) -> "Runs | None":
        """Those of a tensor; None where it cannot be copied run by run."""
        if not getattr(x, "is_cuda", False) or x.is_conj() or x.is_neg() or any(step < 0 for step in x.stride()):
            return None
        if any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)):
            return None  # expanded: its elements are not bytes of their own
        runs = cls(x)
        return runs if runs.count <= RUNS_MAX else None

    def addresses(self) -> list[int]:
        """Where each run begins."""
        if not self.count:
            return []
        return [self._start + sum(offsets) for offsets in product(*self._steps)]


class Batch:
    """The copies of one request: added, started, and finished, whatever happens."""

    def __init__(self, driver: Driver, streams: "Streams", devices: Iterable[int]) -> None:
        """devices: of its tensors. What their current streams, in this thread, are to do is waited for."""
        self._driver = driver
        self._streams = streams
        # Here and not in `start`, which may run in another thread: each thread has a current stream of its own.
        self._after = {device: driver.record(driver.current(device)) for device in devices}
        self._copies: dict[tuple[int, bool], tuple[list[int], list[int], list[int]]] = {}
        self._kept: list[tuple[Any, int, bool]] = []
        self._events: list[Any] = []

    def load(self, target: Any, address: int) -> bool:
        """Fill a tensor with the bytes from a host address on. False, and nothing is done: not run by run."""
        return self._add(target, address, store=False)

    def store(self, source: Any, address: int) -> bool:
        """Copy a tensor's bytes to a host address. One that is cut too fine is made dense on its device first."""
        if Runs.of(source) is None:
            if not getattr(source, "is_cuda", False):
                return False
            device, driver = source.device.index or 0, self._driver
            driver.wait(driver.current(device), self._after[device])
            source = source.resolve_conj().resolve_neg().contiguous()
            self._after[device] = driver.record(driver.current(device))
        return self._add(source, address, store=True)

    def _add(self, x: Any, address: int, *, store: bool) -> bool:
        runs = Runs.of(x)
        if runs is None:
            return False
        device = x.device.index or 0
        to, of, sizes = self._copies.setdefault((device, store), ([], [], []))
        there = runs.addresses()
        here = list(accumulate(repeat(runs.nbytes, len(there) - 1), initial=address)) if there else []
        to += here if store else there
        of += there if store else here
        sizes += [runs.nbytes] * len(there)
        self._kept.append((x, device, store))
        return True

    def start(self) -> None:
        """Have everything copied: one call of the driver's a device and direction."""
        driver = self._driver
        for (device, store), (to, of, sizes) in self._copies.items():
            stream = self._streams.of(device, store=store)
            # The tensor's memory may have been something else's a moment ago, and its bytes be computed only now.
            driver.wait(stream, self._after[device])
            for x, at, stores in self._kept:
                if (at, stores) == (device, store):
                    driver.keep(x, stream)
            try:
                driver.copy(to, of, sizes, stream, store=store)
            finally:
                self._events.append(driver.record(stream))  # of what was begun, too

    def wait_for_caller(self) -> None:
        """Return once the streams of who made this have done what they were to do then."""
        for event in self._after.values():
            self._driver.synchronize(event)

    def finish(self) -> None:
        """Return once nothing is copied any more. Again is harmless: one that was interrupted is to be called again."""
        while self._events:
            self._driver.synchronize(self._events[-1])
            self._events.pop()
        self._kept.clear()

    def run(self) -> None:
        """Start and finish. Whatever it ends with, nothing is copied any more."""
        try:
            self.start()
        finally:
            self.finish()


class Streams:
    """A stream for each device and direction, shared by all requests: the bus has one lane each way."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._streams: dict[tuple[int, bool], Any] = {}

    def of(self, device: int, *, store: bool) -> Any:
        """The stream."""
        found = self._streams.get((device, store))
        return self._streams.setdefault((device, store), self._driver.stream(device)) if found is None else found


class Transfers:
    """The copies of one client, and the memory that it has registered for them.

    driver: None for CUDA's own, which is looked for when the first tensor on a GPU comes.
    """

    def __init__(self, driver: Driver | None, register_max_nbytes: int = REGISTER_MAX_NBYTES) -> None:
        self._given = driver
        self._register_max_nbytes = register_max_nbytes
        self.forget()

    def forget(self) -> None:
        """Begin anew: in a forked child what is registered is the parent's."""
        self._opened: list[Driver | None] = [] if self._given is None else [self._given]
        self._streams: Streams | None = None
        self._left_nbytes = [self._register_max_nbytes]
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._aside = Aside()

    @property
    def driver(self) -> Driver | None:
        """The driver; None where there is none."""
        if not self._opened:
            self._opened = [open_driver()]
        return self._opened[0]

    def batch_for(self, entries: Iterable[Mapping[str, Any] | None]) -> Batch | None:
        """A request's copies to or from these tensors; None: none of them is on a GPU that a driver serves."""
        devices = _devices(entries)
        driver = self.driver if devices else None
        if driver is None:
            return None
        if self._streams is None:
            self._streams = Streams(driver)
        return Batch(driver, self._streams, devices)

    def before(self, entries: Iterable[Mapping[str, Any] | None]) -> Callable[[], None] | None:
        """What waits for all that this thread's streams are to do with tensors on a GPU; None: none of them is on one.

        For whoever has another thread read them: that one has streams of its own, which wait for nobody.
        """
        entries = list(entries)
        batch = self.batch_for(entries)
        if batch is not None:
            return batch.wait_for_caller
        devices, torch = _devices(entries), sys.modules.get("torch")
        if not devices or torch is None or not torch.cuda.is_available():
            return None
        events = [torch.cuda.current_stream(device).record_event() for device in devices]

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait

    def fill(
        self, pairs: Sequence[tuple[Any, Any]], batch: Batch | None, segment_at: Callable[[int], Any]
    ) -> Sequence[tuple[Any, Any]]:
        """Copy (target on a GPU, dense source on the host) pairs. Returns those that are to be copied otherwise."""
        if batch is None:
            return pairs
        rest, direct = [], []
        for target, source in pairs:
            data = arrays.bytes_in_place(source) if getattr(target, "is_cuda", False) else None
            fits = data is not None and data.size == target.nbytes and arrays.same_kind(target, source)
            if data is None or not fits or not batch.load(target, data.ctypes.data):
                rest.append((target, source))
                continue
            direct.append((target, source))
            segment = segment_at(data.ctypes.data)
            if segment is not None:
                self.uses(segment)
            del data, segment
        try:
            batch.run()
        except DriverError:
            return pairs
        return rest

    def uses(self, mapping: Segment) -> None:
        """A segment is copied from or to: it is registered beside the calls, once, if there is room for it."""
        if mapping in self._known:
            return
        self._known[mapping] = False
        self._aside.start([], self._register, weakref.ref(mapping))

    def registered(self, mapping: Segment) -> bool:
        """Whether a segment is."""
        return self._known.get(mapping, False)

    def settled(self) -> None:
        """Return once what `uses` has begun is done."""
        jobs: list[Any] = []
        self._aside.start(jobs, int)
        jobs[0].wait()

    def _register(self, ref: "weakref.ref[Any]") -> None:
        mapping = ref()
        if mapping is None or mapping.nbytes > self._left_nbytes[0]:
            return
        address, nbytes, driver = mapping.address, mapping.nbytes, self.driver
        if driver is None:
            return
        try:
            driver.register(address, nbytes, read_only=not mapping.writable)
        except DriverError as error:
            logger.info("copied pageable, as it cannot be registered: address=%#x bytes=%d %s", address, nbytes, error)
            return
        self._left_nbytes[0] -= nbytes
        self._known[mapping] = True
        # Called before the mapping's memory is unmapped: its own attributes go after its finalizers.
        weakref.finalize(mapping, _unregister, driver, address, nbytes, self._left_nbytes).atexit = False


def _devices(entries: Iterable[Mapping[str, Any] | None]) -> set[int]:
    """The GPUs that hold some of these tensors."""
    return {
        x.device.index or 0
        for tensors in entries
        if isinstance(tensors, Mapping)
        for x in tensors.values()
        if getattr(x, "is_cuda", False)
    }


def _unregister(driver: Driver, address: int, nbytes: int, left_nbytes: list[int]) -> None:
    with suppress(DriverError):
        driver.unregister(address)
    left_nbytes[0] += nbytes


def settle_stream(device: Any) -> None:
    """Return once this thread's stream of a GPU has done what it was to do. Without one: at once."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.current_stream(device).synchronize()


def open_driver() -> Driver | None:
    """CUDA's, where torch has a GPU and cuda-bindings are installed; None elsewhere: tensors then go through torch."""
    from kvstored_client.device.cuda import Cuda

    try:
        return Cuda()
    except (ImportError, DriverError) as error:
        logger.info("CUDA tensors are copied through torch: %s", error)
        return None
