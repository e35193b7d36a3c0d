"""Which chunk continues which: the links between the Metas of one chain.

A chunk without its parent can never be matched: it only takes room. So a chunk never outlives its parent. When a chunk
leaves the store its descendants leave too, and a chunk whose parent is not held is refused. Keys put without a parent
(most keys that are not chunks) have no links.
Links are keys in the Metas themselves: the parent, the first child, and the two neighbours among siblings. That is four
references per chunk and no set per parent, and a root with 100,000 children loses one of them in O(1). A Meta counts
its pinned children, so that nobody has to walk them.
A chain is put deepest first, so children come before their parent: until it comes the parent is in `_awaited`.
No method walks more than `WALK_MAX` links, but for the iterators, whose callers count their steps.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.index import Column, Index
from kvstore.metadata.meta import Meta
from kvstore.metadata.resting import NONE

MISSING = -2
"""In a column of rows: the row of a key that is not there. NONE: no key is named."""
WALK_MAX = 512
"""Links followed at most while the store's lock is held: one or two milliseconds."""


class Chains:
    """Links in the Metas of an index."""

    def __init__(self) -> None:
        self.index = Index()
        self.awaited: dict[Key, Key] = {}
        """Parents that are missing, each with the newest chunk that waits for it. None while no put of a chain runs."""
        self._awaited_pins: dict[Key, int] = {}
        self._awaited_below: set[Key] = set()
        """Those of them that will come before chunks which count as rooted already."""

    def link(self, key: Key, meta: Meta) -> None:
        """Link a key that is new in the index to its parent, and to the children that waited for it."""
        self._link(key, meta, None if meta.parent is None else self.index.get(meta.parent))

    def link_all(self, metas: Mapping[Key, Meta]) -> None:
        """Link keys that are new in the index, what is continued before what continues it: nothing waits for these."""
        for key, meta in metas.items():
            before = None if meta.parent is None else metas.get(meta.parent) or self.index.get(meta.parent)
            self._link(key, meta, before)

    def _link(self, key: Key, meta: Meta, before: Meta | None) -> None:
        """before: the Meta of its parent, if that is there."""
        if self.awaited:
            meta.first_child = self.awaited.pop(key, None)
            meta.pinned_children = self._awaited_pins.pop(key, 0)
        below = key in self._awaited_below
        self._awaited_below.discard(key)
        # A rooted parent continues no key that was not there. One that is not rooted may continue this one, and one
        # that is not there yet, as a rule since chains are put deepest first, continues nothing.
        if before is not None and (below or not before.rooted) and self._closes_a_ring(key, meta):
            meta.parent = before = None
        self._tie(key, meta, before, below=below)

    def _tie(self, key: Key, meta: Meta, before: Meta | None, *, below: bool) -> None:
        """before: its parent's Meta, if it is there. below: chunks that count as rooted continue it."""
        parent = meta.parent
        if parent is None:
            meta.rooted = True
            return
        if before is None:
            meta.rooted = False
            if below:
                self._awaited_below.add(parent)
            meta.next, self.awaited[parent] = self.awaited.get(parent), key
        else:
            meta.rooted = before.rooted
            meta.next, before.first_child = before.first_child, key
        meta.previous = None
        if meta.next is not None:
            self.index[meta.next].previous = key

    def unlink(self, key: Key, meta: Meta) -> None:
        """Unlink a key that leaves the index, with its Meta. Those that continue it have left before."""
        assert meta.first_child is None
        if meta.parent is None:
            return
        if meta.pinned:
            self._count_pin(meta.parent, -1)
        if meta.previous is not None:
            self.index[meta.previous].next = meta.next
        elif self._first_child(meta.parent) == key:
            self._set_first_child(meta.parent, meta.next)
        if meta.next is not None:
            self.index[meta.next].previous = meta.previous

    def replace(self, key: Key, new: Meta, old: Meta) -> None:
        """Give the new Meta of a key in the index the links of `old`: the key keeps its place in its chain.

        The parent that the new Meta names counts only if the key was in no chain.
        """
        new.first_child, new.pinned_children, new.rooted = old.first_child, old.pinned_children, old.rooted
        if old.parent is not None:
            new.parent, new.previous, new.next = old.parent, old.previous, old.next
            if old.pinned:
                self._count_pin(old.parent, -1)
            return
        below = new.first_child is not None
        before = None if new.parent is None else self.index.get(new.parent)
        # What continues this key is rooted through it, which a parent that waits for its own would make untrue.
        waits = below and before is not None and not before.rooted
        if new.parent is not None and (waits or self._closes_a_ring(key, new)):
            new.parent = before = None
        self._tie(key, new, before, below=below)

    def set_pinned(self, meta: Meta, *, pinned: bool) -> None:
        """Pin or unpin the Meta of a key in the index, and have its parent count it."""
        if meta.pinned != pinned:
            meta.pinned = pinned
            if meta.parent is not None:
                self._count_pin(meta.parent, 1 if pinned else -1)

    def _count_pin(self, parent: Key, more: int) -> None:
        meta = self.index.get(parent)
        if meta is not None:
            meta.pinned_children += more
        else:
            self._awaited_pins[parent] = self._awaited_pins.get(parent, 0) + more
            if not self._awaited_pins[parent]:
                del self._awaited_pins[parent]

    def children(self, key: Key) -> Iterator[Key]:
        """The chunks that continue this one, the newest first."""
        child = self._first_child(key)
        while child is not None:
            following = self.index[child].next
            yield child
            child = following

    def ancestors(self, key: Key) -> Iterator[Key]:
        """The chunks before this one, nearest first."""
        meta = self.index.get(key)
        while meta is not None and meta.parent is not None and meta.parent in self.index:
            yield meta.parent
            meta = self.index[meta.parent]

    def orphans(self) -> list[Key]:
        """Chunks whose parent is missing."""
        return [key for parent in list(self.awaited) for key in self.children(parent)]

    def _closes_a_ring(self, key: Key, meta: Meta) -> bool:
        """Whether a key's parent continues it, or that cannot be told in few steps: then the key stays in no chain."""
        # Hashes of tokens form no ring; keys that a caller invents could. A key without children is no ancestor.
        parent = meta.parent
        if parent is None or parent == key:
            return parent is not None
        if meta.first_child is None:
            return False
        # Upwards from the parent and downwards from the key at once: it is enough that one of the two ends soon.
        below, above = [key], self.ancestors(parent)
        for at in islice(below, WALK_MAX):  # grows during the loop
            up = next(above, None)
            if up is None or up == key:
                return up is not None
            for child in islice(self.children(at), WALK_MAX - len(below)):
                if child == parent:
                    return True
                below.append(child)
        return len(below) >= WALK_MAX

    def _first_child(self, parent: Key) -> Key | None:
        meta = self.index.get(parent)
        return meta.first_child if meta is not None else self.awaited.get(parent)

    def _set_first_child(self, parent: Key, child: Key | None) -> None:
        meta = self.index.get(parent)
        if meta is not None:
            meta.first_child = child
        elif child is not None:
            self.awaited[parent] = child
        else:
            self.awaited.pop(parent, None)
            self._awaited_below.discard(parent)


