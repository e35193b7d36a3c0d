"""How many stored blocks an engine's routers are not told of, because too many events wait already.

Only announcements are dropped, never removals: a router that is not told of a block recomputes it, one that believes in
a block that is gone sends requests to the wrong host. Removals are bounded by the blocks announced.
"""

import logging

log = logging.getLogger(__name__)

PENDING_MAX = 65_536
"""Stored blocks that wait: in a worker for the step's end, in the scheduler for other ranks and for the engine."""


class Dropped:
    """The count. Not thread-safe: its owner holds a lock or is one thread."""

    def __init__(self) -> None:
        self.count = 0
        self._said_at = 1

    def add(self, blocks: int = 1) -> None:
        """So many more; in the log the first time, and after each time twice as many."""
        self.count += blocks
        if self.count >= self._said_at:
            self._said_at = 2 * self.count
            log.warning("events for routers dropped count=%d because=over %d wait", self.count, PENDING_MAX)
