"""Rows of the index as columns: at a start a million of them are read in a few seconds.

What is believed here is what `rows.parse_row` believes, row by row. numpy takes the fields out of the joined bytes of
many rows; the checksum alone is computed row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import xxhash

from kvstore.arrays import ENTRY_MAX_NBYTES
from kvstore.disk.rows import (
    FIELDS,
    NAMED,
    OFFSET_MAX,
    PINNED_UNTIL,
    PLACE_MAX_NBYTES,
    SEQ_MAX,
    SUM,
    encoding_named,
    namespace_named,
)
from kvstore.disk.segments import SEGMENT_MAX
from kvstore.keys import KEY_MAX_NBYTES, Key
from kvstore.metadata.chains import MISSING
from kvstore.metadata.index import Column
from kvstore.metadata.resting import NONE

_COLUMNS = np.dtype(
    [
        ("seq", "<u8"), ("created_at", "<f8"), ("expires_at", "<f8"), ("ttl_s", "<f8"), ("last_hit_at", "<f8"),
        ("value_nbytes", "<u8"), ("hits", "<u4"), ("segment", "<u4"), ("offset", "<u8"), ("nbytes", "<u8"),
        ("head_nbytes", "<u4"), ("flags", "u1"),
    ]
)  # fmt: skip
"""The fixed fields of a row, as `rows.FIELDS`."""
_SUM_MASK = 0xFFFFFFFF
_NAME_NBYTES, _NAMESPACE_NBYTES = 24, 256
"""Windows: an encoding's name is nearly always shorter, a namespace's with the byte of its length never longer."""
_PASSES_MAX = 32
_WORDS_MAX, _MULTIPLIER = 8, np.uint64(0x9E3779B97F4A7C15)
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Coded:
    """A column of names of which few occur. names: those. codes: for each row, which one it is."""

    names: list[str]
    codes: Column

    def __getitem__(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def __iter__(self) -> Iterator[str]:
        return map(self.names.__getitem__, self.codes.tolist())

    def of(self, rows: Column | Mask) -> "Coded":
        """Some of its rows."""
        return Coded(self.names, self.codes[rows])

    @staticmethod
    def joined(columns: Sequence["Coded"]) -> "Coded":
        """Columns one behind the other."""
        known: dict[str, int] = {}
        codes = [
            np.array([known.setdefault(name, len(known)) for name in column.names], np.int64)[column.codes]
            for column in columns
        ]
        return Coded(list(known), np.concatenate([np.empty(0, np.int64), *codes]))


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """A column of keys as bytes: where each one begins in `joint`, and its size; 0: there is none."""

    joint: Bytes
    at: Column
    sizes: Column

    def __iter__(self) -> Iterator[Key | None]:
        blob = self.joint.tobytes()
        for at, size in zip(self.at.tolist(), self.sizes.tolist(), strict=True):
            yield Key(blob[at : at + size]) if size else None

    def of(self, rows: Column | Mask) -> "KeyColumn":
        """Some of its rows."""
        return KeyColumn(self.joint, self.at[rows], self.sizes[rows])

    def alone(self) -> "KeyColumn":
        """The same keys without the bytes between them, which may be many times as many."""
        sizes = self.sizes[self.sizes > 0]
        if not sizes.size or (sizes != sizes[0]).any():
            return KeyColumn.made([key or b"" for key in self])
        found = np.lib.stride_tricks.sliding_window_view(self.joint, int(sizes[0]))[self.at[self.sizes > 0]]
        return KeyColumn(found.reshape(-1), np.cumsum(self.sizes) - self.sizes, self.sizes)

    @staticmethod
    def joined(columns: Sequence["KeyColumn"]) -> "KeyColumn":
        """Columns one behind the other."""
        shifts = np.cumsum([0, *(column.joint.size for column in columns)])
        at = [column.at + shift for column, shift in zip(columns, shifts[:-1].tolist(), strict=True)]
        return KeyColumn(
            np.concatenate([np.empty(0, np.uint8), *(column.joint for column in columns)]),
            np.concatenate([np.empty(0, np.int64), *at]),
            np.concatenate([np.empty(0, np.int64), *(column.sizes for column in columns)]),
        )

    @staticmethod
    def made(keys: Sequence[bytes]) -> "KeyColumn":
        """A column of these keys; an empty one is none."""
        sizes = np.fromiter(map(len, keys), np.int64, len(keys))
        return KeyColumn(np.frombuffer(b"".join(keys), np.uint8), np.cumsum(sizes) - sizes, sizes)

    def words(self, count: int) -> Words:
        """The keys' bytes as numbers of 64 bits, zeros behind the shorter ones. None is longer than `count` numbers."""
        nbytes = 8 * count
        padded = np.concatenate([self.joint, np.zeros(nbytes, np.uint8)])
        found = np.lib.stride_tricks.sliding_window_view(padded, nbytes)[self.at]
        if (self.sizes != nbytes).any():
            found[np.arange(nbytes) >= self.sizes[:, None]] = 0
        return found.view(np.uint64)


