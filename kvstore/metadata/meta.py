"""What the store knows of each key beside its value: deadlines, use, pins.

One Meta a key, whatever tiers hold it, so a deadline moved by a get holds in all of them. Guarded by the store's lock.
The cold tier writes Metas down from time to time and gives them back at the next start.
"""

from dataclasses import dataclass
from math import inf

from kvstore.keys import Key
from kvstore.metadata.owner import NOBODY, Owner


@dataclass(slots=True)
class Meta:
    """One key's life. Times are Unix seconds of the store's clock.

    exact: must never become lossy. lossy: already went through a lossy codec. encoding: of the form below hot, once
    there is one, else "raw". value_nbytes: bytes of the tensors once decoded. pinned_until: when a pin lapses by
    itself. soon: of low priority, leaves before others unless it is hit. parent: the chunk before this one in its
    chain; root: put as the first chunk of one; first_child, previous and next belong to `chains`, watched_at to
    `deadlines`; owner: whose it is.
    """

    created_at: float
    expires_at: float
    ttl_s: float
    value_nbytes: int
    sliding: bool = True
    pinned: bool = False
    exact: bool = False
    lossy: bool = False
    encoding: str = "raw"
    hits: int = 0
    last_hit_at: float = 0.0
    pinned_until: float = inf
    parent: Key | None = None
    soon: bool = False
    first_child: Key | None = None
    previous: Key | None = None
    next: Key | None = None
    watched_at: float = inf
    root: bool = False
    owner: Owner = NOBODY

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed. A pinned entry does not expire."""
        return not self.pinned and now >= self.expires_at

    @property
    def used_at(self) -> float:
        """The last hit, or the put."""
        return self.last_hit_at or self.created_at

    @property
    def deadline(self) -> float:
        """When it expires, or its pin lapses: the time at which something happens to it."""
        return self.pinned_until if self.pinned else self.expires_at

    @property
    def prefix_start(self) -> bool | None:
        """Whether a prompt begins here; None: it was put as no part of a chain, so it may."""
        return False if self.parent is not None else True if self.root else None

    def refresh(self, now: float, ttl_s: float | None = None) -> None:
        """Move a sliding deadline to now + ttl_s (its own when None)."""
        if ttl_s is not None:
            self.ttl_s = ttl_s
        if self.sliding:
            self.expires_at = now + self.ttl_s
