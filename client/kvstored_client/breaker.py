"""A circuit breaker: after a few failures in a row, stop asking for a while.

Closed: calls pass. Open: calls are refused at once until the pause is over. Then half-open: one call passes as a probe;
its success closes the breaker, its failure opens it again for longer. Thread-safe, and whole after an interrupt between
any two instructions: without a lock, each change of its state is one step. Knows nothing of the network.
"""

import random
import time
from collections import deque
from collections.abc import Callable

FAILURES_TO_OPEN = 3
PAUSE_MIN_S = 0.25
PAUSE_MAX_S = 15.0
"""A restarted daemon is found again within this; meanwhile a miss costs microseconds."""


class _Opening:
    """One pause, and who may try after it: the thread with the permit, and later one that sees no report of it."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.probe_until = 0.0
        self.permits: deque[None] = deque([None])

    def allow(self, now: float, probe_s: float) -> bool:
        """Whether this caller is the probe."""
        if now < self.until:
            return False
        if self.permits:
            self.probe_until = now + probe_s
            try:
                self.permits.pop()
            except IndexError:
                return False  # another thread took it
            return True
        if now < self.probe_until:
            return False
        self.probe_until = now + probe_s
        return True


class Breaker:
    """Decides whether a call is worth trying."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self.failures = 0
        self._pauses = 0
        self.openings: dict[str, _Opening] = {}
        """At most one, under "now": a dictionary replaces and removes in one step."""

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused, a probe aside."""
        return bool(self.openings)

    def allow(self, probe_s: float) -> bool:
        """Whether a call may go out now. probe_s: after this long a probe that never reported is given up."""
        opening = self.openings.get("now")
        return opening is None or opening.allow(self._clock(), probe_s)

    def succeeded(self) -> bool:
        """Report an answer. True: the breaker was open and is closed now."""
        self.failures = self._pauses = 0
        return self.openings.pop("now", None) is not None

    def failed(self) -> bool:
        """Report a failure. True: the breaker was closed and is open now."""
        self.failures += 1
        now, opening = self._clock(), self.openings.get("now")
        if opening is None and self.failures < FAILURES_TO_OPEN:
            return False
        if opening is not None and now < opening.until:
            return False  # a straggler from before it opened: not a probe, no longer pause
        # Half of it at random, so that the workers of one host do not all come back in the same instant.
        pause = min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0**self._pauses) * (0.5 + 0.5 * self._jitter())
        self._pauses = min(self._pauses + 1, 16)
        reopened = _Opening(now + pause)
        if opening is not None:
            self.openings["now"] = reopened
            return False
        return self.openings.setdefault("now", reopened) is reopened
