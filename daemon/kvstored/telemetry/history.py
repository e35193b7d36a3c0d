"""The last hour in samples of ten seconds, for the status page. Counters become rates when read. Thread-safe."""

import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from kvstore.stats import Stats

INTERVAL_S = 10.0
SAMPLES_MAX = 360
_COUNTED = ("gets", "hits", "puts", "hit_nbytes", "put_nbytes")


class History:
    """Samples of some counters, oldest first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=SAMPLES_MAX)

    def take(self, stats: Stats) -> None:
        """Add a sample."""
        with self._lock:
            self._samples.append((self._now(), {name: stats.values.get(name, 0.0) for name in _COUNTED}))

    def series(self) -> list[dict[str, Any]]:
        """By interval: seconds ago, hit ratio (None if there were no gets) and rates per second."""
        with self._lock:
            samples = list(self._samples)
        now = self._now()
        rows = []
        for (before, old), (at, new) in pairwise(samples):
            change = {name: max(0.0, new[name] - old[name]) for name in _COUNTED}
            span = max(at - before, 1e-9)
            rows.append({
                "ago_s": round(now - at, 1),
                "hit_ratio": round(change["hits"] / change["gets"], 4) if change["gets"] else None,
                **{f"{name}_per_s": round(change[name] / span, 3) for name in _COUNTED},
            })  # fmt: skip
        return rows
