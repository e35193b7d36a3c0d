"""The one thread that changes the disk: it takes pending operations, writes records, commits rows, frees places.

Order, for each batch: records are on the disk before a row names them; a place is freed only when a power cut can no
longer undo the transaction that stopped naming it. So a row never names bytes that are not its own.
An error loses nothing: the batch goes back, stays readable, and is tried again after a pause, deletes first, because
they make room. `meta_of` and `on_drop` are called without the tier's lock.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import lmdb

from kvstore.disk import Buffer
from kvstore.disk.gathering import Gatherer
from kvstore.disk.occupancy import place_nbytes
from kvstore.disk.pending import Delete, Operation, Pending, Put
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Place, Segments
from kvstore.entries.record import pack
from kvstore.entries.sealing import Key as SealKey
from kvstore.errors import KvstoreError
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

log = logging.getLogger(__name__)

BATCH_NBYTES = 32 << 20
"""Bytes of a group commit: fdatasync takes 2 ms and writing so many bytes 20 ms, so longer batches gain nothing."""
BATCH_MAX = 1024
ROWS_PER_COMMIT = 10_000
"""Rows of use and deadlines per transaction: 30 ms, which a waiting delete can afford."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.05, 5.0
BEHIND = 0.25
"""Above this idle share of the bytes held, gathering no longer waits until there is nothing else to write."""
ROW_NBYTES = 256
"""Counted for a row: 100 bytes, its key and its parent's key, in LMDB pages that are two thirds full."""


def cost_of(record_nbytes: int) -> int:
    """Bytes counted against the tier's budget for a record."""
    return place_nbytes(record_nbytes) + ROW_NBYTES


@dataclass(slots=True)
class Counters:
    """Counts since the tier was opened."""

    commits: int = 0
    records_written: int = 0
    bytes_written: int = 0
    write_errors: int = 0
    read_errors: int = 0
    corrupt_total: int = 0
    evictions: int = 0
    records_moved: int = 0


@dataclass(slots=True)
class Callbacks:
    """The writer's calls into the store and the tier.

    make_room: evict until the file system has so many bytes above its floor; False: there was nothing to evict.
    dropped: forget a key that could not be written. wrote: count bytes that went to the disk. may_gather: whether so
    many bytes may be written in addition to puts. seal_of: the key to encrypt an entry's record with, if any.
    """

    meta_of: Callable[[Key], Meta | None]
    dropped: Callable[[Key, str], None]
    make_room: Callable[[int], bool]
    wrote: Callable[[int], None]
    may_gather: Callable[[int], bool]
    seal_of: Callable[[Meta], SealKey | None]


