"""What becomes of refusals: all are counted, few are written down, and those of one caller are sent one after another.

A refusal costs the event loop as much as a small answer, and who is refused asks again at once. So a caller's refusals
wait for their turn beyond a few in a row, while its calls stay open: HTTP/2 bounds a connection's open calls, so the
caller sends no more than is refused. Knows no gRPC.
"""

import time
from collections.abc import Callable

BURST = 16
"""Refusals that a caller gets at once: a client that was set up wrongly hears it without waiting."""
EACH_S = 0.01
"""Between two more of one caller's."""
ALL_S = 0.0025
"""Between any two beyond the burst: callers may have many names."""
DELAY_MAX_S = 10.0
"""Who does not wait for its refusals makes the next one wait no longer than this."""
WAITING_MAX = 1024
"""Calls that wait for their refusal, in all: some 20 KiB each. Others are refused at once."""
CALLERS_MAX = 1024
LINE_S = 60.0
USERS_MAX = 1024


class Pace:
    """When each refusal may be sent. Used as a context by who waits. One thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._free_at: dict[str, float] = {}
        self._all_free_at = 0.0
        self.waiting = 0

    def __enter__(self) -> None:
        self.waiting += 1

    def __exit__(self, *_: object) -> None:
        self.waiting -= 1

    def delay_s(self, caller: str) -> float:
        """How long the refusal of this caller's call has to wait; it has its turn then."""
        if self.waiting >= WAITING_MAX:
            return 0.0
        now = self._clock()
        if len(self._free_at) >= CALLERS_MAX:
            self._free_at = {name: at for name, at in self._free_at.items() if at > now}
            if len(self._free_at) >= CALLERS_MAX:
                caller = ""  # strangers of very many addresses are one
        free_at = max(self._free_at.get(caller, 0.0), now)
        self._free_at[caller] = min(free_at + EACH_S, now + DELAY_MAX_S)
        due = free_at - BURST * EACH_S
        if due < now:
            return 0.0
        slot = max(self._all_free_at, now)
        self._all_free_at = min(slot + ALL_S, now + DELAY_MAX_S)
        return max(due, slot) - now


class Lines:
    """Which of many like events have a line in the log: the first few of each kind in a minute. Any thread."""

    def __init__(self, each: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._each = each
        self._clock = clock
        self._told: dict[object, list[float]] = {}

    def left_out(self, kind: object) -> int | None:
        """None: no line for this one. Else how many had none since the last line of their kind."""
        now = self._clock()
        told = self._told.get(kind)
        if told is None or now - told[0] >= LINE_S:
            if len(self._told) >= USERS_MAX:
                self._told.clear()
            before = 0 if told is None else max(0, int(told[1]) - self._each)
            self._told[kind] = [now, 1]
            return before
        told[1] += 1
        return 0 if told[1] <= self._each else None
