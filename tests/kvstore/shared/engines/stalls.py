"""How long a thread of this process stood still although it had something to do: what no deadline can answer for.

Two measures. The kernel counts for each thread how long it waited for a core (/proc/thread-self/schedstat). A watch
thread that wants to wake every 2 ms sees what else keeps a thread from going on: the interpreter's lock, held by a
thread that itself has no core. Their sum bounds a stall from above.
"""

import threading
import time
from collections import deque
from pathlib import Path

TURN_S = 0.002
KEPT = 60_000
"""Stalls of a few milliseconds, of many minutes."""


def waited_for_a_core_s() -> float:
    """Of the calling thread, since it began; 0 where the kernel does not count it."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


class Stalls:
    """The watch thread. Ends with `close`."""

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def within(self, begun: float, ended: float) -> float:
        """Seconds, of time.monotonic, in which this thread could not go on between two moments."""
        return sum(max(0.0, min(ended, at) - max(begun, at - late)) for at, late in list(self._late) if at > begun)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.is_set():
            time.sleep(TURN_S)
            now = time.monotonic()
            late = now - before - TURN_S
            if late > TURN_S / 2:
                self._late.append((now, late))
            before = now
