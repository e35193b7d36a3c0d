"""A dictionary of keys that never takes long to grow.

A dictionary of 700,000 keys takes 50 ms to grow, in one step of the interpreter that nobody can interrupt, and the
store's lock is held meanwhile. So the keys are spread over `PARTS` dictionaries, by the hash of the process, which no
caller can foresee. Not thread-safe but for `get` and `keys_now`: one step of the interpreter for each part.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from kvstore.keys import Key

PARTS = 64
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
        self._parts: tuple[dict[Key, V], ...] = tuple({} for _ in range(PARTS))

    def get(self, key: Key) -> V | None:  # type: ignore[override]  # nobody names a default
        """The value of a key, None if there is none."""
        return self._parts[hash(key) % PARTS].get(key)

    def get_all(self, keys: Iterable[Key]) -> list[V | None]:
        """The value of each key, None if there is none."""
        parts = self._parts
        return [parts[hash(key) % PARTS].get(key) for key in keys]

    def take(self, key: Key) -> V | None:
        """The value of a key, which is taken out; None if there is none."""
        return self._parts[hash(key) % PARTS].pop(key, None)

    def __getitem__(self, key: Key) -> V:
        return self._parts[hash(key) % PARTS][key]

    def __setitem__(self, key: Key, value: V) -> None:
        self._parts[hash(key) % PARTS][key] = value

    def __delitem__(self, key: Key) -> None:
        del self._parts[hash(key) % PARTS][key]

    def __contains__(self, key: object) -> bool:
        return key in self._parts[hash(key) % PARTS]

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
