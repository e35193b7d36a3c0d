"""From rows to keys in order with their Metas: what a start does, for a million entries in a few seconds.

Column by column: numpy does the arithmetic and the sorting, Python makes one Meta a key and nothing else that stays.
Deadlines come from another process's clock: none is further away than its TTL, and nothing began in the future.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any

import numpy as np

from kvstore.disk.blocks import PlaceTable, places_nbytes
from kvstore.disk.rows import EXACT, LOSSY, PINNED, SLIDING, Found, Rows
from kvstore.entry import Key
from kvstore.index import Meta

log = logging.getLogger(__name__)


Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(slots=True)
class Recovered:
    """What the rows say. In the order of use, the least recently used first: keys, metas, and bytes of places.

    places: rows of (segment, offset, nbytes). gone: keys of expired and of damaged rows, to be removed.
    """

    keys: list[Key] = field(default_factory=list)
    metas: list[Meta] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    places: PlaceTable = field(default_factory=lambda: np.empty((0, 3), np.int64))
    last_seq: int = 0
    gone: list[Key] = field(default_factory=list)
    damaged: int = 0


def recover(rows: Rows, now: float) -> Recovered:
    """Read all rows. now: Unix seconds. Raises lmdb.Error."""
    found = Recovered()
    chunks = [_living(chunk, now, found) for chunk in rows.scan()]
    if not chunks:
        return found
    fields = np.concatenate([chunk.fields for chunk in chunks])
    keys, encodings, parents = (
        list(chain.from_iterable(getattr(chunk, name) for chunk in chunks)) for name in ("keys", "encodings", "parents")
    )
    until = np.concatenate([chunk.pinned_until for chunk in chunks])
    chunks.clear()
    order = np.argsort(fields["seq"], kind="stable")
    fields, until, at = fields[order], until[order], order.tolist()
    found.keys = [keys[i] for i in at]
    # A parent is a key too: the same object, not another of 80 bytes.
    own = dict(zip(keys, keys, strict=True))
    parents = [None if (parent := parents[i]) is None else own.get(parent, parent) for i in at]
    found.metas = _metas(Found(found.keys, fields, [encodings[i] for i in at], until, parents, []), now)
    found.places = np.stack([fields[name].astype(np.int64) for name in ("segment", "offset", "nbytes")], axis=1)
    found.nbytes = places_nbytes(found.places[:, 2]).tolist()
    found.last_seq = int(fields["seq"].max(initial=0))
    return found


def _living(chunk: Found, now: float, found: Recovered) -> Found:
    """The rows of a chunk that go on; the others are noted in `found`."""
    for key in chunk.damaged:
        log.error("cold key=%s event=corrupt where=row", key.hex())
    found.damaged += len(chunk.damaged)
    found.gone += chunk.damaged
    live = (chunk.fields["flags"] & PINNED > 0) | (_expires_at(chunk, now) > now)
    if live.all():
        return chunk
    mask = live.tolist()
    found.gone += compress(chunk.keys, (~live).tolist())
    keys, encodings, parents = (list(compress(c, mask)) for c in (chunk.keys, chunk.encodings, chunk.parents))
    return Found(keys, chunk.fields[live], encodings, chunk.pinned_until[live], parents, [])


def _expires_at(chunk: Found, now: float) -> Floats:
    clamped: Floats = np.minimum(chunk.fields["expires_at"], now + chunk.fields["ttl_s"])
    return clamped


def _metas(rows: Found, now: float) -> list[Meta]:
    """One Meta a row. Equal numbers become one object: a hundred bytes less for each of a million keys."""
    f = rows.fields
    flags = [(f["flags"] & flag > 0).tolist() for flag in (SLIDING, PINNED, EXACT, LOSSY)]
    return list(
        map(
            Meta,
            _shared(np.minimum(f["created_at"], now)),
            _shared(_expires_at(rows, now)),
            _shared(f["ttl_s"]),
            _shared(f["value_nbytes"]),
            *flags,
            rows.encodings,
            f["hits"].tolist(),
            _shared(np.minimum(f["last_hit_at"], now)),
            _shared(rows.pinned_until),
            rows.parents,
        )
    )


def _shared(column: np.ndarray[Any, np.dtype[Any]]) -> list[float]:
    """A column as Python numbers, equal ones that follow each other the same object: chunks put or used together."""
    values, repeats = column.tolist(), np.flatnonzero(column[1:] == column[:-1]).tolist()
    for i in repeats:
        values[i + 1] = values[i]
    return values  # type: ignore[no-any-return]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A million new objects and no garbage among them: looking for it would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
