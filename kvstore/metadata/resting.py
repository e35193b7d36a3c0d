"""Metas of keys that a restart found and nobody has asked for yet: a row of numbers each, 77 bytes, no objects.

A row never changes. Who would change it asks the index for the key, and gets a Meta made from the row for good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner

NONE = -1
"""In a column of rows: no row."""
COLUMNS = np.dtype(
    [
        ("created_at", "f8"), ("expires_at", "f8"), ("ttl_s", "f8"), ("value_nbytes", "i8"), ("sliding", "?"),
        ("pinned", "?"), ("exact", "?"), ("lossy", "?"), ("encoding", "i4"), ("hits", "i8"), ("last_hit_at", "f8"),
        ("pinned_until", "f8"), ("parent", "i4"), ("first_child", "i4"), ("previous", "i4"), ("next", "i4"),
        ("owner", "i4"),
    ]
)  # fmt: skip
"""Fields of a Meta, in its order. encoding, owner: positions in the lists of `Resting`. Links are rows."""
Table = np.ndarray[Any, np.dtype[np.void]]


@dataclass(slots=True)
class Resting:
    """Rows of COLUMNS with what they refer to. keys: of each row. encodings, owners: those that occur."""

    keys: Sequence[Key] = ()
    table: Table = field(default_factory=lambda: np.empty(0, COLUMNS))
    encodings: Sequence[str] = ()
    owners: Sequence[Owner] = (NOBODY,)

    def meta(self, row: int) -> Meta:
        """The Meta of a row."""
        created, expires, ttl_s, nbytes, sliding, pinned, exact, lossy, encoding, hits, hit_at, until, *links, owner = (
            self.table[row].item()
        )
        parent, first_child, previous, following = (None if at == NONE else self.keys[at] for at in links)
        return Meta(
            created, expires, ttl_s, nbytes, sliding, pinned, exact, lossy, self.encodings[encoding], hits, hit_at,
            until, parent, first_child=first_child, previous=previous, next=following, owner=self.owners[owner],
            rooted=True,  # orphans are forgotten at the start
        )  # fmt: skip
