"""What the shared store did for this host: counters since start, among the store's numbers as `shared_...`."""

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Numbers:
    """lookups: questions for the rest of a prefix. futile: of these, how many brought nothing. hits: chunks that came.

    corrupt: objects, or heads, that were not believed. duplicate_uploads: chunks not sent, since another host had sent,
    or was sending, them. lag_s: from the put of the last chunk published to its publication. dropped, errors: by
    reason.
    """

    lookups: int = 0
    futile: int = 0
    hits: int = 0
    hit_nbytes: int = 0
    lookup_s: float = 0.0
    fetch_s: float = 0.0
    published: int = 0
    publish_nbytes: int = 0
    duplicate_uploads: int = 0
    corrupt: int = 0
    lag_s: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, **more: float) -> None:
        """Add to counters."""
        with self.lock:
            for name, by in more.items():
                setattr(self, name, getattr(self, name) + by)

    def drop(self, reason: str, keys: int = 1) -> None:
        """Count chunks that are not published."""
        with self.lock:
            self.dropped[reason] += keys

    def failed(self, kind: str) -> None:
        """Count a call that the store did not answer."""
        with self.lock:
            self.errors[kind] += 1

    def values(self) -> dict[str, float]:
        """By name, as `Stats.values` has them."""
        with self.lock:
            plain = ("lookups", "futile", "hits", "hit_nbytes", "lookup_s", "fetch_s", "published", "publish_nbytes",
                     "duplicate_uploads", "corrupt", "lag_s")  # fmt: skip
            values: dict[str, float] = {f"shared_{name}": getattr(self, name) for name in plain}
            values |= {f"shared_dropped_{reason}": count for reason, count in sorted(self.dropped.items())}
            values |= {f"shared_errors_{kind}": count for kind, count in sorted(self.errors.items())}
            return values
