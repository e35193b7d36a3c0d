"""From rows to ordered keys with their Metas, at a start: a million entries in a few seconds.

It works by columns: numpy does the arithmetic and the sorting; the only object per key that stays is its Meta.
Deadlines come from another process's clock, so they are clamped: none is further away than its TTL, and no entry was
created in the future.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, compress, repeat
from typing import Any

import numpy as np

from kvstore.disk.occupancy import PlaceTable, places_nbytes
from kvstore.disk.rows import EXACT, LOSSY, PINNED, SLIDING, Found, Rows
from kvstore.keys import Key
from kvstore.metadata.chains import Links, links_of
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import labelled

log = logging.getLogger(__name__)


Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(slots=True)
class Recovered:
    """The contents of all rows. keys, metas and bytes of places are in order of use, the least recently used first.

    places: rows of (segment, offset, nbytes). gone: keys of expired and of damaged rows, to be removed.
    orphans: keys whose parent is not among them. clamped: keys whose deadline was clamped, with their seq. They must be
    written back, or each restart after a step of the clock would move them again.
    """

    keys: list[Key] = field(default_factory=list)
    metas: list[Meta] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    places: PlaceTable = field(default_factory=lambda: np.empty((0, 3), np.int64))
    last_seq: int = 0
    gone: list[Key] = field(default_factory=list)
    damaged: int = 0
    orphans: list[Key] = field(default_factory=list)
    clamped: dict[Key, int] = field(default_factory=dict)


def recover(rows: Rows, now: float) -> Recovered:
    """Read all rows. now: Unix seconds. Raises lmdb.Error."""
    found = Recovered()
    chunks = [_living(chunk, now, found) for chunk in rows.scan()]
    if not chunks:
        return found
    fields = np.concatenate([chunk.fields for chunk in chunks])
    until = np.concatenate([chunk.pinned_until for chunk in chunks])
    order = np.argsort(fields["seq"], kind="stable")
    at = order.tolist()

    def sorted_column(name: str) -> list[Any]:
        column = list(chain.from_iterable(getattr(chunk, name) for chunk in chunks))
        return [column[i] for i in at]

    found.keys = sorted_column("keys")
    links = links_of(found.keys, sorted_column("parents"))
    found.orphans = links.orphans
    table = Found(
        found.keys, fields[order], sorted_column("encodings"), until[order], [], sorted_column("namespaces"), []
    )
    chunks.clear()
    found.metas = _metas(table, links, now)
    found.places = np.stack([table.fields[name].astype(np.int64) for name in ("segment", "offset", "nbytes")], axis=1)
    found.nbytes = places_nbytes(found.places[:, 2]).tolist()
    found.last_seq = int(fields["seq"].max(initial=0))
    late = np.flatnonzero(table.fields["expires_at"] > now + table.fields["ttl_s"])
    seqs = table.fields["seq"][late].tolist()
    found.clamped = {found.keys[i]: seq for i, seq in zip(late.tolist(), seqs, strict=True)}
    return found


def _living(chunk: Found, now: float, found: Recovered) -> Found:
    """The rows of a chunk that live on; the others are noted in `found`."""
    for key in chunk.damaged:
        log.error("cold key=%s event=corrupt where=row", key.hex())
    found.damaged += len(chunk.damaged)
    found.gone += chunk.damaged
    live = (chunk.fields["flags"] & PINNED > 0) | (_expires_at(chunk, now) > now)
    if live.all():
        return chunk
    mask = live.tolist()
    found.gone += compress(chunk.keys, (~live).tolist())
    keys, parents = list(compress(chunk.keys, mask)), list(compress(chunk.parents, mask))
    encodings, names = (list(compress(column, mask)) for column in (chunk.encodings, chunk.namespaces))
    return Found(keys, chunk.fields[live], encodings, chunk.pinned_until[live], parents, names, [])


def _expires_at(chunk: Found, now: float) -> Floats:
    clamped: Floats = np.minimum(chunk.fields["expires_at"], now + chunk.fields["ttl_s"])
    return clamped


def _metas(rows: Found, links: Links, now: float) -> list[Meta]:
    """One Meta per row. Equal numbers become one object: that saves a hundred bytes per key."""
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
            links.parents,
            repeat(False),
            links.first_children,
            links.previous,
            links.nexts,
            repeat(None),
            repeat(False),
            map(labelled, rows.namespaces),
        )
    )


def _shared(column: np.ndarray[Any, np.dtype[Any]]) -> list[float]:
    """A column as Python numbers; equal neighbours are one object, as in chunks that were put or used together."""
    values, repeats = column.tolist(), np.flatnonzero(column[1:] == column[:-1]).tolist()
    for i in repeats:
        values[i + 1] = values[i]
    return values  # type: ignore[no-any-return]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Make a million objects without looking for garbage among them, which would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
