"""What the store knows of each key in addition to its value: deadlines, use, pins.

One Meta per key, whatever tiers hold it, so a deadline that a get moves is valid in all of them. Guarded by the
store's lock. The cold tier writes Metas to its index from time to time and restores them at the next start.
"""

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from kvstore.keys import Key
from kvstore.metadata.owner import NOBODY, Owner

if TYPE_CHECKING:
    from kvstore.metadata.deadlines import Bucket


@dataclass(slots=True)
class Meta:
    """The facts of one key. Times are Unix seconds of the store's clock.

    exact: it must never become lossy. lossy: it went through a lossy codec. encoding: that of the form below hot, or
    "raw" if there is none. value_nbytes: bytes of the decoded tensors. pinned_until: when its pin ends by itself. soon:
    low priority, evicted before others unless it is hit. parent: the chunk before this one in its chain. root: it was
    put as the first chunk of a chain. first_child, previous, next, pinned_children and rooted belong to `chains`,
    due_in, due_previous and due_next to `deadlines`. owner: the tenant and namespace it is counted under.
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
    due_in: "Bucket | None" = field(default=None, compare=False, repr=False)
    root: bool = False
    owner: Owner = NOBODY
    due_previous: Key | None = field(default=None, compare=False, repr=False)
    due_next: Key | None = field(default=None, compare=False, repr=False)
    pinned_children: int = 0
    rooted: bool = field(default=True, compare=False, repr=False)

    def expired(self, now: float) -> bool:
        """Whether the deadline has passed. A pinned entry does not expire."""
        return not self.pinned and now >= self.expires_at

    @property
    def used_at(self) -> float:
        """When it was last hit, or else put."""
        return self.last_hit_at or self.created_at

    @property
    def deadline(self) -> float:
        """When it expires or, if it is pinned, when its pin ends."""
        return self.pinned_until if self.pinned else self.expires_at

    @property
    def prefix_start(self) -> bool | None:
        """Whether a prompt begins here; None: unknown, since it was not put as part of a chain."""
        return False if self.parent is not None else True if self.root else None

    def refresh(self, now: float, ttl_s: float | None = None) -> None:
        """Move a sliding deadline to now + ttl_s (its own when None). A fixed one stays, and so does its time to live:
        no deadline is later than that from now, which a start uses to find a clock that went back.
        """
        if self.sliding:
            if ttl_s is not None:
                self.ttl_s = ttl_s
            self.expires_at = now + self.ttl_s
