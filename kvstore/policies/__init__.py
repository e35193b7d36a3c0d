"""Which key leaves next. A policy keeps order only: it sees keys, never bytes, sizes, time or pins.

A pinned key is simply not tracked: its tier forgets it here and tracks it again when the pin is taken off.
"""

from collections.abc import Iterator
from typing import Protocol

from kvstore.entry import Key


class Policy(Protocol):
    """An order of keys. Not thread-safe: the tier's lock covers it."""

    def track(self, key: Key) -> None:
        """Start keeping a key, as the most recently used. A known key: as touch."""
        ...

    def touch(self, key: Key) -> None:
        """Count as use. An unknown key: nothing happens."""
        ...

    def forget(self, key: Key) -> None:
        """Stop keeping a key. An unknown key: nothing happens."""
        ...

    def victim(self) -> Key | None:
        """The key that should leave next, still tracked; None when there is none."""
        ...

    def __iter__(self) -> Iterator[Key]:
        """Keys, next victim first."""
        ...

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...
