"""From a row to an entry: read a record's bytes, and use none of them before their checksum matched.

Any thread, no lock: a place is never overwritten; at worst it has been freed and reads as zeros.
"""

import numpy as np
import torch
import xxhash

from kvstore.boundary import blamed
from kvstore.disk import Bytes
from kvstore.disk.rows import Row
from kvstore.disk.segments import Segments
from kvstore.entries.entry import Described, Entry
from kvstore.entries.record import Sizes, assemble, parse_head, specs_of
from kvstore.entries.sealing import NO_SEALS, Seals
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import RecordCorrupt
from kvstore.keys import Key

PIECE_NBYTES = 4 << 20
"""Bytes read and hashed at once. Smaller pieces gain nothing, since the kernel's copy does not leave the data in the
cache; a second thread that reads the other end gains nothing either (bench/HISTORY.md, Cold tier)."""


@without_torch_modes
def read_entry(segments: Segments, key: Key, row: Row, seals: Seals = NO_SEALS) -> Entry:
    """The entry that a row names, in new memory. Raises RecordCorrupt or OSError; TierUnavailable without memory."""
    try:  # the boundary: an attacker computes checksums, too
        known, skip = _sizes(row), row.head_nbytes
        begin = np.empty(skip, np.uint8)
        # Allocated by torch, because the entry's tensors are views of it: aligned for every dtype.
        stored = torch.empty(row.place.nbytes - skip, dtype=torch.uint8, device="cpu").numpy()
        first = stored[:PIECE_NBYTES]
        _fill(segments, row, [begin, first], 0)
        digest = xxhash.xxh3_64(first.data)
        for at in range(PIECE_NBYTES, stored.size, PIECE_NBYTES):
            piece = stored[at : at + PIECE_NBYTES]
            _fill(segments, row, [piece], skip + at)
            digest.update(piece.data)
        head_bytes = begin.tobytes()
        head = parse_head(head_bytes, key, known=known)
        return assemble(head, head_bytes, stored, key, digest.intdigest(), seals)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is named
        raise blamed(error, RecordCorrupt, "record") from None


def read_record(segments: Segments, key: Key, row: Row) -> Bytes:
    """The bytes of the record that a row names: what its checksums say, neither opened nor decoded.

    Raises RecordCorrupt or OSError.
    """
    record = np.empty(row.place.nbytes, np.uint8)
    digest = xxhash.xxh3_64()
    for at in range(0, record.size, PIECE_NBYTES):
        _fill(segments, row, [record[at : at + PIECE_NBYTES]], at)
        digest.update(record[max(at, row.head_nbytes) : at + PIECE_NBYTES].data)
    try:  # the boundary, as above
        head = parse_head(record[: row.head_nbytes].tobytes(), key, known=_sizes(row))
        if head.data_xxh3 != digest.intdigest():
            raise RecordCorrupt("checksum of the data does not match")
    except Exception as error:  # noqa: BLE001 - as above
        raise blamed(error, RecordCorrupt, "record") from None
    return record


def _fill(segments: Segments, row: Row, buffers: list[Bytes], skip: int) -> None:
    try:
        nbytes = segments.read(row.place, buffers, skip)
    except OSError:
        # An error says nothing of the record; that there is no such file, where others are, does.
        if segments.lacks(row.place.segment):
            raise RecordCorrupt(f"its row names segment {row.place.segment}, which is not there") from None
        raise
    if nbytes != sum(buffer.size for buffer in buffers):
        raise RecordCorrupt("record ends early")


def read_specs(segments: Segments, key: Key, row: Row) -> dict[str, Described]:
    """The tensors' types, shapes and receipts, from the record's head alone. Raises the same errors as `read_entry`."""
    try:  # the boundary, as above
        begin = np.empty(row.head_nbytes, np.uint8)
        _fill(segments, row, [begin], 0)
        head_bytes = begin.tobytes()
        return specs_of(parse_head(head_bytes, key, known=_sizes(row)), head_bytes)
    except Exception as error:  # noqa: BLE001 - as above
        raise blamed(error, RecordCorrupt, "record") from None


def _sizes(row: Row) -> Sizes:
    """What the record that a row names is held to: callers made room for those sizes."""
    return Sizes(row.head_nbytes, row.place.nbytes, row.meta.value_nbytes)
