"""Which chunk continues which: the links between the Metas of one chain.

A chunk without its parent can never be matched: it only takes room. So a chunk never outlives its parent. What leaves
the store takes its descendants along, and a chunk whose parent is not held is not taken in. Keys that were put without
a parent (most keys that are no chunks) have no links, and nothing here concerns them.
Links are keys in the Metas themselves: a parent, the first child, and the neighbours among siblings. Four references a
chunk, no set a parent, and a root with 100,000 children loses one in O(1).
A chain is put deepest first, so children come before their parent: until it comes they are `_awaited`.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Container, Iterator

from kvstore.entry import Key
from kvstore.index import Meta


class Chains:
    """Links in the Metas of an index."""

    def __init__(self, index: dict[Key, Meta] | None = None) -> None:
        self.index: dict[Key, Meta] = {} if index is None else index
        self._awaited: dict[Key, Key] = {}

    @property
    def awaited(self) -> int:
        """Parents that are missing. 0 whenever no put of a chain is under way."""
        return len(self._awaited)

    def link(self, key: Key) -> None:
        """A key has come into the index: tie it to its parent, and to the children that were waiting for it."""
        meta = self.index[key]
        if self._awaited:
            meta.first_child = self._awaited.pop(key, None)
        if meta.parent is None:
            return
        # Who is not here has nobody before it: the usual case, a chain being put deepest first.
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
        """A key leaves the index, `meta` is what it had there. Returns its children, which must leave too."""
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
            # Cut here, so that each of them unlinks without looking for a parent that is gone.
            child_meta.parent = child_meta.previous = child_meta.next = None
        meta.first_child = None
        return children

    def replace(self, key: Key, old: Meta) -> None:
        """A key in the index got a new Meta in place of `old`: it stays where it was in its chain.

        Only if it was in none does the parent count that the new one names.
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
        """The chunks that continue this one, the latest first."""
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
        """All chunks that continue this one, however far, deepest last."""
        found = [key]
        for at in found:  # grows while it is walked
            found.extend(self.children(at))
        return found[1:]

    def leaf(self, key: Key, held: Container[Key]) -> Key:
        """The key itself, or a descendant in `held` that none in `held` continues: the one to evict in its place."""
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
        # Hashes of tokens cannot; keys that a caller invented could. Who has no children is nobody's ancestor.
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