class Links(NamedTuple):
    """Links of many Metas as columns of rows, NONE where there is no link. orphans: rows whose parent is not there."""

    parents: Column
    first_children: Column
    previous: Column
    nexts: Column
    orphans: list[int]


def links_of(parents: Column, order: Column) -> Links:
    """The links that `Chains.link` would make key by key, in a tenth of the time: for a start with a million keys.

    parents: for each row that of its parent, NONE or MISSING. order: the rows in the order in which they are linked.
    Orphans, chunks of a ring, and the chunks that continue a ring get no parent here.
    """
    none = len(parents)
    at = np.append(np.where(parents < 0, none, parents), none)
    at[_in_rings(at)] = none
    linked = order[at[order] != none]
    linked = linked[np.argsort(at[linked], kind="stable")]
    siblings = at[linked[1:]] == at[linked[:-1]]
    older, younger = linked[:-1][siblings], linked[1:][siblings]
    first, previous, following = np.full((3, none), NONE, np.int64)
    first[at[linked]] = linked  # of several children the last one stays: the newest
    following[younger], previous[older] = older, younger
    orphans = np.flatnonzero(parents == MISSING).tolist()
    return Links(np.where(at[:none] == none, NONE, at[:none]), first, previous, following, orphans)


def _in_rings(at: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which chunks have no root among their ancestors. at: positions of parents; the last position is "no parent"."""
    far = at
    for _ in range(at.size.bit_length()):  # doubles the distance upwards each time
        far = far[far]
        if (far == at.size - 1).all():
            break
    endless: np.ndarray[Any, np.dtype[np.bool_]] = far != at.size - 1
    return endless
