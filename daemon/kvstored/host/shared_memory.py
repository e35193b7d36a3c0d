"""How much shared memory the daemon may have, and its way back to the kernel when there is more than is due.

A budget shrinks by a setting, under memory pressure, or because the border to warm was learned anew. What left hot may
lie in memory a while longer, on its way to the disk or leased; so it is looked at every few seconds, not only then.
Thread rule: `turn` on one thread.
"""

import logging
import time
from collections.abc import Callable

from kvstore.config import GIB, MIB, StoreConfig
from kvstore.residency.device_hot import arena_nbytes as device_nbytes
from kvstore.shm.arena import Arena
from kvstore.store import Store

log = logging.getLogger(__name__)

STAGING_NBYTES = GIB
"""Shared memory of a daemon whose hot tier is on a device, registered with it: 20 ms of a PCIe bus."""
SLACK_MIN_NBYTES = 64 * MIB
IN_VAIN_S = 60.0
"""How long not to try again what gave nothing back: the entries of a whole tier are looked at."""


def arena_limit_nbytes(store: StoreConfig) -> int:
    """The limit of shared memory: the hot tier, and an eighth more for leased blocks and for holes.

    With a learned border between hot and warm, hot may get nearly all of both budgets. With hot on a device: what is
    on its way there and back.
    """
    if store.hot.device != "cpu":
        return min(STAGING_NBYTES, device_nbytes(store.hot.capacity_nbytes))
    return _with_slack(store.hot.capacity_nbytes + (store.warm.capacity_nbytes if store.split == "auto" else 0))


def encoded_limit_nbytes(store: StoreConfig) -> int:
    """The limit of the shared memory for what warm holds: all of it, and an eighth more for holes."""
    hot_nbytes = store.hot.capacity_nbytes if store.split == "auto" else 0
    return _with_slack(store.warm.capacity_nbytes + hot_nbytes)


class SharedMemory:
    """Gives back what an arena has beyond what is due to it."""

    def __init__(
        self, store: Store, arena: Arena, due: Callable[[], int], now: Callable[[], float] = time.monotonic
    ) -> None:
        """due: bytes that entries may take in it now, or do."""
        self._store, self._arena, self._due, self._now = store, arena, due, now
        self._not_before = now()

    def turn(self) -> None:
        """Check once, and act."""
        arena, now = self._arena, self._now()
        if arena.nbytes <= _with_slack(self._due()) or now < self._not_before:
            return
        given_back = self._store.gather(arena)
        if given_back:
            log.info("shared memory event=given_back nbytes=%d left_nbytes=%d", given_back, arena.nbytes)
        else:
            self._not_before = now + IN_VAIN_S


def _with_slack(nbytes: int) -> int:
    return nbytes + max(nbytes // 8, SLACK_MIN_NBYTES)
