"""The verbs of a `Store` that change its budgets while it is open, and what a server needs for a device. Any thread."""

from kvstore.config import LIVE, StoreConfig, check_live
from kvstore.entries.entry import Entry
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.residency.device_hot import DeviceHot
from kvstore.residency.gathering import gather, move
from kvstore.residency.mover import Mover
from kvstore.residency.resizing import set_budgets
from kvstore.residency.state import Residency
from kvstore.residency.transcode import TensorTranscoder
from kvstore.residency.write_path import WritePath
from kvstore.shm.arena import Arena, Register
from kvstore.shm.arena import Owner as SegmentOwner


class BudgetVerbs:
    """Part of a store."""

    config: StoreConfig
    _r: Residency
    _device_hot: DeviceHot | None
    _mover: Mover
    _transcoder: TensorTranscoder
    _write_path: WritePath

    def _check_open(self) -> None:
        raise NotImplementedError

    @property
    def hot_budget_nbytes(self) -> int:
        """The hot tier's budget as configured or, with `split = "auto"`, as learned; pressure may hold it below."""
        balance = self._r.balance
        return self.config.hot.capacity_nbytes if balance is None else balance.hot_nbytes

    @property
    def hot_capacity_nbytes(self) -> int:
        """The hot tier's budget now: as configured, unless `set_hot_capacity` changed it."""
        return self._r.hot.capacity_nbytes

    @without_torch_modes
    def set_hot_capacity(self, nbytes: int) -> int:
        """Shrink or grow the hot tier's budget while it runs. Returns how many entries sank or left."""
        with self._r.lock:
            self._r.hot.capacity_nbytes = nbytes
        return self._mover.trim(self._r.hot)

    @property
    def warm_capacity_nbytes(self) -> int:
        """The warm tier's budget now: as configured, unless `set_warm_capacity` changed it."""
        return self._r.warm.capacity_nbytes

    @without_torch_modes
    def set_warm_capacity(self, nbytes: int) -> int:
        """Shrink or grow the warm tier's budget while it runs. Returns how many entries left it."""
        with self._r.lock:
            self._r.warm.capacity_nbytes = nbytes
        return self._mover.trim(self._r.warm)

    @without_torch_modes
    def gather(self, arena: Arena) -> int:
        """Give back shared memory that a smaller budget left nearly empty. Returns its bytes."""
        return gather(self._r, arena)

    def share_encoded(self, arena: Arena) -> None:
        """For a server: encoded entries are made in its users' shared memory from now on."""
        self._transcoder.encoded = arena

    @without_torch_modes
    def move_encoded(self, entry: Entry, arena: Arena, owner: SegmentOwner) -> Entry | None:
        """For a server: hold an encoded entry of warm's in a user's shared memory. Returns it there; None: no room."""
        return move(self._r, entry, arena, owner)

    def serve_from_device(self) -> Register | None:
        """For a server, whose process is its own: bound what torch holds beside the hot tier on its device.

        Returns what registers the memory that answers lie in with the device; None: hot is in RAM.
        """
        return None if self._device_hot is None else self._device_hot.serve()

    @property
    def device_uuid(self) -> bytes:
        """Of the GPU in whose memory hot lies, by which other processes on it know it; b"": hot is in RAM."""
        return b"" if self._device_hot is None else self._device_hot.uuid

    @without_torch_modes
    def reconfigure(self, config: StoreConfig) -> list[str]:
        """Take other settings while open: the tiers' budgets and the default TTL. Returns the names of what changed.

        Budgets are in force when it returns: what no longer fits sank to the tier below, or left the last one. The TTL
        is that of later puts. Not for two threads at once. Raises ConfigError, and changes nothing, if a setting
        differs that is not in `kvstore.config.LIVE`, or a hot tier on a device does not fit there.
        """
        self._check_open()
        changed = check_live(self.config, config, LIVE)
        if self._device_hot is not None:
            self._device_hot.check(config)
            self._device_hot.resize(config)
        self.config = self._write_path.config = config
        if any(name != "ttl_s" for name in changed):
            set_budgets(self._r, self._mover, config)
        return changed
