"""The hot tier in a device's memory: how entries get there, and how their bytes get out.

    put      room first, made by sinking what is least recently used; then one copy, from the host or on the device
    get      a copy on the host, into the memory that a door gives; in this process a copy on the device, or a view
    sink     encoded there if the codecs have kernels for it, else copied to the host and encoded

When a call returns its copies are done: an entry that can be found holds all of its bytes, and a block that nobody
refers to is not worked on. A caller's tensors on the device are copied after what its current stream was to do.
What the device cannot do (no memory, no compiler, a kernel that fails) is done on the host, with the same bytes. Only
room in hot itself has no substitute: without it a put is refused with OverQuota.
Any thread; calls `Mover`, so never under the residency lock.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch

from kvstore.config import MIB, StoreConfig
from kvstore.device import DriverError, MemoryDriver
from kvstore.device.copies import Batch, Runs, Streams
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import ENTRY_OVERHEAD_NBYTES, TENSOR_OVERHEAD_NBYTES, EncodedTensor, Entry
from kvstore.errors import CodecError, ConfigError, OverQuota, TierUnavailable
from kvstore.keys import Key
from kvstore.metadata.owner import Owner
from kvstore.residency.state import Residency
from kvstore.shm.arena import Owner as SegmentOwner
from kvstore.shm.arena import Register, empty_tensors
from kvstore.shm.layout import layout
from kvstore.tiers.device_memory import Block, DeviceArena, DeviceTensors, tensors_on_device

log = logging.getLogger(__name__)

COMPUTE_MAX_NBYTES = 64 * MIB
"""Entries up to this are encoded and decoded on the device."""
WORK_NBYTES = 8 * COMPUTE_MAX_NBYTES
"""What that takes beside the entry: float32 values, turned ones, codes and scales. Kept free beside the arena."""
FAILURES_TOLD = 8
"""Failures of the device's codecs that are logged; the rest is only counted."""

Displace = Callable[[Callable[[], bool], int, Owner], bool]
"""Sink entries of hot until the first argument says that it is enough. False: only pinned ones are left."""


