"""Memory pressure: the hot tier shrinks before the kernel kills processes.

Every few seconds it reads the kernel's pressure stall information (how long tasks waited for memory) and the memory
limit of this process's control group, if it has one. Under pressure the hot budget shrinks by a quarter, down to an
eighth of the configured one; entries that no longer fit sink or leave as usual, and freed pages go back to the kernel:
here those of malloc, in `shared_memory` those that clients map.
With hot on a GPU it is warm that shrinks: what left the GPU would come into the memory that is short. Afterwards the
budget grows back slowly, so that a host at its limit settles and does not oscillate.
"""

import ctypes
import logging
import time
from collections.abc import Callable
from pathlib import Path

from kvstore.store import Store

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
SHRINK_TO = 0.75
FLOOR = 1 / 8
GROW_BY = 1 / 20
CALM_S = 30.0
"""Seconds without pressure before the budget grows, by a twentieth each time."""
LIMIT_RATIO = 0.9
"""Share of the control group's limit that counts as pressure."""


def stall_percent(text: str) -> float:
    """avg10 of the line "some" in a pressure file: the share of the last 10 s in which some task waited for memory."""
    for line in text.splitlines():
        if line.startswith("some "):
            for field in line.split()[1:]:
                name, _, value = field.partition("=")
                if name == "avg10":
                    return float(value)
    return 0.0


class Sensor:
    """Reads the kernel's files. A missing file counts as no pressure."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._group = _own_group(proc, cgroups)
        own = self._group / "memory.pressure" if self._group is not None else None
        self._pressure = own if own is not None and own.exists() else proc / "pressure" / "memory"

    def stall_percent(self) -> float:
        """The stall percentage of this control group if the kernel reports it, else of the machine."""
        try:
            return stall_percent(self._pressure.read_text())
        except (OSError, ValueError):
            return 0.0

    def limit_ratio(self) -> float:
        """Memory that the kernel cannot drop as a share of the control group's limit; 0 if there is no limit."""
        if self._group is None:
            return 0.0
        try:
            limit = min(self._limit("memory.max"), self._limit("memory.high"))
            # Not memory.current: that counts the page cache, which the kernel drops by itself. The hot tier is shmem.
            lines = (line.partition(" ") for line in (self._group / "memory.stat").read_text().splitlines())
            return sum(int(value) for name, _, value in lines if name in ("anon", "shmem")) / limit
        except (OSError, ValueError):
            return 0.0

    def _limit(self, name: str) -> float:
        assert self._group is not None
        text = (self._group / name).read_text().strip()
        return float("inf") if text == "max" else float(text)


def _own_group(proc: Path, cgroups: Path) -> Path | None:
    try:
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return cgroups / line.removeprefix("0::/")
    except OSError:
        return None
    return None


class PressureValve:
    """Shrinks and regrows the budget of the largest tier in RAM. `turn` blocks; call it on one worker thread."""

    def __init__(
        self, store: Store, percent: float, sensor: Sensor | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._percent = percent
        self._sensor = sensor or Sensor()
        self._now = now
        self._calm_since = now()
        self.shrinks = 0
        self._tier = "hot" if store.config.hot.device == "cpu" else "warm"

    @property
    def _capacity_nbytes(self) -> tuple[int, int]:
        """The budget now, and as configured."""
        store = self._store
        if self._tier == "hot":
            return store.hot_capacity_nbytes, store.hot_budget_nbytes
        return store.warm_capacity_nbytes, store.config.warm.capacity_nbytes

    def _set(self, nbytes: int) -> int:
        store = self._store
        return store.set_hot_capacity(nbytes) if self._tier == "hot" else store.set_warm_capacity(nbytes)

    def turn(self) -> None:
        """Check once, and act."""
        stall, ratio = self._sensor.stall_percent(), self._sensor.limit_ratio()
        have, full_nbytes = self._capacity_nbytes
        now = self._now()
        if stall >= self._percent or ratio >= LIMIT_RATIO:
            self._calm_since = now
            floor = int(full_nbytes * FLOOR)
            wanted = max(floor, int(have * SHRINK_TO))
            if wanted < have:
                moved = self._set(wanted)
                _return_pages()
                self.shrinks += 1
                log.warning(
                    "pressure event=shrunk stall_percent=%.1f limit_ratio=%.2f %s_capacity_nbytes=%d left=%d",
                    stall, ratio, self._tier, wanted, moved,
                )  # fmt: skip
        elif have < full_nbytes and now - self._calm_since >= CALM_S:
            self._calm_since = now
            wanted = min(full_nbytes, have + int(full_nbytes * GROW_BY) + 1)
            self._set(wanted)
            if wanted == full_nbytes:
                log.info("pressure event=over %s_capacity_nbytes=%d", self._tier, wanted)


def _return_pages() -> None:
    # process.tune tells malloc to keep freed memory; under pressure it must not.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)
