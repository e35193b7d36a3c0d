"""The copies of one request to, from and on GPUs: one batch, on streams of their own.

Rules. The memory that is copied from or to is used until the batch has finished: it is given back after that, and never
before. A copy into a tensor on a device waits for all that the device's current stream was to do before, and so does a
copy out of one. A batch belongs to one call; streams are shared.
"""

from collections.abc import Iterable
from itertools import accumulate, product, repeat
from math import prod
from typing import Any

from kvstore.device import Driver

RUNS_MAX = 16_384
"""Dense runs of one tensor that are copied as they lie: 64 layers of 256 blocks. What is cut finer is made dense."""


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
        self._made: dict[int, Any] = {}
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

    def put_on(self, device: int, address: int, source: Any) -> None:
        """Copy a tensor's bytes to an address on a device of this batch. source: there or on the host, in few runs."""
        self._add_runs(source, Runs(source), address, device, store=True)

    def take_from(self, device: int, address: int, target: Any) -> None:
        """Fill a tensor, there or on the host and in few runs, with the bytes from an address on a device on."""
        self._add_runs(target, Runs(target), address, device, store=False)

    def bring(self, device: int, room: Any, source: Any) -> None:
        """Copy flat bytes of the host to a tensor on the device that was made just now, on its current stream."""
        if device not in self._made:
            # Its memory may have been something else's, whose kernels that stream is still to run.
            self._made[device] = self._driver.record(self._driver.current(device))
        to, of, sizes = self._copies.setdefault((device, False), ([], [], []))
        if source.size:
            to.append(room.data_ptr())
            of.append(source.ctypes.data)
            sizes.append(source.size)
        self._kept.append((room, device, False))
        self._kept.append((source, device, False))

    @property
    def decodes(self) -> bool:
        """Whether the codecs have kernels on all of its devices."""
        return all(map(self._driver.computes, self._after))

    def _add(self, x: Any, address: int, *, store: bool) -> bool:
        runs = Runs.of(x)
        if runs is not None:
            self._add_runs(x, runs, address, x.device.index or 0, store=store)
        return runs is not None

    def _add_runs(self, x: Any, runs: Runs, address: int, device: int, *, store: bool) -> None:
        to, of, sizes = self._copies.setdefault((device, store), ([], [], []))
        there = runs.addresses()
        here = list(accumulate(repeat(runs.nbytes, len(there) - 1), initial=address)) if there else []
        to += here if store else there
        of += there if store else here
        sizes += [runs.nbytes] * len(there)
        self._kept.append((x, device, store))

    def start(self) -> None:
        """Have everything copied: one call of the driver's a device and direction."""
        driver = self._driver
        for (device, store), (to, of, sizes) in self._copies.items():
            stream = self._streams.of(device, store=store)
            # The tensor's memory may have been something else's a moment ago, and its bytes be computed only now.
            driver.wait(stream, self._after[device])
            if device in self._made and not store:
                driver.wait(stream, self._made[device])
            for x, at, stores in self._kept:
                if (at, stores) == (device, store) and getattr(x, "is_cuda", False):
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
