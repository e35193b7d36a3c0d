"""Time as the engine sees it: handed in through the constructor, never read from a module.

The system clock counts seconds since boot and adds the wall clock once, at start. So an operator
who steps the wall clock neither expires every entry at once nor makes one immortal; deadlines that
cross a restart are clamped where they are read (see `tiers.cold`).
"""

import time
from typing import Protocol


class Clock(Protocol):
    """Where the engine gets the time from."""

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
