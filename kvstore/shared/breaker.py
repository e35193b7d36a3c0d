"""A circuit breaker for a server or a store: who does not answer is not asked again before a probe has answered.

    closed --3 failures in a row, or one hang--> open --pause over--> half-open --probe answered--> closed
                                                  ^                       |
                                                  +-----probe failed------+

The pause after failures is 1 s and doubles to 30 s. After a hang there is none before the first probe: a call that the
machine kept waiting must not bar a server that is well, and a probe asks nobody to wait. Probes run beside the calls
(`keeper`, `guarded`): no caller ever is one. Thread-safe. Knows nothing of the network; its time is the clock's.
"""

import threading

from kvstore.clock import Clock

FAILURES_TO_OPEN = 3
PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 30.0

CLOSED, HALF_OPEN, OPEN = 0, 1, 2
"""The states as a gauge gives them. Do not renumber."""


class Breaker:
    """Decides whether a call is worth trying, and when to probe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._pause_s = 0.0
        self._probe_at = 0.0
        self._state = CLOSED

    @property
    def state(self) -> int:
        """CLOSED, HALF_OPEN (a probe is on its way) or OPEN."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether a call may go out."""
        return self._state == CLOSED

    def succeeded(self) -> bool:
        """Report an answer, to a call or to a probe. True: it was not closed before."""
        if self._state == CLOSED and not self._failures:
            return False  # without the lock: what every call does
        with self._lock:
            was_barred = self._state != CLOSED
            self._state, self._failures, self._pause_s = CLOSED, 0, 0.0
            return was_barred

    def failed(self, *, hung: bool = False) -> bool:
        """Report a failed call; hung: nothing at all came in its time. True: this one opened it.

        While it is open this changes nothing: stragglers from before do not prolong the pause.
        """
        with self._lock:
            if self._state != CLOSED:
                return False
            self._failures += 1
            if not hung and self._failures < FAILURES_TO_OPEN:
                return False
            self._open(0.0 if hung else PAUSE_MIN_S)
            return True

    def probe_failed(self) -> None:
        """Report that the probe was not answered: the next one is due after twice the pause."""
        with self._lock:
            if self._state == HALF_OPEN:
                self._open(min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * self._pause_s)))

    def take_probe(self) -> bool:
        """Whether the caller is to probe now. Only one caller is told so until the probe is reported."""
        with self._lock:
            if self._state != OPEN or self._clock.now() < self._probe_at:
                return False
            self._state = HALF_OPEN
            return True

    def due_s(self) -> float | None:
        """Seconds until a probe is due; None: it is closed, or one is on its way."""
        with self._lock:
            return max(0.0, self._probe_at - self._clock.now()) if self._state == OPEN else None

    def _open(self, pause_s: float) -> None:
        self._state, self._pause_s, self._probe_at = OPEN, pause_s, self._clock.now() + pause_s
