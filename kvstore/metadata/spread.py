"""A dictionary of keys that never takes long to grow.

A dictionary of 700,000 keys takes 50 ms to grow, in one step of the interpreter that nobody can interrupt, and the
store's lock is held meanwhile. So the keys are spread over `PARTS` dictionaries, by the hash of the process, which no
caller can foresee. Not thread-safe but for `get` and `keys_now`: one step of the interpreter for each part.
"""

from collections.abc import Iterator, MutableMapping
from itertools import chain
from typing import TypeVar

from kvstore.keys import Key

PARTS = 64
V = TypeVar("V")


class Spread(MutableMapping[Key, V]):
    """Values by key, in no order."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: tuple[dict[Key, V], ...] = tuple({} for _ in range(PARTS))

    def get(self, key: Key) -> V | None:  # type: ignore[override]  # nobody names a default
        """The value of a key, None if there is none."""
        return self._parts[hash(key) % PARTS].get(key)

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
