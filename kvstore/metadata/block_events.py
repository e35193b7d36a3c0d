"""What routers are to be told of the keys held here, until a publisher takes it: bounded, and never waited for.

Invariant: whoever has had every event believes in no key that is not held. So a key that does not fit in is not
announced; where a removal does not fit in, everything that waits is dropped and `CLEARED` stands in its place: routers
forget all and begin anew. Any thread; what adds holds the residency's lock, so events are in the order of the changes.
"""

import threading
from collections import deque
from dataclasses import dataclass

from kvstore.keys import Key

WAITING_MAX = 65_536
"""Events, some 16 MiB. A publisher takes 100,000 a second; puts and evictions of small keys together make 20,000."""


@dataclass(frozen=True, slots=True)
class KeyStored:
    """A key is held. parent: what it continues. tokens: of its value."""

    key: Key
    parent: Key | None
    tokens: int


@dataclass(frozen=True, slots=True)
class KeyRemoved:
    """A key is in no tier any more: deleted, evicted, expired, damaged or without what it continued."""

    key: Key


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing that was announced before this counts any more."""


CLEARED = Cleared()
BlockEvent = KeyStored | KeyRemoved | Cleared


class BlockEvents:
    """The events that wait. awake: set where there are some. dropped: those that did not fit in, since start."""

    def __init__(self, at_most: int = WAITING_MAX) -> None:
        self.awake = threading.Event()
        self.dropped = 0
        self._at_most = at_most
        self._lock = threading.Lock()
        # A daemon that starts again holds less than it said before, and nobody knows what of it.
        self._waiting: deque[BlockEvent] = deque((CLEARED,))
        self.awake.set()

    def stored(self, key: Key, parent: Key | None, tokens: int) -> None:
        """A key is held from now on."""
        with self._lock:
            if len(self._waiting) >= self._at_most:
                self.dropped += 1
                return
            self._waiting.append(KeyStored(key, parent, tokens))
        self._wake()

    def removed(self, key: Key) -> None:
        """A key is not held any more."""
        with self._lock:
            if len(self._waiting) >= self._at_most:
                self.dropped += 1 + len(self._waiting)
                self._waiting.clear()
                self._waiting.append(CLEARED)
            else:
                self._waiting.append(KeyRemoved(key))
        self._wake()

    def take(self, at_most: int) -> list[BlockEvent]:
        """The oldest, in order; they do not wait any more."""
        with self._lock:
            found = [self._waiting.popleft() for _ in range(min(at_most, len(self._waiting)))]
            if not self._waiting:
                self.awake.clear()
        return found

    def _wake(self) -> None:
        if not self.awake.is_set():
            self.awake.set()
