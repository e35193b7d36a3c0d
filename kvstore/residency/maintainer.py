"""The background thread: expiry sweep, queued promotions, and the cold tier's periodic work.

Bounded: so many promotions wait at most, so many expired keys are collected a turn. An error in one duty is logged and
counted and the others go on. A store opened with `background=False` has no thread; `Store.maintain()` is one turn.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from kvstore.config import StoreConfig
from kvstore.keys import Key
from kvstore.metadata.slices import pause
from kvstore.residency.mover import Mover
from kvstore.residency.resizing import rebalance
from kvstore.residency.state import Residency

log = logging.getLogger(__name__)

PROMOTIONS_MAX = 256
"""Promotions waiting. Beyond it a hit is only a hit: the next one asks again."""
SWEEP_MAX = 32
"""Keys looked at for expiry in one hold of the lock: a millisecond, two where each is taken out of a disk's index."""
COLD_MAINTAIN_INTERVAL_S = 60.0


class Maintainer:
    """Duties that nobody waits for. `run_once` may be called by hand; `start` runs it on a thread."""

    def __init__(self, residency: Residency, mover: Mover, config: StoreConfig) -> None:
        self._r = residency
        self._mover = mover
        self._config = config
        self._promotions: deque[tuple[Key, bool]] = deque()
        self._queued: set[Key] = set()
        self._wake = threading.Event()
        self._stop = False
        self._thread: threading.Thread | None = None
        now = residency.clock.now()
        self._flushed_at = now
        self._maintained_at = now
        self.turned_at = now

    def start(self) -> None:
        """Run on a thread until `stop`."""
        self._thread = threading.Thread(target=self._run, name="kvstore-maintainer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the turn under way and end the thread."""
        self._stop = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def request_promotions(self, keys: Sequence[Key], *, prefetch: bool = False) -> None:
        """Ask for promotions; what 256 waiting leave no room for is dropped and counted. Under the residency lock.

        keys: of one get, root first. The deepest is promoted first, so that the root ends most recently used.
        prefetch: the get is yet to come, and begins with the root: so that comes first, see `Mover.prefetch`.
        """
        fresh = [key for key in keys if key not in self._queued]
        room = max(0, PROMOTIONS_MAX - len(self._promotions))
        self._r.counters.promotions_dropped += max(0, len(fresh) - room)
        fresh = fresh[:room]
        self._queued.update(fresh)
        self._promotions.extend((key, prefetch) for key in (fresh if prefetch else reversed(fresh)))
        if fresh:
            self._wake.set()

    @property
    def waiting(self) -> int:
        """Promotions asked for and not made yet."""
        return len(self._promotions)

    def run_once(self) -> None:
        """One turn of all duties."""
        now = self._r.clock.now()
        self._duty("sweep", self._sweep)
        self._duty("collect", self._collect)
        self._duty("promote", self._promote)
        if self._r.balance is not None:
            self._duty("balance", lambda: rebalance(self._r, self._mover))
        if self._r.cold is not None and now - self._flushed_at >= self._config.cold.flush_interval_s:
            self._flushed_at = now
            self._duty("flush_meta", self._r.cold.flush_meta)
        if self._r.cold is not None and now - self._maintained_at >= COLD_MAINTAIN_INTERVAL_S:
            self._maintained_at = now
            self._duty("cold_maintain", self._r.cold.maintain)
        self.turned_at = now

    def _run(self) -> None:
        while not self._stop:
            self._wake.wait(self._config.sweep_interval_s)
            self._wake.clear()
            if not self._stop:
                self.run_once()

    def _duty(self, name: str, duty: Callable[[], object]) -> None:
        try:
            duty()
        except Exception:  # the boundary of the thread: one failing duty must not end the others
            with self._r.lock:
                self._r.counters.maintainer_errors += 1
            log.exception("maintainer duty failed duty=%s", name)

    def _sweep(self) -> None:
        while True:
            with self._r.lock:
                for key in self._r.deadlines.due(self._r.clock.now(), SWEEP_MAX):
                    self._r.live(key)
                behind = self._r.deadlines.behind
            if not behind:
                return
            pause()

    def _collect(self) -> None:
        """Take out the chunks of long chains that left."""
        while True:
            with self._r.lock:
                if self._r.collect():
                    return
            pause()

    def _promote(self) -> None:
        while not self._stop:
            with self._r.lock:
                if not self._promotions:
                    return
                key, prefetch = self._promotions.popleft()
                self._queued.discard(key)
            (self._mover.prefetch if prefetch else self._mover.promote)(key)
