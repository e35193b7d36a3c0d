"""From a row to an entry: read a record's bytes and believe none of them before their checksum agrees.

A large record is read from both ends: this thread reads and hashes from the front, a helper reads from the back. Each
takes one piece after the other, so a helper that does not get a core costs nothing: everything is done here then.
Any thread, no lock: a place is never overwritten, at worst it has been freed and reads as zeros.
"""

import threading
from collections import deque
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import xxhash

from kvstore.disk import Bytes
from kvstore.disk.rows import Row
from kvstore.disk.segments import Segments
from kvstore.entry import Described, Entry, Key
from kvstore.errors import RecordCorrupt
from kvstore.record import Head, assemble, parse_head, specs_of
from kvstore.sealing import NO_SEALS, Seals

PIECE_NBYTES = 512 << 10
"""Read and hashed at once: small enough that two threads share 4 MiB evenly."""
TOGETHER_NBYTES = 2 << 20
"""Records from here on are read by two threads: waking the other costs about as much as reading 512 KiB."""


def read_entry(segments: Segments, key: Key, row: Row, seals: Seals = NO_SEALS) -> Entry:
    """The entry a row names, in memory of its own. Raises RecordCorrupt or OSError."""
    head_room = np.empty(row.head_nbytes, np.uint8)
    # A torch allocation, since the entry's tensors will be views of it: aligned for every dtype.
    stored = torch.empty(row.place.nbytes - row.head_nbytes, dtype=torch.uint8).numpy()
    first = stored[:PIECE_NBYTES]
    _fill(segments, row, [head_room, first], 0)
    digest = xxhash.xxh3_64(first.data)
    if stored.size > PIECE_NBYTES:
        _read_rest(segments, row, stored, digest)
    head_bytes = head_room.tobytes()
    head = parse_head(head_bytes, key)
    _check_sizes(head, row)
    return assemble(head, head_bytes, stored, key, digest.intdigest(), seals)


def _read_rest(segments: Segments, row: Row, stored: Bytes, digest: "xxhash.xxh3_64") -> None:
    """All pieces but the first."""
    pieces = deque((at, stored[at : at + PIECE_NBYTES]) for at in range(PIECE_NBYTES, stored.size, PIECE_NBYTES))
    everything = list(pieces)
    work = _Together(segments, row, pieces) if stored.size >= TOGETHER_NBYTES else None
    if work is not None:
        _helpers.help(work)
    hashed = 0
    while pieces:
        try:
            at, piece = pieces.popleft()
        except IndexError:
            break
        _fill(segments, row, [piece], row.head_nbytes + at)
        digest.update(piece.data)
        hashed += 1
    if work is not None:
        work.wait(len(everything) - hashed)
    for _, piece in everything[hashed:]:
        digest.update(piece.data)


class _Together:
    """Pieces of one record that a helper takes from the back. What it cannot read is an error of the reader's."""

    def __init__(self, segments: Segments, row: Row, pieces: deque[tuple[int, Bytes]]) -> None:
        self._segments = segments
        self._row = row
        self._pieces = pieces
        self._done: SimpleQueue[Exception | None] = SimpleQueue()

    def run(self) -> None:
        """Read until there is no piece left, one word for each."""
        while True:
            try:
                at, piece = self._pieces.pop()
            except IndexError:
                return
            try:
                _fill(self._segments, self._row, [piece], self._row.head_nbytes + at)
            except Exception as error:  # noqa: BLE001 - the reader's, which waits for this word
                self._done.put(error)
            else:
                self._done.put(None)

    def wait(self, pieces: int) -> None:
        """Return once so many pieces are read. Raises RecordCorrupt or OSError."""
        for _ in range(pieces):
            error = self._done.get()
            if error is not None:
                raise error


class _Helpers:
    """One thread that helps whoever reads, started with the first large record. It holds nothing between two."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: SimpleQueue[_Together] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def help(self, work: _Together) -> None:
        """Ask for help; none may come."""
        thread = self._thread
        if thread is None or not thread.is_alive():  # not yet, or this is a forked child
            with self._lock:
                self._work = SimpleQueue()
                self._thread = threading.Thread(target=self._run, args=(self._work,), name="kvstore-read", daemon=True)
                self._thread.start()
        self._work.put(work)

    @staticmethod
    def _run(queue: "SimpleQueue[Any]") -> None:
        while True:
            queue.get().run()


_helpers = _Helpers()


def _fill(segments: Segments, row: Row, buffers: list[Bytes], skip: int) -> None:
    if segments.read(row.place, buffers, skip) != sum(buffer.size for buffer in buffers):
        raise RecordCorrupt("record ends early")


def read_specs(segments: Segments, key: Key, row: Row) -> dict[str, Described]:
    """The tensors' types, shapes and receipts, from the record's head alone. Raises RecordCorrupt or OSError."""
    head_bytes = np.empty(row.head_nbytes, np.uint8)
    segments.read(row.place, [head_bytes])
    head = parse_head(head_bytes.tobytes(), key)
    _check_sizes(head, row)
    return specs_of(head, head_bytes.tobytes())


def _check_sizes(head: Head, row: Row) -> None:
    if head.nbytes != row.head_nbytes or head.stored_nbytes != row.place.nbytes - row.head_nbytes:
        raise RecordCorrupt(f"record of {head.nbytes + head.stored_nbytes} bytes, its row says {row.place.nbytes}")