@dataclass(frozen=True, slots=True)
class Found:
    """Rows as columns, all of the same length, and damaged: keys whose row is not believed."""

    keys: list[Key]
    fields: np.ndarray[Any, np.dtype[np.void]]
    encodings: Coded
    pinned_until: np.ndarray[Any, np.dtype[np.float64]]
    parents: KeyColumn
    namespaces: Coded
    damaged: list[Key]

    def of(self, mask: Mask) -> "Found":
        """Some of its rows."""
        chosen = mask.tolist()
        return Found(
            list(compress(self.keys, chosen)), self.fields[mask], self.encodings.of(mask), self.pinned_until[mask],
            self.parents.of(mask), self.namespaces.of(mask), self.damaged,
        )  # fmt: skip


def columns(keys: Sequence[Key], datas: Sequence[bytes]) -> Found:
    """Rows as columns, without the damaged ones."""
    lengths = np.fromiter(map(len, datas), np.int64, len(datas))
    least = FIELDS.size + 1 + PINNED_UNTIL.size + SUM.size
    good = (lengths >= least) & (np.fromiter(map(len, keys), np.int64, len(keys)) <= KEY_MAX_NBYTES)
    damaged: list[Key] = []
    if not good.all():
        keys, datas, lengths = _without(good, keys, datas, lengths, damaged)
    rows = _Rows(datas, lengths)
    good = _sums(keys, datas) == rows.window(rows.ends, SUM.size).view("<u4")[:, 0]
    good &= _sound(rows.fields) & (rows.until_at + PINNED_UNTIL.size <= rows.ends)
    if not good.all():
        keys, datas, lengths = _without(good, keys, datas, lengths, damaged)
        rows = _Rows(datas, lengths)
    namespaces, parents_at = rows.namespaces()
    good = ~np.isnan(rows.pinned_until) & (namespaces.codes >= 0)
    parents = KeyColumn(rows.bytes, parents_at, rows.ends - parents_at).alone()
    found = Found(list(keys), rows.fields, rows.encodings, rows.pinned_until, parents, namespaces, damaged)
    if not good.all():
        damaged += compress(keys, (~good).tolist())
        found = found.of(good)
    return found


