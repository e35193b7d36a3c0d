"""Whose segments of shared memory are whose: a user of this host, as the caller that it is now.

A segment holds many entries, and a process that was handed one may read all of it for as long as it likes: nobody can
take a mapping back. So a segment belongs to a user as one caller, and a user who becomes another caller, or none, gets
no segment that it had before, nor is anything new put there. Thread-safe.
"""

import threading
from collections.abc import Callable

from kvstored.access.tokens import Identity

Owner = int | str
"""A user's number where its segments are the ones the daemon itself fills for that user, else a name of one use."""


class SegmentOwners:
    """The present owner for each user that connected."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int, tuple[Identity | None, Owner]] = {}
        self._changes = 0

    def of(self, uid: int, identity: Identity) -> Owner:
        """The owner of what this user may be handed as this caller."""
        with self._lock:
            known = self._known.get(uid)
            if known is not None and known[0] == identity:
                return known[1]
            owner: Owner = uid
            # A tenant's user never shares with the daemon, whose own segments hold what every tenant streamed.
            if known is not None or identity.tenant is not None:
                self._changes += 1
                owner = f"{uid}.{self._changes}"
            self._known[uid] = identity, owner
            return owner

    def recheck(self, identify: Callable[[int], Identity | None]) -> None:
        """The tokens were replaced: who is somebody else by now, or nobody, starts with segments of its own."""
        with self._lock:
            for uid, (identity, owner) in self._known.items():
                if identity != identify(uid):
                    self._known[uid] = None, owner
