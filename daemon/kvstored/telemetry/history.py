"""The last hour in samples of ten seconds, for the status page. Counters become rates when read. Thread-safe."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from kvstore.stats import MISS_CAUSES, Stats

INTERVAL_S = 10.0
SAMPLES_MAX = 360
COUNTED = (
    "gets", "hits", "puts", "hit_nbytes", "put_nbytes", "lookup_keys", "lookup_hit_keys", "lookup_tokens",
    "lookup_hit_tokens", "prefill_saved_s", "evictions", "expirations", *(f"lookup_misses_{c}" for c in MISS_CAUSES),
    "cold_bytes_written", "cold_write_errors", "cold_read_errors", "cold_corrupt_total", "in_flight_refused",
    "pressure_shrinks", "maintainer_errors", "lease_accept_failures", "calls_refused",
    "shared_hits", "shared_published", "shared_corrupt", "shared_dropped_full", "block_events_dropped",
)  # fmt: skip
"""Counters whose change is kept."""
_GAUGES = ("cold_pending_nbytes", "in_flight_nbytes")


class History:
    """Samples of some numbers, oldest first."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, dict[str, float], dict[str, float]]] = deque(maxlen=SAMPLES_MAX)

    def take(self, stats: Stats) -> None:
        """Add a sample."""
        counted = {name: stats.values.get(name, 0.0) for name in COUNTED}
        gauges = {name: stats.values.get(name, 0.0) for name in _GAUGES}
        gauges |= {f"{name}_used_nbytes": float(tier.used_nbytes) for name, tier in stats.tiers.items()}
        with self._lock:
            self._samples.append((self._now(), counted, gauges))

    def series(self) -> list[dict[str, Any]]:
        """By interval: seconds ago, ratios of hits (None if nothing was looked up), rates per second, gauges."""
        with self._lock:
            samples = list(self._samples)
        now = self._now()
        rows = []
        for (before, old, _), (at, new, gauges) in pairwise(samples):
            change = _change(old, new)
            span = max(at - before, 1e-9)
            rows.append({
                "ago_s": round(now - at, 1),
                **ratios(change),
                **{f"{name}_per_s": round(change[name] / span, 3) for name in COUNTED},
                **gauges,
            })  # fmt: skip
        return rows

    def recent(self, values: Mapping[str, float], within_s: float) -> dict[str, float]:
        """What was counted since the last sample that is at least so old, or else since the first one."""
        with self._lock:
            samples = list(self._samples)
        now = self._now()
        old: dict[str, float] = {}
        for at, counted, _ in samples:
            if not old or now - at >= within_s:
                old = counted
        return _change(old or values, values)


def _change(old: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    return {name: max(0.0, new.get(name, 0.0) - old.get(name, 0.0)) for name in COUNTED}


def ratios(change: Mapping[str, float]) -> dict[str, float | None]:
    """Hits of keys and of tokens looked up; None where none were."""
    found: dict[str, float | None] = {}
    for name, kind in (("hit_ratio", "keys"), ("token_hit_ratio", "tokens")):
        whole = change[f"lookup_{kind}"]
        found[name] = round(min(1.0, change[f"lookup_hit_{kind}"] / whole), 4) if whole else None
    return found
