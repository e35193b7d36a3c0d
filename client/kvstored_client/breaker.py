"""A circuit breaker: after a few failures in a row, stop asking for a while.

Closed: calls pass. Open: calls are refused at once until the pause is over. Then half-open: one call passes as a probe;
its success closes the breaker, its failure opens it again for longer. Thread-safe. Knows nothing of the network.
"""

import random
import threading
import time
from collections.abc import Callable

FAILURES_TO_OPEN = 3
PAUSE_MIN_S = 0.25
PAUSE_MAX_S = 15.0
"""A restarted daemon is found again within this; meanwhile a miss costs microseconds."""


class Breaker:
    """Decides whether a call is worth trying."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures = 0
        self._pauses = 0
        self._open_until: float | None = None
        self._probe_until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are being refused, a probe aside."""
        return self._open_until is not None

    def allow(self, probe_s: float) -> bool:
        """Whether a call may go out now. probe_s: after this long a probe that never reported is given up."""
        if self._open_until is None:
            return True
        with self._lock:
            now = self._clock()
            # Closed by another thread since: `None or 0.0` is long past.
            if now < (self._open_until or 0.0) or now < self._probe_until:
                return False
            if self._failures == 0:
                return True
            self._probe_until = now + probe_s
            return True

    def succeeded(self) -> bool:
        """Report an answer. True: the breaker was open and is closed now."""
        if not self._failures and self._open_until is None:
            return False
        with self._lock:
            was_open = self._open_until is not None
            self._failures = self._pauses = 0
            self._open_until, self._probe_until = None, 0.0
            return was_open

    def failed(self) -> bool:
        """Report a failure. True: the breaker was closed and is open now."""
        with self._lock:
            self._failures += 1
            was_open = self._open_until is not None
            if not was_open and self._failures < FAILURES_TO_OPEN:
                return False
            if was_open and self._clock() < (self._open_until or 0.0):
                return False  # a straggler from before it opened: not a probe, no longer pause
            # Half of it at random, so that the workers of one host do not all come back in the same instant.
            pause = min(PAUSE_MAX_S, PAUSE_MIN_S * 2.0**self._pauses)
            self._pauses = min(self._pauses + 1, 16)
            self._open_until = self._clock() + pause * (0.5 + 0.5 * self._jitter())
            self._probe_until = 0.0
            return not was_open
