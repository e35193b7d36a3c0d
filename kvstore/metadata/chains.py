"""Which chunk continues which: the links between the Metas of one chain.

A chunk without its parent can never be matched: it only takes room. So a chunk never outlives its parent. When a chunk
leaves the store its descendants leave too, and a chunk whose parent is not held is refused. Keys put without a parent
(most keys that are not chunks) have no links.
Links are keys in the Metas themselves: the parent, the first child, and the two neighbours among siblings. That is four
references per chunk and no set per parent, and a root with 100,000 children loses one of them in O(1).
A chain is put deepest first, so children come before their parent: until it comes the parent is in `_awaited`.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.meta import Meta


class Chains:
    """Links in the Metas of an index."""

    def __init__(self, index: dict[Key, Meta] | None = None) -> None:
        self.index: dict[Key, Meta] = {} if index is None else index
        self._awaited: dict[Key, Key] = {}

    @property
    def awaited(self) -> int:
        """The number of parents that are missing. It is 0 whenever no put of a chain is running."""
        return len(self._awaited)

    def link(self, key: Key) -> None:
        """Link a key that is new in the index to its parent, and to the children that waited for it."""
        meta = self.index[key]
        if self._awaited:
            meta.first_child = self._awaited.pop(key, None)
        if meta.parent is None:
            return
        # The parent is usually not indexed yet, because chains are put deepest first; then there can be no ring.
        if meta.parent in self.index and self._closes_a_ring(key, meta.parent):
            meta.parent = None
        self._tie(key, meta)

    def _tie(self, key: Key, meta: Meta) -> None:
        parent = meta.parent
        if parent is None:
            return
        before = self.index.get(parent)
        if before is None:
            meta.next, self._awaited[parent] = self._awaited.get(parent), key
        else:
            meta.next, before.first_child = before.first_child, key
        meta.previous = None
        if meta.next is not None:
            self.index[meta.next].previous = key

    def unlink(self, key: Key, meta: Meta) -> list[Key]:
        """Unlink a key that leaves the index, with its Meta. Returns its children, which must leave too."""
        if meta.parent is not None:
            if meta.previous is not None:
                self.index[meta.previous].next = meta.next
            elif self._first_child(meta.parent) == key:
                self._set_first_child(meta.parent, meta.next)
            if meta.next is not None:
                self.index[meta.next].previous = meta.previous
        children: list[Key] = []
        child = meta.first_child
        while child is not None:
            child_meta = self.index[child]
            children.append(child)
            child = child_meta.next
            # Cut here, so that `unlink` of a child does not look for a parent that is gone.
            child_meta.parent = child_meta.previous = child_meta.next = None
        meta.first_child = None
        return children

    def replace(self, key: Key, old: Meta) -> None:
        """Give the new Meta of a key in the index the links of `old`: the key keeps its place in its chain.

        The parent that the new Meta names counts only if the key was in no chain.
        """
        new = self.index[key]
        new.first_child = old.first_child
        if old.parent is not None:
            new.parent, new.previous, new.next = old.parent, old.previous, old.next
        elif new.parent is not None and not self._closes_a_ring(key, new.parent):
            self._tie(key, new)
        else:
            new.parent = None

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

    def descendants(self, key: Key) -> list[Key]:
        """All chunks that continue this one, directly or not, deepest last."""
        found = [key]
        for at in found:  # grows during the loop
            found.extend(self.children(at))
        return found[1:]

    def leaf(self, key: Key, held: Container[Key]) -> Key:
        """The key to evict in place of `key`: a descendant that no chunk in `held` continues, or itself."""
        meta = self.index.get(key)
        while meta is not None and meta.first_child is not None:
            child = next((child for child in self.children(key) if child in held), None)
            if child is None:
                break
            key, meta = child, self.index.get(child)
        return key

    def orphans(self) -> list[Key]:
        """Chunks whose parent is missing."""
        return [key for parent in list(self._awaited) for key in self.children(parent)]

    def _closes_a_ring(self, key: Key, parent: Key) -> bool:
        # Hashes of tokens form no ring; keys that a caller invents could. A key without children is no ancestor.
        has_children = self.index[key].first_child is not None
        return parent == key or (has_children and key in self.ancestors(parent))

    def _first_child(self, parent: Key) -> Key | None:
        meta = self.index.get(parent)
        return meta.first_child if meta is not None else self._awaited.get(parent)

    def _set_first_child(self, parent: Key, child: Key | None) -> None:
        meta = self.index.get(parent)
        if meta is not None:
            meta.first_child = child
        elif child is not None:
            self._awaited[parent] = child
        else:
            self._awaited.pop(parent, None)


class Links(NamedTuple):
    """Links of many Metas as columns, in the order of their keys. orphans: keys whose parent is not among them."""

    parents: list[Key | None]
    first_children: list[Key | None]
    previous: list[Key | None]
    nexts: list[Key | None]
    orphans: list[Key]


def links_of(keys: list[Key], parents: Sequence[Key | None]) -> Links:
    """The links that `Chains.link` would make key by key, in a tenth of the time: for a start with a million keys.

    Orphans, chunks of a ring, and the chunks that continue a ring get no parent here.
    """
    none = len(keys)
    position = dict(zip(keys, range(none), strict=True))
    asked = [none if parent is None else position.get(parent, -1) for parent in parents]
    at = np.array([*asked, none], np.int64)
    orphans = [keys[i] for i in np.flatnonzero(at < 0).tolist()]
    at[at < 0] = none
    at[_in_rings(at)] = none
    children = np.flatnonzero(at[:none] != none)
    children = children[np.argsort(at[children], kind="stable")]
    siblings = at[children[1:]] == at[children[:-1]]
    older, younger = children[:-1][siblings], children[1:][siblings]
    columns = np.full((3, none), none, np.int64)
    first, previous, following = columns
    first[at[children]] = children  # of several children the last one stays: the newest
    following[younger], previous[older] = older, younger
    names = np.empty(none + 1, object)
    names[:none] = keys
    above, below, before, behind = (names[column].tolist() for column in (at[:none], first, previous, following))
    return Links(above, below, before, behind, orphans)


def _in_rings(at: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which chunks have no root among their ancestors. at: positions of parents; the last position is "no parent"."""
    far = at
    for _ in range(at.size.bit_length()):  # doubles the distance upwards each time
        far = far[far]
        if (far == at.size - 1).all():
            break
    endless: np.ndarray[Any, np.dtype[np.bool_]] = far != at.size - 1
    return endless
