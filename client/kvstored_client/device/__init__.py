"""Copies between a client's shared memory and tensors on a GPU: one batch a request, on streams of its own.

    Transfers   the copies of one client, each request's in a `kvstore.device.copies.Batch`, and what it registered

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
from typing import Any, Protocol

from kvstore import arrays
from kvstore.device import Driver, DriverError
from kvstore.device.copies import Batch, Streams
from kvstore.packed import PackedTensor
from kvstored_client.aside import Aside
from kvstored_client.device.landing import Landing, encoded_there, lands
from kvstored_client.device.paged import Paged, Scatter

logger = logging.getLogger(__name__)

REGISTER_MAX_NBYTES = 64 << 30
"""Page-locked memory of one client: the segments it reads from and those it puts through. Registering takes 0.1 s a GiB
with pages of 4 KiB."""


class Segment(Protocol):
    """A segment of shared memory that is mapped."""

    address: int
    nbytes: int
    writable: bool
    device: int | None


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
        self._by_uuid: dict[bytes, int] = {}
        self._maps = True

    @property
    def driver(self) -> Driver | None:
        """The driver; None where there is none."""
        if not self._opened:
            self._opened = [open_driver()]
        return self._opened[0]

    def serves(self, entries: Iterable[Mapping[str, Any] | None]) -> bool:
        """Whether any of these tensors is on a GPU that a driver serves."""
        return bool(_devices(entries)) and self.driver is not None

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

    def there(self, entries: Iterable[Mapping[str, Any] | None]) -> bytes:
        """The UUID of the GPU on which all of these tensors are, which are filled there; b"": there is none.

        What a daemon holds in that GPU's memory is then copied within it, out of segments that this client maps.
        """
        entries = list(entries)
        devices = _devices(entries) if self._maps else set()
        driver = self.driver if len(devices) == 1 else None
        if driver is None or not all(lands(x) for tensors in entries if tensors is not None for x in tensors.values()):
            return b""
        device = devices.pop()
        known = next((uuid for uuid, number in self._by_uuid.items() if number == device), None)
        if known is not None:
            return known
        try:
            uuid = driver.uuid(device)
        except DriverError as error:
            self.map_no_more(str(error))
            return b""
        self._by_uuid[uuid] = device
        return uuid

    def maps(self, uuid: bytes) -> tuple[Driver, int] | None:
        """The driver and its number of a GPU that was asked for; None: nothing is mapped there."""
        driver, device = self.driver, self._by_uuid.get(uuid)
        return None if driver is None or device is None else (driver, device)

    def map_no_more(self, why: str) -> None:
        """Ask for nothing that lies in a GPU's memory: of this life of the daemon."""
        logger.warning("the daemon's memory on the GPU is not mapped, what lies there comes through RAM: %s", why)
        self._maps = False

    def map_again(self) -> None:
        """Another life of the daemon."""
        self._maps = True

    def unpacks(self, entries: Iterable[Mapping[str, Any] | None]) -> bool:
        """Whether what is held encoded may come as it is held: all of these tensors are on GPUs that decode it."""
        entries = list(entries)
        devices = _devices(entries)
        driver = self.driver if devices else None
        if driver is None or not all(map(driver.computes, devices)):
            return False
        return all(lands(x) for tensors in entries if tensors is not None for x in tensors.values())

    def run(self, batch: Batch, packed: Sequence[tuple[Any, Any]]) -> Sequence[tuple[Any, Any]]:
        """Run a batch with what is packed added to it, which is decoded there, also into paged blocks.

        Returns those left to the host. Nothing is copied or computed afterwards. Raises DriverError.
        """
        if not packed or self.driver is None or self._streams is None:
            batch.run()
            return packed
        paged = [(target, source) for target, source in packed if isinstance(target, Paged)]
        scatter = Scatter(self.driver, paged)
        landing = Landing(self.driver, self._streams, [pair for pair in packed if not isinstance(pair[0], Paged)])
        landing.bring(batch)
        scatter.bring(batch)
        batch.run()
        return [*landing.decode(), *scatter.decode()]

    def encoded(self, tensors: Mapping[str, Any], *, prefix_start: bool) -> dict[str, Any] | None:
        """Dense tensors on a GPU encoded there, as a store would below hot; None: it has no kernels for them.

        Their bytes must be there already. By a stream of its own. Raises whatever the device does.
        """
        devices = _devices([tensors])
        driver = self.driver if len(devices) == 1 else None
        if driver is None or not all(getattr(x, "is_cuda", False) and x.is_contiguous() for x in tensors.values()):
            return None
        device = devices.pop()
        if not driver.computes(device):
            return None
        return encoded_there(driver, device, tensors, prefix_start=prefix_start)

    def fill(
        self, pairs: Sequence[tuple[Any, Any]], batch: Batch | None, segment_at: Callable[[int], Any]
    ) -> Sequence[tuple[Any, Any]]:
        """Copy (target on a GPU, dense source on the host) pairs. Returns those that are to be copied otherwise."""
        if batch is None:
            return pairs
        rest: list[tuple[Any, Any]] = []
        direct: list[tuple[Any, Any]] = []
        packed: list[tuple[Any, Any]] = []
        for target, source in pairs:
            if isinstance(source, PackedTensor):
                there = batch.decodes and (isinstance(target, Paged) or lands(target))
                (packed if there else rest).append((target, source))
                for part in source.parts.values():
                    data = arrays.bytes_in_place(part)
                    segment = None if data is None else segment_at(data.ctypes.data)
                    if segment is not None:
                        self.uses(segment)
                        break
                continue
            direct_to = getattr(target, "is_cuda", False) and not isinstance(target, Paged)
            address = _lies_at(source) if direct_to else None
            fits = address is not None and arrays.same_kind(target, source)
            if address is None or not fits or not batch.load(target, address):
                rest.append((target, source))
                continue
            direct.append((target, source))
            segment = segment_at(address)
            if segment is not None:
                self.uses(segment)
            del segment
        try:
            return [*rest, *self.run(batch, packed)]
        except DriverError:
            return pairs

    def uses(self, mapping: Segment) -> None:
        """A segment is copied from or to: it is registered beside the calls, once, if there is room for it.

        One in a GPU's memory needs no registering.
        """
        if mapping in self._known or mapping.device is not None:
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


def _lies_at(source: Any) -> int | None:
    """Where the bytes of a dense tensor begin, on the host or on a GPU; None: they do not lie one behind the other."""
    if getattr(source, "is_cuda", False):
        dense = source.is_contiguous() and not source.is_conj() and not source.is_neg()
        return int(source.data_ptr()) if dense else None
    data = arrays.bytes_in_place(source)
    return None if data is None else int(data.ctypes.data)


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
    from kvstore.device.cuda import Cuda

    try:
        return Cuda()
    except (ImportError, DriverError) as error:
        logger.info("CUDA tensors are copied through torch: %s", error)
        return None
