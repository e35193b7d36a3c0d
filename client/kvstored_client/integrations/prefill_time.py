"""What a prefill takes, measured where one runs, and so what a restored prefix saved. Imports no framework.

Prefills are timed by class: the batch's rows, and the length's power of two, since a token of a long prompt takes
longer than one of a short prompt. The fastest of a class counts: others had a compilation or another process in them.
What is not measured yet is taken from the nearest shorter class, which says too little rather than too much.
Not thread-safe.
"""

import time
from collections.abc import Callable

TIMED_TOKENS = 256
"""Of a prefill that is run for nothing but its time, once, where only hits were seen."""
MIN_TOKENS = 16
"""Of fewer tokens the time is that of a step, whatever its length."""


class PrefillTime:
    """Seconds of prefill a position, by class."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.saved_s = 0.0
        self._tried: set[int] = set()
        self._known: dict[tuple[int, int], float] = {}

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        """A prefill of so many positions, computed from the first on."""
        if tokens >= MIN_TOKENS and seconds > 0:
            at = rows, tokens.bit_length()
            self._known[at] = min(seconds / tokens, self._known.get(at, seconds / tokens))

    def per_position_s(self, rows: int, tokens: int) -> float | None:
        """Seconds a position of a prompt of this length; None where no prefill of so many rows was seen."""
        due = tokens.bit_length()
        sizes = sorted(size for r, size in self._known if r == rows)
        shorter = [size for size in sizes if size <= due]
        found = shorter[-1:] or sizes[:1]
        return self._known[rows, found[0]] if found else None

    def restored(
        self, rows: int, width: int, tokens: int, spent_s: float, prefill: Callable[[int], object] | None = None
    ) -> float:
        """Seconds saved by `tokens` restored positions of a prompt of `width`; spent_s: what restoring them took.

        prefill: computes the first so many positions; called at most once for each number of rows, and only where no
        other prefill was seen.
        """
        if tokens <= 0:
            return 0.0
        each = self.per_position_s(rows, width)
        if each is None and prefill is not None and rows not in self._tried:
            self._tried.add(rows)
            length = min(width, TIMED_TOKENS)
            began = self.clock()
            prefill(length)
            self.observe(rows, length, self.clock() - began)
            each = self.per_position_s(rows, width)
        saved_s = max(0.0, tokens * each - spent_s) if each is not None else 0.0
        self.saved_s += saved_s
        return saved_s
