"""Callers' shares of the daemon's one interpreter: while callers compete, none takes more than its part of it.

Each call costs the event loop some tenths of a millisecond, and a verb of thousands of keys costs a worker thread some
more. A caller that sends such calls one after another keeps the interpreter busy, and every other caller waits for it
several times in each of its own calls. So what a caller's calls cost is taken from a bucket that fills at `SHARE`, and
a call whose caller's bucket is empty begins once it is not: later calls of the same caller after it. A caller that is
alone never waits. What waits takes a place of its caller's (`admission`), and no thread.

Knows no gRPC. `turn` runs on the event loop, everything else on any thread.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

CONTENDED_S = 1.0
"""Callers compete when two have called within this."""
SHARE = 0.3
"""Of the interpreter, for one caller while another calls too. At 0.2 others wait a little less, at 0.35 too long."""
BURST_S = 0.01
"""Of the interpreter's time that a caller may have saved up."""
CALL_S = 0.0003
"""Of the event loop for a call, whatever it asks for: some thousand small calls a second stay possible."""
BYTE_S = 1e-9
"""Of the event loop for a byte of a request, which is copied twice."""
DELAY_MAX_S = 1.0
"""No call waits longer than this: its caller has a deadline."""

R = TypeVar("R")


def charged(spent: Callable[[float], object], work: Callable[..., R], *args: Any) -> R:
    """Do work that keeps the interpreter busy, and tell what it took of a processor, also if it raises."""
    began = time.thread_time()
    try:
        return work(*args)
    finally:
        spent(time.thread_time() - began)


class Shares:
    """When the next call of each caller may begin."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._seen: dict[str, float] = {}
        self._free_at: dict[str, float] = {}
        """When a caller's bucket will have been refilled, less `BURST_S`."""
        self._swept_at = clock()
        self.delayed = 0
        """Calls that have waited."""

    def seen(self, caller: str) -> None:
        """A caller is active."""
        self._seen[caller] = self._clock()

    async def turn(self, caller: str, nbytes: int = 0) -> None:
        """Wait until a caller's call, of a request of so many bytes, may begin."""
        delay_s = self.charge(caller, CALL_S + nbytes * BYTE_S)
        if delay_s:
            await self._sleep(delay_s)

    def charge(self, caller: str, seconds: float) -> float:
        """A caller takes so much of the interpreter's time. Returns the seconds that it has to wait first, or after."""
        now = self._clock()
        with self._lock:
            if now - self._swept_at >= CONTENDED_S / 4:
                self._sweep(now)
            self._seen[caller] = now
            begin = self._free_at.get(caller, 0.0)
            free_at = max(begin, now - BURST_S / SHARE) + seconds / SHARE
            self._free_at[caller] = min(free_at, now + DELAY_MAX_S)
            if begin <= now or len(self._seen) < 2:
                return 0.0
            self.delayed += 1
            return begin - now

    def _sweep(self, now: float) -> None:
        """Forget who is not active any more."""
        self._swept_at = now
        self._seen = {name: at for name, at in self._seen.copy().items() if now - at < CONTENDED_S}
        self._free_at = {name: at for name, at in self._free_at.items() if at > now - BURST_S / SHARE}
