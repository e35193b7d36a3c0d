"""What connections hold of the daemon: ingest segments and leases, with a share for each connection and each user.

Nobody is kept out by who came first. Ingest segments stay with a connection for its life; where they take all there is,
and one with less than an equal share asks, the connection with the most is hung up. Its client goes on over the stream
for one call, connects again and asks for less. Leases end by age; what they refer to is counted, and a connection that
holds too much gets the next answer over the stream. Any connection's thread.
"""

import threading
from collections.abc import Iterable
from typing import Protocol, TypeVar

from kvstore.errors import KvstoreError
from kvstored.calls.budget import Budget

LEASES_MAX = 4096
"""Of one connection. A client that reads has one or two, and one that keeps views one for each."""
HELD_MAX = 65_536
"""Entries in the leases of one connection: half a megabyte of references."""
HELD_FREE = HELD_MAX // 16
"""A connection that holds fewer entries may have another lease, which holds one or more: nobody else is looked at."""
HELD_TOTAL = 16 * HELD_MAX
"""Entries in all leases; of these each user has an equal share."""


class Holder(Protocol):
    """One connection."""

    uid: int

    @property
    def ingest_nbytes(self) -> int:
        """Bytes of its ingest segments."""
        ...

    @property
    def held(self) -> int:
        """Entries in its leases."""
        ...

    def hang_up(self) -> None:
        """End it from any thread."""
        ...


H = TypeVar("H", bound=Holder)


class Lending:
    """The accounts. ingest: bytes of ingest segments, idle or not, in all."""

    def __init__(self, ingest: Budget) -> None:
        self.ingest = ingest
        self.connection_max_nbytes = max(1, ingest.limit_nbytes // 2)
        self.hangups = 0
        self._lock = threading.Lock()

    def lend(self, nbytes: int, asking: H, connections: Iterable[H]) -> bool:
        """Count an ingest segment in. False: not now; somebody may have been hung up so that there is room later."""
        if asking.ingest_nbytes + nbytes > self.connection_max_nbytes:
            return False
        try:
            self.ingest.take(nbytes)
        except KvstoreError:
            with self._lock:
                self._make_room(nbytes, asking, [one for one in connections if one.ingest_nbytes])
            return False
        return True

    def _make_room(self, nbytes: int, asking: H, holders: list[H]) -> None:
        users: dict[int, int] = {asking.uid: 0}
        for holder in holders:
            users[holder.uid] = users.get(holder.uid, 0) + holder.ingest_nbytes
        share = self.ingest.limit_nbytes // len({asking, *holders})
        of_user = self.ingest.limit_nbytes // len(users)
        if asking.ingest_nbytes + nbytes > share:
            return
        entitled = users[asking.uid] + nbytes <= of_user
        own = [one for one in holders if one.uid == asking.uid and one is not asking and one.ingest_nbytes > share]
        # The largest of a user who has too much, even where each of its many connections has little.
        others = [one for one in holders if one.uid != asking.uid and users[one.uid] > of_user] if entitled else []
        over = own + others
        if over:
            max(over, key=lambda holder: holder.ingest_nbytes).hang_up()
            self.hangups += 1

    def may_hold(self, leases: int, asking: H, connections: Iterable[H]) -> bool:
        """Whether a connection with so many leases may have another one. Not asked below `HELD_FREE`."""
        if leases >= LEASES_MAX or asking.held >= HELD_MAX:
            return False
        held: dict[int, int] = {}
        for one in tuple(connections):  # others come and go meanwhile
            held[one.uid] = held.get(one.uid, 0) + one.held
        return held.get(asking.uid, 0) < HELD_TOTAL // max(1, len(held))
