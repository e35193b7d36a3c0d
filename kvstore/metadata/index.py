"""The index: the Meta of each key that the store holds.

A restart finds a million keys, and most of them are not asked for in the next hour. So it makes no Meta for them: what
the disk said of them rests in columns (`resting`), and a key's Meta is made when somebody asks for it.
Not thread-safe but for `get` and `keys_now`: the store's lock covers the other calls.
"""

import threading
from collections.abc import Sequence

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.resting import Resting
from kvstore.metadata.spread import PARTS, Spread


class Index(Spread[Meta]):
    """Metas by key. A part holds a Meta, or the row of `_resting` that it can be made from.

    A key is asked for before it is given another Meta or deleted; so its row has been used by then, and a thread that
    reads without the lock makes no Meta of a key that is gone.
    """

    __slots__ = ("_making", "_resting")

    def __init__(self) -> None:
        super().__init__()
        self._resting = Resting()
        self._making = threading.Lock()

    def rest(self, keys: Sequence[Key], resting: Resting) -> None:
        """Take over the keys that a restart found, row by row. Before any other key is held."""
        self._resting = resting
        hashes = (np.fromiter(map(hash, keys), np.int64, len(keys)) % PARTS).astype(np.uint8)  # sorted ten times faster
        order = np.argsort(hashes, kind="stable")
        stops = np.searchsorted(hashes[order], np.arange(PARTS), side="right").tolist()
        rows, start = order.tolist(), 0
        for part, stop in zip(self._parts, stops, strict=True):
            own = rows[start:stop]
            part.update(zip([keys[row] for row in own], own, strict=True))
            start = stop

    def get(self, key: Key) -> Meta | None:  # type: ignore[override]
        """The Meta of a key, None for one that is not held. Any thread, without the lock."""
        found: Meta | int | None = self._parts[hash(key) % PARTS].get(key)
        return self._made(key) if found.__class__ is int else found  # type: ignore[return-value]

    def __getitem__(self, key: Key) -> Meta:
        found: Meta | int | None = self._parts[hash(key) % PARTS][key]
        if found.__class__ is int:
            found = self._made(key)
            if found is None:
                raise KeyError(key)
        return found  # type: ignore[return-value]

    def _made(self, key: Key) -> Meta | None:
        part = self._parts[hash(key) % PARTS]
        with self._making:  # two threads would make two Metas, and what one of them notes would be lost
            found: Meta | int | None = part.get(key)
            if isinstance(found, int):
                found = part[key] = self._resting.meta(found)
            return found

    def clear(self) -> None:
        """Drop everything."""
        super().clear()
        self._resting = Resting()
