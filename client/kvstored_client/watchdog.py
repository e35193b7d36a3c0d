"""Ends calls that make no progress: the deadline of a stream whose length is not known when it starts.

gRPC fixes a call's deadline at its start; a get learns from the reply how many bytes will come. So each watched call
has a due time of its own, which every frame moves on, and one thread cancels what is overdue. Thread-safe.
"""

import threading
import time
from collections.abc import Callable


class Watch:
    """One call under watch; `expired` tells afterwards whether it was ended for its silence."""

    __slots__ = ("_cancel", "_silence_s", "due", "expired")

    def __init__(self, cancel: Callable[[], object], silence_s: float) -> None:
        self._cancel = cancel
        self._silence_s = silence_s
        self.expired = False
        self.progress()

    def progress(self) -> None:
        """The call moved: it has its whole time again."""
        self.due = time.monotonic() + self._silence_s

    def expire(self) -> None:
        """End the call."""
        self.expired = True
        self._cancel()


class Watchdog:
    """Watches the calls of one client; its thread lives while there is something to watch, and a moment longer.

    It looks ten times a second and is not told of new calls: waking it would cost each of them 0.1 ms.
    """

    _TICK_S = 0.1
    _LINGER_S = 5.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self._running = False

    def watch(self, cancel: Callable[[], object], silence_s: float) -> Watch:
        """Call `cancel` once `silence_s` pass without progress, or a tenth of a second later. `release` the watch."""
        watch = Watch(cancel, silence_s)
        with self._lock:
            self._watches.add(watch)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="kvstored-watchdog", daemon=True).start()
        return watch

    def release(self, watch: Watch) -> None:
        """The call is over."""
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        leave_at = time.monotonic() + self._LINGER_S
        while True:
            time.sleep(self._TICK_S)
            with self._lock:
                now = time.monotonic()
                if self._watches:
                    leave_at = now + self._LINGER_S
                elif now >= leave_at:
                    self._running = False
                    return
                overdue = [watch for watch in self._watches if watch.due <= now]
                self._watches.difference_update(overdue)
            for watch in overdue:
                watch.expire()
