"""Ends calls that make no progress: the deadline of a stream whose length is not known when it starts.

gRPC fixes a call's deadline at its start; a get learns from the reply how many bytes will come. So each watched call
has a due time of its own, which every frame moves on, and one thread cancels what is overdue. Thread-safe, without a
lock: a thread that is interrupted while it holds one would leave all later calls without a deadline.
"""

import _thread
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any


class Watch:
    """One call under watch; `expired` tells afterwards whether it was ended for its silence.

    due: when it is, by the monotonic clock; whoever waits for the call moves it on.
    """

    __slots__ = ("__weakref__", "_cancel", "due", "expired")

    def __init__(self, cancel: Callable[[], object], due: float) -> None:
        self._cancel = cancel
        self.due = due
        self.expired = False

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
    by weak references: with the last other one a watch is over, however its call ended.
    """

    _TICK_S = 0.1
    _LINGER_S = 5.0

    def __init__(self) -> None:
        self._numbers = count()
        self._watches: dict[int, weakref.ref[Watch]] = {}
        self._running: Any = _nobody

    def watch(self, cancel: Callable[[], object], silence_s: float) -> Watch:
        """Call `cancel` once `silence_s` have passed and its `due` was not moved on, or a tenth of a second later.

        For as long as the watch is kept.
        Raises RuntimeError where no thread can be started.
        """
        watch = Watch(cancel, time.monotonic() + silence_s)
        self._watches[next(self._numbers)] = weakref.ref(watch)
        if self._running() is None:  # asked after the watch is there: a thread that is leaving looks once more
            mark = _Mark()
            self._running = weakref.ref(mark)
            _thread.start_new_thread(self._run, (mark,))
        return watch

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
