"""What a request's prefix has on disk is fetched to RAM while the request waits for its turn in the engine.

One that is scheduled at once is loaded at once: nothing is fetched for it. The daemon fetches chunks in the form they
have on disk, so those in 4 bits stay so. `arrived` and `asked` are of the scheduler's thread and wait for nothing; keys
are made, and the daemon is asked, on a thread of its own.
"""

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from kvstore.lookup import Lookup
from kvstored_client.integrations import adapters
from kvstored_client.integrations.guard import Guard

logger = logging.getLogger(__name__)

AFTER_S = 0.05
"""Longer than an idle engine takes to come to a request."""
REQUEST_MAX_NBYTES = 1 << 30
"""Of one request, from its first chunk on: what is fetched makes others leave RAM."""
_WAITING_MAX = 1000
_SOON = Lookup(counted=False, prefetch=True)

Keys = Callable[[], list[bytes]]


class Ahead:
    """Of one scheduler. after_s: how long a request waits before anything is fetched for it; 0: nothing ever is."""

    def __init__(self, guard: Guard, after_s: float, chunk_nbytes: int) -> None:
        self._guard = guard
        self._after_s = after_s
        self._chunk_nbytes = max(1, chunk_nbytes)
        self._waiting: dict[str, Keys] = {}
        self._due: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def arrived(self, request_id: str, keys: Keys) -> None:
        """A request waits for its turn. keys: of its chunks, root first."""
        if self._after_s <= 0 or len(self._waiting) >= _WAITING_MAX:
            return
        self._waiting[request_id] = keys
        self._due.put((time.monotonic() + self._after_s, request_id))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvstored-ahead", daemon=True)
            self._thread.start()

    def asked(self, request_id: str) -> None:
        """It has its turn, or is over."""
        self._waiting.pop(request_id, None)

    def close(self) -> None:
        """End the thread, when it has done what it does."""
        self._due.put(None)

    def _run(self) -> None:
        while (found := self._due.get()) is not None:
            at, request_id = found
            time.sleep(max(0.0, at - time.monotonic()))
            keys = self._waiting.pop(request_id, None)
            if keys is not None:
                self._fetch(keys)

    def _fetch(self, keys: Keys) -> None:
        try:
            wanted = keys()[: max(1, REQUEST_MAX_NBYTES // self._chunk_nbytes)]
            if wanted:
                self._guard.match(wanted, lookup=_SOON)
        except adapters.Unknown:
            logger.debug("nothing is fetched for a request that runs without the store")
        except Exception:
            logger.exception("nothing was fetched ahead")
