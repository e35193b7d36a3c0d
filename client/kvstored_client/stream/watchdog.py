"""Ends calls that make no progress: the deadline of a stream whose length is not known when it starts.

gRPC fixes a call's deadline at its start; a get learns from the reply how many bytes will come. So each watched call
has a due time of its own, which every frame moves on, and one thread cancels what is overdue. Thread-safe, without a
lock: who is interrupted while he held one would leave all later calls without a deadline.
"""

import _thread
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any


class Watch:
    """One call under watch; `expired` tells afterwards whether it was ended for its silence."""

    __slots__ = ("__weakref__", "_cancel", "_silence_s", "due", "expired", "number")

    def __init__(self, number: int, cancel: Callable[[], object], silence_s: float) -> None:
        self.number = number
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
        with suppress(Exception):  # whatever is wrong with this call, others are under watch too
            self._cancel()


class _Mark:
    __slots__ = ("__weakref__",)


def _nobody() -> None:
    """What a weak reference to nothing answers."""


class Watchdog:
    """Watches the calls of one client; its thread lives while there is something to watch, and a moment longer.

    It looks ten times a second and is not told of new calls: waking it would cost each of them 0.1 ms. It knows watches
    by weak references: one whose call was interrupted before its `release` is gone all the same.
    """

    _TICK_S = 0.1
    _LINGER_S = 5.0

    def __init__(self) -> None:
        self._numbers = count()
        self._watches: dict[int, weakref.ref[Watch]] = {}
        self._running: Any = _nobody

    def watch(self, cancel: Callable[[], object], silence_s: float) -> Watch:
        """Call `cancel` once `silence_s` pass without progress, or a tenth of a second later. `release` the watch.

        Raises RuntimeError where no thread can be started.
        """
        watch = Watch(next(self._numbers), cancel, silence_s)
        self._watches[watch.number] = weakref.ref(watch)
        if self._running() is None:  # asked after the watch is there: a thread that is leaving looks once more
            mark = _Mark()
            self._running = weakref.ref(mark)
            _thread.start_new_thread(self._run, (mark,))
        return watch

    def release(self, watch: Watch) -> None:
        """The call is over."""
        self._watches.pop(watch.number, None)

    def _run(self, mark: _Mark) -> None:
        own = weakref.ref(mark)
        leave_at = time.monotonic() + self._LINGER_S
        while True:
            time.sleep(self._TICK_S)
            now = time.monotonic()
            if self._expire(now):
                leave_at = now + self._LINGER_S
            elif now >= leave_at:
                self._running = _nobody
                if not self._watches:
                    return
                self._running = own  # one came meanwhile; if it started another thread there are two for a moment

    def _expire(self, now: float) -> bool:
        """End what is overdue. Whether there is anything under watch."""
        for number, ref in list(self._watches.items()):
            watch = ref()
            if watch is None or watch.due <= now:
                self._watches.pop(number, None)
                if watch is not None:
                    watch.expire()
            del watch
        return bool(self._watches)
