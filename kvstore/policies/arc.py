"""ARC: keys used once and keys used again, in two lists whose shares of the room are learned from misses.

`_once` and `_again` are in order of use. A key evicted from one of them is remembered in its ghost list; when it comes
back, the list it left was too short, and `_target`, the length aimed at for `_once`, moves. Chunks seen once (three
quarters of a conversation trace) then leave before a system prompt does, whatever their number.
Source: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, figure 4. Two differences:
the capacity is the number of keys tracked when one is evicted, since a policy knows no bytes; and the target moves when
the key comes in, after room was made for it, not before.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from kvstore.keys import Key
from kvstore.policies.lru import KeyOrder

TRIM_MAX = 64
"""Ghosts forgotten at one eviction, which adds one: after many keys were deleted the rest go with the next ones."""


class ARC:
    """Two lists and their ghosts. All operations O(1)."""

    __slots__ = ("_again", "_ghosts_again", "_ghosts_once", "_once", "_target")

    def __init__(self) -> None:
        self._once = KeyOrder()
        self._again = KeyOrder()
        self._ghosts_once = KeyOrder()
        self._ghosts_again = KeyOrder()
        self._target = 0.0

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key: in the list used again if it is known or a ghost; `soon`: as the oldest of those used once."""
        if key in self:
            self.touch((key,))
        elif key in self._ghosts_once:
            gain = max(1.0, len(self._ghosts_again) / len(self._ghosts_once))
            self._target = min(self._target + gain, float(len(self) + 1))
            self._ghosts_once.discard(key)
            self._again.append(key)
        elif key in self._ghosts_again:
            loss = max(1.0, len(self._ghosts_once) / len(self._ghosts_again))
            self._target = max(self._target - loss, 0.0)
            self._ghosts_again.discard(key)
            self._again.append(key)
        elif soon:
            self._once.prepend(key)
        else:
            self._once.append(key)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Make known keys the most recent of those used again. Returns those known."""
        known = [key for key in keys if key in self]
        for key in known:
            self._once.discard(key)
            self._again.append(key)
        return known

    def forget(self, key: Key) -> None:
        """Stop tracking a key, and drop its ghost."""
        for keys in (self._once, self._again, self._ghosts_once, self._ghosts_again):
            keys.discard(key)

    def evict(self, key: Key) -> None:
        """Stop tracking a key and remember which list it left."""
        capacity = len(self)
        if self._once.discard(key):
            self._ghosts_once.append(key)
        elif self._again.discard(key):
            self._ghosts_again.append(key)
        for _ in range(TRIM_MAX):
            if self._ghosts_once and len(self._once) + len(self._ghosts_once) > capacity:
                self._ghosts_once.pop_first()
            elif len(self._ghosts_once) + len(self._ghosts_again) > capacity:
                (self._ghosts_again or self._ghosts_once).pop_first()
            else:
                break

    def victim(self) -> Key | None:
        """The oldest key of the list that is longer than its target."""
        once_first = self._once and (len(self._once) > self._target or not self._again)
        return (self._once if once_first else self._again).first()

    def __contains__(self, key: object) -> bool:
        return key in self._once or key in self._again

    def __iter__(self) -> Iterator[Key]:
        """Keys used once, then those used again, each oldest first."""
        return chain(self._once, self._again)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    @property
    def ghosts(self) -> int:
        """Keys remembered after they were evicted."""
        return len(self._ghosts_once) + len(self._ghosts_again)