class DeviceHot:
    """The device's memory, and copies to and from it. displace: set by who moves entries."""

    def __init__(self, driver: MemoryDriver, device: int, residency: Residency, arena: DeviceArena) -> None:
        self.driver = driver
        self.device = device
        self.name = f"cuda:{device}"
        self.arena = arena
        self.where: torch.device = driver.where(device)
        self.displace: Displace = _cannot
        self.failures = 0
        self._r = residency
        self._streams = Streams(driver)

    def gauges(self) -> dict[str, float]:
        """Numbers for the statistics."""
        return {**self.arena.gauges(), "device_failures": self.failures}

    def place(self, entry: Entry, owner: Owner) -> Entry:
        """An entry of tensors that are still a caller's, copied: to the device, or to the host if hot cannot hold it.

        Raises OverQuota where the device has no room and none can be made, TierUnavailable where it does not work.
        """
        user = getattr(entry.tensors, "owner", None)
        tensors = {name: tensor.parts[""] for name, tensor in entry.tensors.items()}
        if not self._admits(entry.key, entry.nbytes, owner):
            return _entry_of(entry, {name: _copy_on_host(x) for name, x in tensors.items()})
        block = self.room(entry.specs, entry.key, entry.nbytes, owner, user)
        return self.filled(block, entry, tensors)

    def room(
        self,
        specs: Mapping[str, TensorSpec],
        key: Key,
        entry_nbytes: int,
        owner: Owner,
        user: SegmentOwner | None = None,
    ) -> Block:
        """A block for tensors of these specs. Raises OverQuota where none can be made.

        user: whose processes may be handed the segment; None: this process's user's.
        """
        if not self._admits(key, entry_nbytes, owner):
            raise OverQuota(f"an entry of {entry_nbytes} bytes does not fit the hot tier beside what is pinned")
        nbytes, found = layout(specs)[1], list[Block]()

        def enough() -> bool:
            block = self.arena.take(nbytes, user)
            found.extend(() if block is None else (block,))
            return bool(found)

        if not enough() and not self.displace(enough, entry_nbytes, owner):
            raise OverQuota(
                f"{self.name} has no room for an entry of {nbytes} bytes: the hot tier holds {self.arena.nbytes} of "
                f"at most {self.arena.limit_nbytes} bytes there, and only pinned entries are left"
            )
        return found.pop()

    def filled(self, block: Block, like: Entry, tensors: Mapping[str, torch.Tensor]) -> Entry:
        """An entry in a block, with the bytes of these tensors. Raises TierUnavailable where they cannot be copied."""
        made = self.entry_in(block, like)
        held = tensors_on_device(made)
        assert held is not None
        try:
            batch = Batch(self.driver, self._streams, {self.device})
            for name, x in tensors.items():
                if x.numel():
                    batch.put_on(self.device, held.addresses[name], self._source(x, held.specs[name]))
            batch.run()
        except DriverError as error:
            raise TierUnavailable(f"{self.name} does not take bytes: {error}") from None
        return made

    def entry_in(self, block: Block, like: Entry) -> Entry:
        """An entry of raw tensors in a block, which whoever made it fills before anybody sees it."""
        errors = {name: {"relative_error": error} for name, error in like.receipt.items() if error}
        return Entry(like.key, DeviceTensors(block, dict(like.specs), errors, self._copied), lossy=like.lossy)

    def views(self, held: DeviceTensors) -> dict[str, torch.Tensor]:
        """Tensors over an entry's block, which they keep. Only to be read, but by who fills it."""
        return {name: self._view(held, name) for name in held}

    def host(self, held: DeviceTensors, into: Mapping[str, torch.Tensor] | None = None) -> Mapping[str, torch.Tensor]:
        """An entry's tensors on the host: in `into`, dense ones of its specs, or in fresh memory."""
        tensors = empty_tensors(held.specs) if into is None else into
        self.copy_to(held.addresses, tensors)
        return tensors

    def copy_to(self, addresses: Mapping[str, int], targets: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors for which `fills` is true with the bytes from addresses on, after what the stream is to do.

        Raises CodecError where the device does not give the bytes.
        """
        try:
            batch = Batch(self.driver, self._streams, {self.device})
            for name, x in targets.items():
                if x.numel():
                    batch.take_from(self.device, addresses[name], x)
            batch.run()
        except DriverError as error:
            raise CodecError(f"{self.name} does not give bytes back: {error}") from None

    def fills(self, x: torch.Tensor) -> bool:
        """Whether a tensor can be filled as it lies."""
        if self.is_here(x):
            return Runs.of(x) is not None
        return x.device.type == "cpu" and x.is_contiguous() and not (x.requires_grad or x.is_conj() or x.is_neg())

    def localized(self, entry: Entry) -> Entry:
        """The entry with its tensors on the host."""
        held = tensors_on_device(entry)
        return entry if held is None else _entry_of(entry, self.host(held))

    def viewed(self, entry: Entry) -> Entry:
        """The entry with its tensors over its block: for kernels, and no longer than they run."""
        held = tensors_on_device(entry)
        assert held is not None
        return _entry_of(entry, self.views(held))

    def computes(self, nbytes: int) -> bool:
        """Whether an entry of so many bytes is encoded and decoded on the device."""
        return nbytes <= COMPUTE_MAX_NBYTES and self.driver.computes(self.device)

    def failed(self, what: str, error: Exception) -> None:
        """Note that the device could not do something, which is done on the host instead."""
        self.failures += 1
        if self.failures <= FAILURES_TOLD:
            log.warning("done on the CPU instead what=%s device=%s error=%r", what, self.name, error)

    def serve(self) -> Register:
        """Bound what torch holds there to what is kept free for it, and share what is allocated from now on.

        Returns what registers host memory.
        """
        self.arena.shares = True
        self.driver.bound(self.device, WORK_NBYTES)
        return self._register

    def _register(self, address: int, nbytes: int) -> Callable[[], None] | None:
        try:
            self.driver.register(address, nbytes, read_only=False)
        except DriverError as error:
            log.info("copied pageable, as it cannot be registered: address=%#x bytes=%d %s", address, nbytes, error)
            return None
        return partial(self._unregister, address)

    def _unregister(self, address: int) -> None:
        with suppress(DriverError):
            self.driver.unregister(address)

    @property
    def uuid(self) -> bytes:
        """The device's, by which other processes know it; b"": it has none to tell."""
        try:
            return self.driver.uuid(self.device)
        except DriverError:
            return b""

    def settle(self) -> None:
        """Return once this thread's stream has done what it was to do there."""
        self.driver.synchronize(self.driver.record(self.driver.current(self.device)))

    def check(self, config: StoreConfig) -> None:
        """Raise ConfigError unless the device has room for the hot tier of a configuration."""
        nbytes, held_nbytes = config.hot.capacity_nbytes, self.arena.nbytes
        free, total = self.driver.memory(self.device)
        needed = arena_nbytes(nbytes) - held_nbytes + WORK_NBYTES
        if needed > free:
            raise ConfigError(
                f"hot.capacity_nbytes = {nbytes} needs {needed} more bytes of {self.name}: an eighth, and at least "
                f"{64 * MIB}, for holes and {WORK_NBYTES} for encoding are counted; {free} of {total} are free: lower "
                "it, or have the engine take less of the GPU"
            )

    def resize(self, config: StoreConfig) -> None:
        """Another budget, which `check` has found possible."""
        self.arena.limit_nbytes = arena_nbytes(config.hot.capacity_nbytes)

    def close(self) -> None:
        """Give the memory back, but for blocks that somebody still holds."""
        self.arena.close()

    def _admits(self, key: Key, nbytes: int, owner: Owner) -> bool:
        with self._r.lock:
            return self._r.hot.admits(nbytes, key, owner)

    def is_here(self, x: torch.Tensor) -> bool:
        """Whether a caller's tensor is on this device."""
        return bool(x.is_cuda) and (x.device.index or 0) == self.device

    def _source(self, x: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """A tensor to copy from, in few runs, whose bytes are those of its spec."""
        if self.is_here(x):
            found = x if Runs.of(x) is not None else x.resolve_conj().resolve_neg().contiguous()
        else:
            found = x.to("cpu").contiguous()
        runs = Runs(found)
        if runs.count * runs.nbytes != spec.nbytes:
            raise TierUnavailable(f"{type(x).__name__} of {runs.count * runs.nbytes} bytes says it is {spec}")
        return found

    def _view(self, held: DeviceTensors, name: str) -> torch.Tensor:
        spec = held.specs[name]
        dtype = getattr(torch, spec.dtype)
        if not spec.nbytes:
            return torch.empty(spec.shape, dtype=dtype, device=self.where)
        flat: torch.Tensor = self.driver.tensor(self.device, held.addresses[name], spec.nbytes, held.block)
        return flat.view(dtype).reshape(spec.shape)

    def _copied(self, held: DeviceTensors, name: str) -> torch.Tensor:
        tensors = empty_tensors({name: held.specs[name]})
        self.copy_to(held.addresses, tensors)
        return tensors[name]


def open_device(config: StoreConfig, residency: Residency, driver: MemoryDriver | None) -> DeviceHot | None:
    """The device of a configuration; None: hot is in the host's memory. driver: by default CUDA's.

    Raises ConfigError where there is no such device, or too little room on it.
    """
    if config.hot.device == "cpu":
        return None
    device = int(config.hot.device.partition(":")[2] or 0)
    refusal = f'hot.device = "{config.hot.device}" cannot be used'
    try:
        if driver is None:
            from kvstore.device.cuda import Cuda

            driver = Cuda()
        driver.memory(device)
    except ImportError as error:
        raise ConfigError(
            f'{refusal}: {error.name or error} is not installed: pip install cuda-bindings, or set it to "cpu"'
        ) from None
    except DriverError as error:
        raise ConfigError(f'{refusal}: {error}; set it to "cpu", or see what nvidia-smi says') from None
    made = DeviceHot(driver, device, residency, DeviceArena(driver, device, arena_nbytes(config.hot.capacity_nbytes)))
    made.check(config)
    return made


def arena_nbytes(hot_nbytes: int) -> int:
    """The limit of a device's memory for a hot tier: an eighth more, for holes and what is on its way."""
    return hot_nbytes + max(hot_nbytes // 8, 64 * MIB)


def raw_nbytes(entry: Entry) -> int:
    """What an entry takes of hot once it is decoded, as `Entry.nbytes` would count it."""
    names = sum(len(name) + TENSOR_OVERHEAD_NBYTES for name in entry.specs)
    return ENTRY_OVERHEAD_NBYTES + len(entry.key) + entry.value_nbytes + names


def _entry_of(entry: Entry, tensors: Mapping[str, torch.Tensor]) -> Entry:
    raw = {
        name: EncodedTensor(tensor.spec, "raw", {"": tensors[name]}, tensor.attrs)
        for name, tensor in entry.tensors.items()
    }
    return Entry(entry.key, raw, lossy=entry.lossy)


def _copy_on_host(x: torch.Tensor) -> torch.Tensor:
    return x.to("cpu", copy=True).contiguous()


def _cannot(enough: Callable[[], bool], nbytes: int, owner: Owner) -> bool:  # noqa: ARG001 - until it is set
    return False
