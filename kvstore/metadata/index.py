"""Dictionaries of keys that never take long to grow, and the index: the Meta of each key that the store holds.

A dictionary of 700,000 keys takes 50 ms to grow, in one step of the interpreter that nobody can interrupt, and the
store's lock is held meanwhile. So keys are spread over short ones, by the hash of the process, which no caller can
foresee: values of any kind in a `Spread`, Metas in the `Index`.
A restart finds a million keys, and most of them are not asked for in the next hour. So the index makes no Meta for
them: what the disk said of them rests in columns (`resting`), and a key's Meta is made when somebody asks for it.
Not thread-safe but for `get`, `get_all` and `keys_now`: the store's lock covers the other calls.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.resting import Resting
from kvstore.untracked import untrack

SPREAD_PARTS = 64
PARTS = 512
"""Of the index: with a million keys each has 2,000, and is made in 2 ms."""
Part = dict[Key, Meta | int]
Column = np.ndarray[Any, np.dtype[np.int64]]
V = TypeVar("V")


class Grouped:
    """Keys that a restart found, by the part that each belongs to: so a part is made when somebody needs it.

    rows: of `keys`, in their order. at: the part of each of them.
    """

    __slots__ = ("_keys", "_numbers", "_rows", "_starts")

    def __init__(self, keys: Sequence[Key], rows: Column, at: Column, parts: int) -> None:
        self._keys = keys
        # Of 16 bits: sorted ten times faster.
        self._numbers = np.argsort(at.astype(np.uint16) if parts <= 1 << 16 else at, kind="stable").astype(np.int32)
        self._rows = rows[self._numbers].astype(np.int32)
        self._starts = np.cumsum([0, *np.bincount(at, minlength=parts).tolist()]).tolist()

    def __len__(self) -> int:
        """The number of parts."""
        return len(self._starts) - 1

    def size(self, part: int) -> int:
        """Keys of a part."""
        return int(self._starts[part + 1] - self._starts[part])

    def keys(self, part: int) -> list[Key]:
        """The keys of a part, in their order."""
        return [self._keys[row] for row in self.rows(part)]

    def rows(self, part: int) -> list[int]:
        """The rows of the keys of a part."""
        found: list[int] = self._rows[self._starts[part] : self._starts[part + 1]].tolist()
        return found

    def places(self, part: int) -> list[int]:
        """The places of the keys of a part in the order of all."""
        found: list[int] = self._numbers[self._starts[part] : self._starts[part + 1]].tolist()
        return found


def hashes_of(keys: Sequence[Key]) -> Column:
    """The hash of the process of each key."""
    return np.fromiter(map(hash, keys), np.int64, len(keys))


class Spread(MutableMapping[Key, V]):
    """Values by key, in no order."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: tuple[dict[Key, V], ...] = tuple({} for _ in range(SPREAD_PARTS))

    def get(self, key: Key) -> V | None:  # type: ignore[override]  # nobody names a default
        """The value of a key, None if there is none."""
        return self._parts[hash(key) % SPREAD_PARTS].get(key)

    def get_all(self, keys: Iterable[Key]) -> list[V | None]:
        """The value of each key, None if there is none."""
        parts = self._parts
        return [parts[hash(key) % SPREAD_PARTS].get(key) for key in keys]

    def take(self, key: Key) -> V | None:
        """The value of a key, which is taken out; None if there is none."""
        return self._parts[hash(key) % SPREAD_PARTS].pop(key, None)

    def __getitem__(self, key: Key) -> V:
        return self._parts[hash(key) % SPREAD_PARTS][key]

    def __setitem__(self, key: Key, value: V) -> None:
        self._parts[hash(key) % SPREAD_PARTS][key] = value

    def __delitem__(self, key: Key) -> None:
        del self._parts[hash(key) % SPREAD_PARTS][key]

    def __contains__(self, key: object) -> bool:
        return key in self._parts[hash(key) % SPREAD_PARTS]

    def __iter__(self) -> Iterator[Key]:
        return chain.from_iterable(self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def keys_now(self) -> list[Key]:
        """A copy of all keys: one step of the interpreter for each part. Any thread, without the lock."""
        return list(chain.from_iterable([list(part) for part in self._parts]))

    def clear(self) -> None:
        """Drop everything."""
        for part in self._parts:
            part.clear()


class Index(MutableMapping[Key, Meta]):
    """Metas by key. A part is a dictionary, or None until one of its keys is asked for. It holds for each key its Meta,
    or the row of `_resting` that the Meta can be made from.

    A key is asked for before it is given another Meta or deleted; so its row has been used by then, and a thread that
    reads without the lock makes no Meta of a key that is gone.
    """

    __slots__ = ("_grouped", "_making", "_parts", "_resting")

    def __init__(self) -> None:
        self._parts: list[Part | None] = [{} for _ in range(PARTS)]
        self._resting = Resting()
        self._grouped: Grouped | None = None
        self._making = threading.Lock()

    def rest(self, keys: Sequence[Key], resting: Resting) -> None:
        """Take over the keys that a restart found, row by row. Before any other key is held."""
        self._resting = resting
        self._grouped = Grouped(keys, np.arange(len(keys)), hashes_of(keys) % PARTS, PARTS)
        self._parts = [None if self._grouped.size(at) else {} for at in range(PARTS)]

    def get(self, key: Key) -> Meta | None:  # type: ignore[override]  # nobody names a default
        """The Meta of a key, None for one that is not held. Any thread, without the lock."""
        part = self._parts[hash(key) % PARTS]
        if part is None:
            return self._made(key)
        found = part.get(key)
        return self._made(key) if found.__class__ is int else found  # type: ignore[return-value]

    def get_all(self, keys: Iterable[Key]) -> list[Meta | None]:
        """The Meta of each key, None for one that is not held. Any thread, without the lock."""
        parts, found = self._parts, list[Meta | None]()
        for key in keys:
            part = parts[hash(key) % PARTS]
            meta = None if part is None else part.get(key)
            if part is None or meta.__class__ is int:
                meta = self._made(key)
            found.append(meta)  # type: ignore[arg-type]
        return found

    def __getitem__(self, key: Key) -> Meta:
        found = self.get(key)
        if found is None:
            raise KeyError(key)
        return found

    def _made(self, key: Key) -> Meta | None:
        part = self._part(hash(key) % PARTS)
        with self._making:  # two threads would make two Metas, and what one of them notes would be lost
            found = part.get(key)
            if isinstance(found, int):
                found = part[key] = self._resting.meta(found)
                untrack(found)
            return found

    def _part(self, at: int) -> Part:
        part = self._parts[at]
        if part is not None:
            return part
        with self._making:
            part = self._parts[at]
            if part is None:
                assert self._grouped is not None, "a part is only missing after a restart"
                part = self._parts[at] = dict(zip(self._grouped.keys(at), self._grouped.rows(at), strict=True))
            return part

    def __setitem__(self, key: Key, meta: Meta) -> None:
        at = hash(key) % PARTS
        part = self._parts[at]
        (self._part(at) if part is None else part)[key] = meta
        untrack(meta)

    def add_new(self, metas: Mapping[Key, Meta]) -> bool:
        """Set the Metas of several keys. False: one of them is held already, and nothing has changed.

        Whoever sets them has the garbage collector forget them, with what they are of (`untracked`).
        """
        parts = []
        for key in metas:
            at = hash(key) % PARTS
            part = self._parts[at]
            if part is None:
                part = self._part(at)
            if key in part:
                return False
            parts.append(part)
        for part, (key, meta) in zip(parts, metas.items(), strict=True):
            part[key] = meta
        return True

    def __delitem__(self, key: Key) -> None:
        del self._part(hash(key) % PARTS)[key]

    def __contains__(self, key: object) -> bool:
        return key in self._part(hash(key) % PARTS)

    def __iter__(self) -> Iterator[Key]:
        return chain.from_iterable(map(self._part, range(PARTS)))

    def __len__(self) -> int:
        sizes = [len(part) for part in self._parts if part is not None]
        if self._grouped is not None:
            sizes += [self._grouped.size(at) for at, part in enumerate(self._parts) if part is None]
        return sum(sizes)

    def keys_now(self) -> list[Key]:
        """A copy of all keys: one step of the interpreter for each part. Any thread, without the lock."""
        grouped, found = self._grouped, list[Key]()
        for at, part in enumerate(list(self._parts)):
            found += part or (grouped.keys(at) if part is None and grouped is not None else ())
        return found

    def clear(self) -> None:
        """Drop everything."""
        self._parts = [{} for _ in range(PARTS)]
        self._resting, self._grouped = Resting(), None
