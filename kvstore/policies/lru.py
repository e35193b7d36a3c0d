"""LRU, and the order of keys that it and the other policies are made of: as an OrderedDict, but never long to grow.

Touched with the deepest chunk of a chain first and the root last, LRU's plain list evicts exactly what a radix tree's
leaf-first LRU would: an ancestor is always more recent than its descendants. So no tree is kept.
An OrderedDict of 700,000 keys takes 80 ms to grow, in one step of the interpreter, and the store's lock is held
meanwhile. So the keys are spread over short ones. Each key has a number that rises along the order; so the first key is
the one with the lowest number among the first ones of all parts, and a heap knows which part that is.
Parts are added one by one as keys come (linear hashing: Litwin, "Linear Hashing: A New Tool for File and Table
Addressing", VLDB 1980): the hash of the process chooses the part, which no caller can foresee.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.index import Column, Grouped

Part = OrderedDict[Key, int]
PART_MAX = 512
"""Keys a part on average, at most. Dividing one that is twice as long takes one or two milliseconds."""
_number = itemgetter(1)


class KeyOrder:
    """Keys, the first one first. All operations O(1), but for iterating. Not thread-safe."""

    __slots__ = ("_count", "_first", "_grouped", "_half", "_heads", "_last", "_number", "_parts")

    def __init__(self) -> None:
        # The part of a key is at its hash modulo the length of `_parts`, twice `_half`. Parts are divided in turn:
        # there are `_number`, and in the place of each of the others lies the one that will be divided to make it.
        self._parts: list[Part | None] = [OrderedDict()] * 2
        self._half = self._number = 1
        self._grouped: Grouped | None = None  # what the parts that are None are made from
        self._heads: list[tuple[int, int]] = []  # (number of its first key when it was noted, part)
        self._count = 0
        self._first = self._last = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: object) -> bool:
        return key in self._part(hash(key) % len(self._parts))

    def _part(self, at: int) -> Part:
        part = self._parts[at]
        if part is None:
            if at >= self._number:
                at -= self._half
            part = self._parts[at] = OrderedDict(self._resting(at))
            if self._number <= at + self._half < len(self._parts):
                self._parts[at + self._half] = part
        return part

    def _resting(self, at: int) -> Iterator[tuple[Key, int]]:
        assert self._grouped is not None, "a part is only missing after a restart"
        if at >= len(self._grouped):  # made since from one of those
            return iter(())
        return zip(self._grouped.keys(at), self._grouped.places(at), strict=True)

    def append(self, key: Key) -> None:
        """Make a key the last one, new or not."""
        at = hash(key) % len(self._parts)
        part = self._parts[at]
        if part is None:
            part = self._part(at)
        self._last += 1
        before = len(part)
        part[key] = self._last
        if len(part) == before:
            part.move_to_end(key)
            return
        if not before:
            self._note(self._last, at)
        self._count += 1
        if self._count > PART_MAX * self._number:
            self._divide()

    def prepend(self, key: Key) -> None:
        """Make a key the first one, new or not."""
        self.append(key)
        at = hash(key) % len(self._parts)
        part = self._part(at)
        self._first -= 1
        part[key] = self._first
        part.move_to_end(key, last=False)
        self._note(self._first, at)

    def extend(self, keys: Sequence[Key], rows: Column, hashes: Column) -> None:
        """Append many new keys: a million of them in a tenth of a second. No part is made before it is needed.

        rows: which of `keys`, in order. hashes: of all `keys`, see `hashes_of`.
        """
        if self._count:
            for row in rows.tolist():
                self.append(keys[row])
            return
        count = max(1, -(-len(rows) // PART_MAX))
        self._half = 1 << (count.bit_length() - 1)
        at = hashes[rows] % (2 * self._half)
        at[at >= count] -= self._half
        self._grouped = grouped = Grouped(keys, rows, at, count)
        self._parts, self._number = [None] * (2 * self._half), count
        self._count, self._first, self._last = len(rows), -1, len(rows)
        self._heads = [(grouped.places(part)[0], part) for part in range(count) if grouped.size(part)]
        heapq.heapify(self._heads)

    def discard(self, key: Key) -> bool:
        """Take a key out. False: it was not there."""
        at = hash(key) % len(self._parts)
        part = self._parts[at]
        if (self._part(at) if part is None else part).pop(key, None) is None:
            return False
        self._count -= 1
        return True

    def first(self) -> Key | None:
        """The first key; None if there is none."""
        heads = self._heads
        while heads:
            number, at = heads[0]
            part = self._part(at)
            if not part:
                heapq.heappop(heads)
                continue
            key = next(iter(part))
            if part[key] == number:
                return key
            heapq.heapreplace(heads, (part[key], at))
        return None

    def pop_first(self) -> None:
        """Take the first key out, if there is one."""
        key = self.first()
        if key is not None:
            self.discard(key)

    def touch(self, keys: Iterable[Key]) -> list[Key]:
        """Make known keys the last ones, in the order given. Returns those known."""
        known: list[Key] = []
        parts, size = self._parts, len(self._parts)
        for key in keys:
            part = parts[hash(key) % size]
            if part is None:
                part = self._part(hash(key) % size)
            if key in part:
                self._last += 1
                part[key] = self._last
                part.move_to_end(key)
                known.append(key)
        return known

    def _note(self, number: int, at: int) -> None:
        """Note that a part has another first key now, unless `first` finds it by itself."""
        heapq.heappush(self._heads, (number, at if at < self._number else at - self._half))
        if len(self._heads) > 2 * self._number + 8:
            self._note_all()

    def _note_all(self) -> None:
        made = [(at, part) for at, part in enumerate(self._parts[: self._number]) if part]
        rest = [head for head in self._heads if self._parts[head[1]] is None]
        self._heads = rest + [(next(iter(part.values())), at) for at, part in made]
        heapq.heapify(self._heads)

    def _divide(self) -> None:
        """Move half of the keys of the next part in turn to a new one."""
        turn, new, modulus = self._number - self._half, self._number, len(self._parts)
        old = self._part(turn)
        moved = OrderedDict((key, number) for key, number in old.items() if hash(key) % modulus == new)
        for key in moved:
            del old[key]
        self._parts[new] = moved
        self._number += 1
        if moved:
            self._note(next(iter(moved.values())), new)
        if self._number == modulus:
            self._half, self._parts = modulus, self._parts * 2

    def __iter__(self) -> Iterator[Key]:
        """Keys, the first one first. To change the order meanwhile is an error."""
        if self._number == 1:
            return iter(self._part(0))
        parts = [self._part(at).items() for at in range(self._number)]
        return map(itemgetter(0), heapq.merge(*parts, key=_number))

    def keys_now(self) -> list[Key]:
        """A copy of the keys in order: one step of the interpreter for each part. Any thread, without the lock."""
        # In this order: one divided meanwhile is then looked at twice, and none is left out.
        parts, number = list(self._parts), self._number
        pairs: list[tuple[Key, int]] = []
        for at, part in enumerate(parts[:number]):
            pairs += self._resting(at) if part is None else list(part.items())
        numbers = np.fromiter(map(_number, pairs), np.int64, len(pairs))
        return list(dict.fromkeys([pairs[at][0] for at in np.argsort(numbers).tolist()]))


class LRU(KeyOrder):
    """The policy: least recently used first. All operations O(1)."""

    __slots__ = ()

    def track(self, key: Key, *, soon: bool = False) -> None:
        """Track a key as the most recently used; `soon`: as the least recently used, if it is new."""
        if soon and key not in self:
            self.prepend(key)
        else:
            self.append(key)

    def forget(self, key: Key) -> None:
        """Stop tracking a key."""
        self.discard(key)

    def evict(self, key: Key) -> None:
        """Stop tracking a key; it leaves no ghost."""
        self.discard(key)

    def victim(self) -> Key | None:
        """The least recently used key."""
        return self.first()