class Writer:
    """The thread and its loop. changed: the tier's lock, notified when an operation is queued or done."""

    def __init__(
        self, rows: Rows, segments: Segments, pending: Pending, changed: threading.Condition, callbacks: Callbacks
    ) -> None:
        self._rows = rows
        self._segments = segments
        self._pending = pending
        self._changed = changed
        self._callbacks = callbacks
        self._gatherer = Gatherer(rows, segments, callbacks.may_gather)
        self.counters = Counters()
        self.healthy = True
        self.dirty: dict[Key, int] = {}
        self.batch_nbytes = BATCH_NBYTES
        self._rows_due = 0
        self._rows_done = 0
        self._freed: list[Place] = []
        self._failures = 0
        self._closing = False
        self.room_due = False
        self._thread = threading.Thread(target=self._run, name="kvstore-cold-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current batch. Pending operations are not written: flush before."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs, so that pending operations will be tried."""
        return self._thread.is_alive() and not self._closing

    def wait_rows(self, timeout_s: float) -> bool:
        """Wait until all dirty rows are written. False: not within `timeout_s`. Call with the lock held."""
        if not self.dirty:
            return True
        self._rows_due += 1
        due = self._rows_due
        self._changed.notify_all()
        return (
            self._changed.wait_for(lambda: self._rows_done >= due or not self.alive, timeout_s)
            and self._rows_done >= due
        )

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Wait for work and do it. False: closing. A turn ends between two works: none keeps what it wrote alive."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._closing:
                return False
            due = self._rows_due
            batch = self._pending.take(
                self.batch_nbytes, BATCH_MAX, deletes_only=self._failures > 0 and self._pending.has_deletes()
            )
        try:
            if not self._rows.readable:
                self._rows.reopen()
            if batch:
                self._commit(batch)
                if self._segments.slack_nbytes > BEHIND * self._pending.used_nbytes:
                    self._gather()
            elif due > self._rows_done:
                self._write_dirty_rows()
                with self._changed:
                    self._rows_done = due
                    self._changed.notify_all()
            elif self.room_due:
                self.room_due = False
                self._callbacks.make_room(0)
            elif self._freed:
                self._free_durably()
            else:
                self._gather()
            self._failures = 0
            self.healthy = True
        except (OSError, lmdb.Error) as error:
            if isinstance(error, lmdb.PanicError):  # met by a write, or by what looks before one
                with suppress(lmdb.Error):  # then it is not open, and the next turn tries again
                    self._rows.reopen()
            self._fail(error)
        return True

    def _has_work(self) -> bool:
        return bool(
            self._closing or self._pending.queued or self._rows_due > self._rows_done or self._freed or self.room_due
            or not self._rows.readable or self._gatherer.due(self._pending.used_nbytes)
        )  # fmt: skip

    def _fail(self, error: Exception) -> None:
        """Queue the batch again and pause, longer each time."""
        with self._changed:
            wanted = sum(operation.cost for operation in self._pending.inflight.values())
            self._pending.put_back()
            self.counters.write_errors += 1
            self._failures += 1
            if self.healthy:
                log.error("cold event=write_failed error=%s effect=%s", error, "entries stay in memory, retrying")
            self.healthy = False
            self._changed.notify_all()
        self._recover(wanted)
        pause_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2 ** min(self._failures - 1, 10))
        with self._changed:
            self._changed.wait_for(lambda: self._closing, pause_s)

    def _recover(self, wanted_nbytes: int) -> None:
        try:
            self._callbacks.make_room(wanted_nbytes)
        except (OSError, lmdb.Error) as again:
            log.debug("cold event=recovery_failed error=%s", again)

    def _commit(self, batch: dict[Key, Operation]) -> None:
        wanted = sum(operation.cost for operation in batch.values())
        if wanted:
            self._callbacks.make_room(wanted)
        self._price(batch)
        packed: dict[Key, tuple[Meta, int]] = {}
        refused: list[Key] = []
        # A generator: records are packed while earlier ones are written. The checksum takes a tenth of the disk's time.
        places = self._segments.append(self._pack(batch, packed, refused))
        with self._changed:
            put = {
                key: Row(place, head_nbytes, self.dirty.pop(key, _seq(batch[key])), meta)
                for (key, (meta, head_nbytes)), place in zip(packed.items(), places, strict=True)
            }
        remove = [key for key in batch if key not in put]
        try:
            freed = self._rows.write(put, remove)
        except lmdb.Error:
            self._freed += places
            with self._changed:
                self.dirty.update({key: row.seq for key, row in put.items() if key not in self.dirty})
            raise
        self._callbacks.wrote(sum(place_nbytes(place.nbytes) for place in places))
        self._free(freed, durable=any(operation.durable for operation in batch.values()))
        with self._changed:
            self.counters.commits += 1
            self.counters.records_written += len(put)
            self.counters.bytes_written += sum(place.nbytes for place in places)
            self.healthy = True  # before the waiters for this batch see the result
            self._pending.settle({key: cost_of(row.place.nbytes) for key, row in put.items()})
            self._changed.notify_all()
        for key in refused:
            self._callbacks.dropped(key, "write_failed")

    def _price(self, batch: dict[Key, Operation]) -> None:
        """What operations free that were queued while the index could not be read. Raises lmdb.Error: not yet."""
        for key in [key for key, operation in batch.items() if operation.frees is None]:
            row = self._rows.get(key)
            with self._changed:
                self._pending.price(key, cost_of(row.place.nbytes) if row is not None else 0)

    def _gather(self) -> None:
        if not self._gatherer.due(self._pending.used_nbytes):
            return
        step = self._gatherer.step()
        self._callbacks.wrote(step.nbytes)
        self.counters.records_moved += step.records
        self._free(step.freed, durable=False)

    def _pack(
        self, batch: dict[Key, Operation], packed: dict[Key, tuple[Meta, int]], refused: list[Key]
    ) -> Iterator[list[Buffer]]:
        """The records to write. Notes their Metas and head sizes, and keys whose entry can never be written.

        A put whose key the store has forgotten is in neither list.
        """
        for key, operation in batch.items():
            meta = self._callbacks.meta_of(key) if isinstance(operation, Put) else None
            if meta is None or isinstance(operation, Delete):
                continue
            try:
                record = pack(operation.entry, meta, seal=self._callbacks.seal_of(meta))
            except (KvstoreError, ValueError, TypeError) as error:
                log.warning("cold key=%s event=unwritable error=%s", key.hex(), error)
                refused.append(key)
                continue
            packed[key] = (meta, len(record.head))
            yield [record.head, *(part.data for part in record.data)]

    def _free(self, freed: list[Place], *, durable: bool) -> None:
        """Free the places that the previous transaction stopped naming: this commit's sync has made it durable."""
        before, self._freed = self._freed, freed
        self._segments.free(before)
        if durable:
            self._free_durably()

    def _free_durably(self) -> None:
        self._rows.sync()
        freed, self._freed = self._freed, []
        self._segments.free(freed)

    def _write_dirty_rows(self) -> None:
        with self._changed:
            dirty = {key: seq for key, seq in self.dirty.items() if self._pending.find(key) is None}
            for key in dirty:
                del self.dirty[key]
        keys = list(dirty)
        for start in range(0, len(keys), ROWS_PER_COMMIT):
            put = {}
            try:
                for key in keys[start : start + ROWS_PER_COMMIT]:
                    row, meta = self._rows.get(key), self._callbacks.meta_of(key)
                    if row is not None and meta is not None:
                        put[key] = Row(row.place, row.head_nbytes, dirty[key], meta)
                self._free(self._rows.write(put, []), durable=False)
            except lmdb.Error:
                with self._changed:
                    self.dirty = {**{key: dirty[key] for key in keys[start:]}, **self.dirty}
                raise

    def evict_now(self, keys: list[Key]) -> None:
        """Delete rows without pending operations and free their places at once. On the writer's thread only."""
        self._freed += self._rows.write({}, keys)
        self._free_durably()


def _seq(operation: Operation) -> int:
    return operation.seq if isinstance(operation, Put) else 0