def rows_of(keys: Sequence[Key], wanted: KeyColumn) -> Column:
    """The row that each wanted key has among `keys`. NONE: none is wanted; MISSING: it is not among them."""
    rows = np.full(len(wanted.sizes), NONE, np.int64)
    asked = np.flatnonzero(wanted.sizes)
    if not asked.size:
        return rows
    rows[asked] = MISSING
    own, wanted = KeyColumn.made(keys), wanted.of(asked)
    words = -(-int(max(own.sizes.max(initial=0), wanted.sizes.max())) // 8)
    if words <= _WORDS_MAX and own.sizes.size:
        have, want = own.words(words), wanted.words(words)
        sums, sums_wanted = _mixed(have, own.sizes), _mixed(want, wanted.sizes)
        order, order_wanted = np.argsort(sums), np.argsort(sums_wanted)
        at = np.empty(asked.size, np.int64)
        at[order_wanted] = np.searchsorted(sums[order], sums_wanted[order_wanted])
        at = order[np.minimum(at, order.size - 1)]
        same = (own.sizes[at] == wanted.sizes) & (have[at] == want).all(axis=1)
        rows[asked[same]] = at[same]
        asked, wanted = asked[~same], wanted.of(~same)
    if asked.size:  # very long, not among them, or with the sum of another key
        position = dict(zip(keys, range(len(keys)), strict=True))
        rows[asked] = [MISSING if key is None else position.get(key, MISSING) for key in wanted]
    return rows


def _mixed(words: Words, sizes: Column) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number for each key, the same for the same key; two keys may share one."""
    mixed = sizes.astype(np.uint64)
    for word in words.T:
        mixed ^= word
        mixed *= _MULTIPLIER
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _without(
    good: Mask, keys: Sequence[Key], datas: Sequence[bytes], lengths: Column, damaged: list[Key]
) -> tuple[list[Key], list[bytes], Column]:
    damaged += compress(keys, (~good).tolist())
    mask = good.tolist()
    return list(compress(keys, mask)), list(compress(datas, mask)), lengths[good]


def _sums(keys: Sequence[Key], datas: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    digest, tail = xxhash.xxh3_64_intdigest, -SUM.size
    return np.array([digest(data[:tail] + key) & _SUM_MASK for key, data in zip(keys, datas, strict=True)], np.uint32)


def _sound(f: np.ndarray[Any, np.dtype[np.void]]) -> Mask:
    """Which rows name what a record of ours can be, as `parse_row` has it.

    A checksum keeps damage out, not an author who computes it.
    """
    sound: Mask = (f["head_nbytes"] <= f["nbytes"]) & (f["nbytes"] <= PLACE_MAX_NBYTES) & (f["offset"] <= OFFSET_MAX)
    sound &= (f["seq"] <= SEQ_MAX) & (f["segment"] <= SEGMENT_MAX) & (f["value_nbytes"] <= ENTRY_MAX_NBYTES)
    sound &= np.isfinite(f["created_at"]) & np.isfinite(f["last_hit_at"])
    sound &= ~np.isnan(f["expires_at"]) & ~np.isnan(f["ttl_s"])
    return sound


class _Rows:
    """Rows joined, each long enough for its fixed fields. ends: where each one's checksum begins.

    until_at: where the time of its pin begins; beyond its end if the name of its encoding has none.
    """

    def __init__(self, datas: Sequence[bytes], lengths: Column) -> None:
        self.blob = b"".join([*datas, bytes(_NAMESPACE_NBYTES)])
        self.bytes: Bytes = np.frombuffer(self.blob, np.uint8)
        stops = np.cumsum(lengths)
        self._starts, self.ends = stops - lengths, stops - SUM.size
        self.fields = self.window(self._starts, FIELDS.size).view(_COLUMNS)[:, 0]
        at = self._starts + FIELDS.size
        sizes = self._sizes_of_names(at)
        self.until_at = at + sizes + 1
        self.encodings = self._coded(at, sizes, encoding_named)
        self.pinned_until = self.window(np.minimum(self.until_at, self.ends), PINNED_UNTIL.size).view("<f8")[:, 0]

    def window(self, at: Column, nbytes: int) -> Bytes:
        """A copy of so many bytes at each place."""
        return np.lib.stride_tricks.sliding_window_view(self.bytes, nbytes)[at]

    def _sizes_of_names(self, at: Column) -> Column:
        zeros = self.window(at, _NAME_NBYTES) == 0
        sizes: Column = zeros.argmax(axis=1)
        for row in np.flatnonzero(~zeros[np.arange(len(at)), sizes] | (at + sizes >= self.ends)).tolist():
            end = self.blob.find(0, int(at[row]), int(self.ends[row]))
            sizes[row] = (end if end >= 0 else int(self.ends[row])) - int(at[row])
        return sizes

    def namespaces(self) -> tuple[Coded, Column]:
        """The names, code -1 for what is no name of ours, and where the key of each row's parent begins."""
        at = self.until_at + PINNED_UNTIL.size
        named = self.fields["flags"] & NAMED > 0
        if not named.any():
            return Coded([""], np.zeros(len(at), np.int64)), at
        sizes = np.where(named & (at < self.ends), self.bytes[np.minimum(at, self.ends)], 0).astype(np.int64)
        ends = at + named + sizes
        found = self._coded(at + named, np.where(ends <= self.ends, sizes, 0), namespace_named)
        empty = np.array([not name for name in found.names], np.bool_)[found.codes]
        codes = np.where(named & empty, -1, found.codes)
        return Coded(found.names, codes), np.minimum(ends, self.ends)

    def _coded(self, at: Column, sizes: Column, name_of: Callable[[bytes], str | None]) -> Coded:
        """The names at these places. Few occur: each pass finds all rows that have the first one's."""
        known: dict[str, int] = {}
        codes = np.zeros(len(at), np.int64)
        left = np.arange(len(at))
        for _ in range(_PASSES_MAX):
            if not left.size:
                break
            size = int(sizes[left[0]])
            start = int(at[left[0]])
            raw = self.blob[start : start + size]
            same = sizes[left] == size
            if size:
                same[same] = (self.window(at[left[same]], size) == np.frombuffer(raw, np.uint8)).all(axis=1)
            codes[left[same]] = known.setdefault(name_of(raw) or "", len(known))
            left = left[~same]
        for row in left.tolist():
            raw = self.blob[int(at[row]) : int(at[row] + sizes[row])]
            codes[row] = known.setdefault(name_of(raw) or "", len(known))
        return Coded(list(known), codes)
