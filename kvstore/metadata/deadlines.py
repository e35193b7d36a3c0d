"""When keys expire: buckets of time, narrow near now and wider further away, corrected late.

A bucket is one second wide for what is due within a minute, 64 for what is due within an hour or so, and so on: a few
hundred buckets hold any number of keys. When a wide bucket begins, its keys go to narrower ones. A get moves its key's
deadline and costs nothing here: a key that lives longer than its bucket says is moved when the bucket is looked at.
Each key is in at most one bucket, and leaves it when it is forgotten, replaced, or due earlier: links in the Metas
(`due_previous`, `due_next`) make that O(1). So no caller can make this grow beyond the index.
The keys that a restart found are in no bucket: they are sorted by their deadlines, once, and looked at in this order.
Not thread-safe: the store's lock covers each call.
"""

from collections.abc import Mapping, Sequence
from math import floor, inf
from typing import Any

import numpy as np

from kvstore.keys import Key
from kvstore.metadata.meta import Meta

WIDTHS = tuple(64.0**level for level in range(7))
"""Seconds. The widest is two thousand years: every deadline but infinity fits."""
_FARTHEST = 1e18
Rows = np.ndarray[Any, np.dtype[np.int32]]
Times = np.ndarray[Any, np.dtype[np.float64]]


class Bucket:
    """The keys due from `starts` on, for `width` seconds; `first` is the newest, and `newest` its Meta."""

    __slots__ = ("first", "newest", "starts", "width")

    def __init__(self, starts: float, width: float) -> None:
        self.starts = starts
        self.width = width
        self.first: Key | None = None
        self.newest: Meta | None = None


class Deadlines:
    """The keys of an index, ordered by their Metas' deadlines. now: Unix seconds."""

    def __init__(self, index: Mapping[Key, Meta], now: float = 0.0) -> None:
        self._index = index
        self._now = now
        self._buckets: dict[tuple[float, float], Bucket] = {}
        self._watched = 0
        self._resting: Sequence[Key] = ()
        self._order: Rows = np.empty(0, np.int32)
        self._times: Times = np.empty(0)
        self._at = 0
        self.behind = False

    def __len__(self) -> int:
        return self._watched + len(self._order) - self._at

    def rest(self, keys: Sequence[Key], deadlines: Times) -> None:
        """Watch the keys that a restart found, each with its deadline."""
        finite = np.flatnonzero(deadlines < inf)
        order = finite[np.argsort(deadlines[finite])]
        self._resting, self._order, self._times, self._at = keys, order.astype(np.int32), deadlines[order], 0

    def watch(self, key: Key, meta: Meta) -> None:
        """Watch a key. Needed again only if its deadline moved to an earlier time, or after `due` returned the key."""
        deadline, bucket = meta.deadline, meta.due_in
        if bucket is not None:
            if bucket.starts <= deadline:
                return
            self.unwatch(meta)
        if deadline < inf:
            self._put(key, meta, self._bucket(deadline))

    def watch_new(self, metas: Mapping[Key, Meta]) -> None:
        """`watch` of keys that are new: in no bucket, and not pinned."""
        bucket: Bucket | None = None
        of = inf
        for key, meta in metas.items():
            deadline = meta.expires_at
            if deadline < inf:
                if bucket is None or deadline != of:  # they have one deadline, nearly always
                    bucket, of = self._bucket(deadline), deadline
                self._put(key, meta, bucket)

    def _bucket(self, deadline: float) -> Bucket:
        ahead, level = deadline - self._now, 0
        while ahead >= WIDTHS[level + 1] and level < len(WIDTHS) - 2:
            level += 1
        width = WIDTHS[level]
        starts = floor(min(deadline, _FARTHEST) / width) * width
        bucket = self._buckets.get((width, starts))
        if bucket is None:
            bucket = self._buckets[width, starts] = Bucket(starts, width)
        return bucket

    def _put(self, key: Key, meta: Meta, bucket: Bucket) -> None:
        meta.due_in, meta.due_previous, meta.due_next = bucket, None, bucket.first
        if bucket.newest is not None:
            bucket.newest.due_previous = key
        bucket.first, bucket.newest = key, meta
        self._watched += 1

    def unwatch(self, meta: Meta) -> None:
        """Stop watching the key of a Meta, which is still in the index."""
        bucket = meta.due_in
        if bucket is None:
            return
        later = None if meta.due_next is None else self._index[meta.due_next]
        if meta.due_previous is not None:
            self._index[meta.due_previous].due_next = meta.due_next
        else:
            bucket.first, bucket.newest = meta.due_next, later
            if later is None:
                del self._buckets[bucket.width, bucket.starts]
        if later is not None:
            later.due_previous = meta.due_previous
        meta.due_in = meta.due_previous = meta.due_next = None
        self._watched -= 1

    def due(self, now: float, limit: int) -> list[Key]:
        """Up to `limit` keys whose deadline has passed; they are no longer watched.

        Looks at no more than `limit` keys. `behind`: it ended there, and should be called again.
        """
        self._now = now
        found: list[Key] = []
        early: list[tuple[Key, Meta]] = []
        left = self._resting_due(now, limit, found)
        for bucket in sorted(self._begun(), key=_ends):
            while bucket.first is not None and left:
                left -= 1
                key = bucket.first
                meta = self._index[key]
                self.unwatch(meta)
                if meta.deadline <= now:
                    found.append(key)
                elif bucket.width == 1 and bucket.starts <= meta.deadline < _ends(bucket):
                    early.append((key, meta))  # later within this second
                else:
                    self.watch(key, meta)
        # Of the second that is not over yet the rest may wait, unless there was something to find.
        self.behind = not left and (
            self._next_resting() <= now or any(found or _ends(b) <= now or b.width > 1 for b in self._begun())
        )
        for key, meta in early:
            self.watch(key, meta)
        return found

    def _resting_due(self, now: float, limit: int, found: list[Key]) -> int:
        """Look at keys of a restart whose deadline was not later than now. Returns what is left of `limit`."""
        while limit and self._next_resting() <= now:
            key = self._resting[self._order[self._at]]
            self._at += 1
            limit -= 1
            meta = self._index.get(key)
            if meta is None or meta.due_in is not None:
                continue  # gone, or watched anew
            if meta.deadline <= now:
                found.append(key)
            else:
                self.watch(key, meta)
        if self._at == len(self._order) > 0:
            self.rest((), np.empty(0))
        return limit

    def _next_resting(self) -> float:
        return float(self._times[self._at]) if self._at < len(self._order) else inf

    def _begun(self) -> list[Bucket]:
        return [bucket for bucket in self._buckets.values() if bucket.starts <= self._now]


def _ends(bucket: Bucket) -> float:
    return bucket.starts + bucket.width
