"""From rows to ordered keys with their Metas, at a start: a million entries in a few seconds.

It works by columns: numpy does the arithmetic and the sorting; the only object per key that stays is the key.
Deadlines come from another process's clock, so they are clamped: none is further away than its TTL, and no entry was
created in the future.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any

import numpy as np

from kvstore.disk.columns import Coded, Found, KeyColumn, columns, rows_of
from kvstore.disk.occupancy import PlaceTable
from kvstore.disk.rows import EXACT, LOSSY, PINNED, SLIDING, Rows
from kvstore.keys import Key
from kvstore.metadata.chains import Links, links_of
from kvstore.metadata.index import Column
from kvstore.metadata.resting import COLUMNS, Resting, Table

log = logging.getLogger(__name__)

Floats = np.ndarray[Any, np.dtype[np.float64]]
Fields = np.ndarray[Any, np.dtype[np.void]]


@dataclass(slots=True)
class Recovered:
    """The contents of all rows. resting: the Metas, one for each of `keys`. order: the rows, that of the least recently
    used key first.

    places: rows of (segment, offset, nbytes). namespaces: the names that occur; namespace: of each row, one of them.
    gone: keys of expired and of damaged rows, to be removed. orphans: keys whose parent is not among them. clamped:
    keys whose deadline was clamped, with their seq. They must be written back, or each restart after a step of the
    clock would move them again.
    """

    keys: list[Key] = field(default_factory=list)
    resting: Resting = field(default_factory=Resting)
    order: Column = field(default_factory=lambda: np.empty(0, np.int64))
    places: PlaceTable = field(default_factory=lambda: np.empty((0, 3), np.int64))
    namespaces: list[str] = field(default_factory=list)
    namespace: Column = field(default_factory=lambda: np.empty(0, np.int64))
    last_seq: int = 0
    gone: list[Key] = field(default_factory=list)
    damaged: int = 0
    orphans: list[Key] = field(default_factory=list)
    clamped: dict[Key, int] = field(default_factory=dict)


def recover(rows: Rows, now: float) -> Recovered:
    """Read all rows. now: Unix seconds. Raises lmdb.Error."""
    found = Recovered()
    chunks = [_living(columns(keys, datas), now, found) for keys, datas in rows.scan()]
    if not chunks:
        return found
    fields = np.concatenate([chunk.fields for chunk in chunks])
    found.order = np.argsort(fields["seq"])
    found.keys = list(chain.from_iterable(chunk.keys for chunk in chunks))
    links = links_of(rows_of(found.keys, KeyColumn.joined([chunk.parents for chunk in chunks])), found.order)
    found.orphans = [found.keys[row] for row in links.orphans]
    encodings = Coded.joined([chunk.encodings for chunk in chunks])
    namespaces = Coded.joined([chunk.namespaces for chunk in chunks])
    found.namespaces, found.namespace = namespaces.names, namespaces.codes
    until = np.concatenate([chunk.pinned_until for chunk in chunks])
    chunks.clear()
    found.resting = Resting(found.keys, _table(fields, until, encodings.codes, links, now), encodings.names)
    found.places = np.stack([fields[name].astype(np.int64) for name in ("segment", "offset", "nbytes")], axis=1)
    found.last_seq = int(fields["seq"].max(initial=0))
    late = np.flatnonzero(fields["expires_at"] > now + fields["ttl_s"])
    seqs = fields["seq"][late].tolist()
    found.clamped = {found.keys[i]: seq for i, seq in zip(late.tolist(), seqs, strict=True)}
    return found


def _living(chunk: Found, now: float, found: Recovered) -> Found:
    """The rows of a chunk that live on; the others are noted in `found`."""
    for key in chunk.damaged:
        log.error("cold key=%s event=corrupt where=row", key.hex())
    found.damaged += len(chunk.damaged)
    found.gone += chunk.damaged
    live = (chunk.fields["flags"] & PINNED > 0) | (_expires_at(chunk.fields, now) > now)
    if live.all():
        return chunk
    found.gone += compress(chunk.keys, (~live).tolist())
    return chunk.of(live)


def _expires_at(fields: Fields, now: float) -> Floats:
    clamped: Floats = np.minimum(fields["expires_at"], now + fields["ttl_s"])
    return clamped


def _table(fields: Fields, pinned_until: Floats, encoding: Column, links: Links, now: float) -> Table:
    table = np.zeros(len(fields), COLUMNS)
    for name in ("ttl_s", "value_nbytes", "hits"):
        table[name] = fields[name]
    for name, flag in (("sliding", SLIDING), ("pinned", PINNED), ("exact", EXACT), ("lossy", LOSSY)):
        table[name] = fields["flags"] & flag > 0
    table["created_at"] = np.minimum(fields["created_at"], now)
    table["expires_at"] = _expires_at(fields, now)
    table["last_hit_at"] = np.minimum(fields["last_hit_at"], now)
    table["pinned_until"], table["encoding"] = pinned_until, encoding
    table["parent"], table["first_child"] = links.parents, links.first_children
    table["previous"], table["next"] = links.previous, links.nexts
    return table


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
