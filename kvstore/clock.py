"""The engine's time: passed in through the constructor, never read from a module.

The system clock counts seconds since boot and adds the wall clock once, at start. So a step of the
wall clock neither expires every entry at once nor makes one immortal; deadlines from before a restart
are clamped when they are read (see `disk.recovery`).
"""

import time
from typing import Protocol


class Clock(Protocol):
    """The source of the engine's time."""

    def now(self) -> float:
        """Unix seconds. Never goes backwards within one process."""
        ...


class SystemClock:
    """Unix seconds that advance with CLOCK_BOOTTIME: suspend counts, wall-clock steps do not."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    def now(self) -> float:
        """Unix seconds."""
        return self._offset_s + time.clock_gettime(time.CLOCK_BOOTTIME)


class ManualClock:
    """A clock that a test or a trace replay moves by hand."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._now = start

    def now(self) -> float:
        """Unix seconds, as last set."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (>= 0)."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: {seconds} s")
        self._now += seconds
