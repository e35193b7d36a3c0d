"""The life of records: found, read, appended, deleted, distrusted. Rows, segments, what is pending, and the writer.

A tier asks here by key and is told whatever happens to a record without being asked (`Holder`). It decides what may be
kept and what must leave; this decides when bytes are written, and whether the bytes that are read can be believed.
Invariants: bytes that fail a checksum are never returned; an appended entry is readable from that moment on, committed
or not; a ticket is done when no crash and no power cut can undo what it stands for.
Thread rule: `changed` is the lock of the log and of its tier. Methods take it themselves; those that say so are called
with it held. It is never held while records are read or written, nor while `meta_of` or `Holder.dropped` run.
RAM: none of its own by key; places, sizes and deadlines stay in LMDB (`rows`).
"""

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Protocol

import lmdb

from kvstore.disk import Bytes, Disk
from kvstore.disk.opening import Directory
from kvstore.disk.pending import Delete, Pending, Put
from kvstore.disk.reading import read_entry, read_record, read_specs
from kvstore.disk.recovery import Recovered, recover
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Segments
from kvstore.disk.writer import Callbacks, Counters, Writer, cost_of
from kvstore.entries.entry import Described, Entry
from kvstore.entries.record import record_nbytes
from kvstore.entries.sealing import Key as SealKey
from kvstore.entries.sealing import Seals
from kvstore.errors import RecordCorrupt, TierUnavailable, UnknownSeal
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import Owner
from kvstore.printable import printable

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""How long a durable call waits for the writer before it gives up: ten times the slowest commit seen."""
SEGMENTS_PER_TIER = 16
"""Holes give space back at once, so segments are only as short as gathering wants them: a new one costs 5 ms."""
SEGMENT_MIN_NBYTES, SEGMENT_MAX_NBYTES = 16 << 20, 1 << 30


class Holder(Protocol):
    """The tier that the records are kept for. `holds`, `forget` and `owner_of` are called with the lock held."""

    def holds(self, key: Key) -> bool:
        """Whether the tier holds the key."""
        ...

    def forget(self, key: Key) -> None:
        """Hold a key no longer: its record is damaged, or can never be written."""
        ...

    def owner_of(self, key: Key) -> Owner:
        """Whose a key is."""
        ...

    def dropped(self, key: Key, reason: str) -> None:
        """The tier holds a key no longer: "corrupt" or "write_failed"."""
        ...

    def make_room(self, nbytes: int) -> bool:
        """Evict until the file system has so many bytes to write. False: nothing is left to evict."""
        ...

    def may_gather(self, nbytes: int) -> bool:
        """Whether so many bytes may be written only to save room."""
        ...


class RecordLog:
    """Records of one directory. `start` begins to write; `close` ends it and lets the directory go.

    meta_of: the store's Meta of a key, asked when a record or a row is written; None: it is not written. count: told of
    every change of `used_nbytes`, and whose it is. wrote: told of bytes that went to the disk.
    """

    def __init__(
        self,
        directory: Directory,
        disk: Disk,
        capacity_nbytes: int,
        seals: Seals,
        holder: Holder,
        *,
        meta_of: Callable[[Key], Meta | None],
        count: Callable[[Owner, int], None],
        wrote: Callable[[int], None],
    ) -> None:
        self.changed = threading.Condition()
        self._directory = directory
        self._disk = disk
        self._seals = seals
        self._holder = holder
        # Sizes are the pending operations' to count: they alone know what is estimated and what is on disk.
        self._pending = Pending(count)
        self._seq = 0
        self._start = 0, 0
        self._told: set[int | None] = set()
        self._rows = Rows(directory.index, capacity_nbytes // 4)
        segment_nbytes = min(max(capacity_nbytes // SEGMENTS_PER_TIER, SEGMENT_MIN_NBYTES), SEGMENT_MAX_NBYTES)
        self._segments = Segments(directory.segments, disk, segment_nbytes)
        callbacks = Callbacks(meta_of, self._unwritable, holder.make_room, wrote, holder.may_gather, self._seal_of)
        self._writer = Writer(self._rows, self._segments, self._pending, self.changed, callbacks)

    def recover(self, now: float) -> Recovered:
        """What the rows name, without the expired and damaged ones, which are removed. Before `start`.

        Raises IndexDamaged if the check of the directory's index, which ended meanwhile, found damage.
        """
        try:
            found = recover(self._rows, now)
        except Exception:
            self._directory.finish_check()  # damage may be why
            raise
        self._directory.finish_check()
        self._seq = found.last_seq
        self._start = len(found.keys), len(found.gone) - found.damaged
        self._writer.dirty.update(found.clamped)
        self.counters.corrupt_total += found.damaged
        if found.gone:
            self._rows.write({}, found.gone)
            self._rows.sync()
        # Every page of the index is mapped now, 280 bytes a key; opened anew it has those that are asked for.
        self._rows.reopen()
        self._segments.recover(found.places)
        return found

    def abandon(self) -> None:
        """Let go of the files, and write nothing. Before `start`."""
        self._segments.close()
        self._rows.close()

    def recovered(self, used: Iterable[tuple[Owner, int]]) -> None:
        """Count what owners' records take, all of them on the disk since before this process."""
        for owner, nbytes in used:
            self._pending.recovered(owner, nbytes)

    def start(self) -> None:
        """Begin to write."""
        self._writer.start()

    # What is known of it.

    @property
    def used_nbytes(self) -> int:
        """Blocks of records and what their rows cost, the pending ones estimated."""
        return self._pending.used_nbytes

    @property
    def slack_nbytes(self) -> int:
        """Bytes that lie idle in shared blocks."""
        return self._segments.slack_nbytes

    @property
    def pending_nbytes(self) -> int:
        """Bytes of entries that wait for the writer."""
        return self._pending.buffered_nbytes

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded. While not, entries stay in memory and writing is tried again."""
        return self._writer.healthy

    @property
    def readable(self) -> bool:
        """Whether the index can be read; sizes of what is on disk are not known otherwise."""
        return self._rows.readable

    @property
    def writes(self) -> bool:
        """Whether pending operations will still be tried."""
        return self._writer.alive

    @property
    def counters(self) -> Counters:
        """What was done since the directory was opened."""
        return self._writer.counters

    def disk_nbytes(self) -> int:
        """Bytes the file system has given to segments and index."""
        return self._segments.disk_nbytes() + self._rows.disk_nbytes()

    @property
    def quarantined(self) -> str | None:
        """Why the directory was emptied when it was opened; None if it was not."""
        return self._directory.quarantined

    def room(self) -> tuple[int, int]:
        """Bytes the file system still has for us, and bytes it has in all. Raises OSError."""
        return self._disk.room(self._directory.path)

    def gauges(self) -> dict[str, float]:
        """Numbers by name for the store's stats."""
        return {f"cold_{name}": float(value) for name, value in asdict(self.counters).items()} | {
            "cold_healthy": float(self.healthy),
            "cold_pending_nbytes": float(self.pending_nbytes),
            "cold_disk_nbytes": float(self.disk_nbytes()),
            "cold_quarantined": float(self.quarantined is not None),
            "cold_clean_start": float(self._directory.clean),
            "cold_start_entries": float(self._start[0]),
            "cold_start_expired": float(self._start[1]),
        }

    # Reading.

    def get(self, key: Key, *, seen: bool = False) -> Entry | None:
        """The entry, in memory of its own. None: not here, or found corrupt and dropped, or unreadable just now.

        seen: the caller saw the tier hold the key and gives out what it held then; whether it still does is not asked.
        """
        row = None
        try:
            found = self._find(key, seen=seen)
            if not isinstance(found, Row):
                return found
            row = found
            return read_entry(self._segments, key, row, self._seals)
        except (RecordCorrupt, TierUnavailable, OSError) as error:
            return self._distrust(key, row, error)

    def specs_of(self, key: Key) -> dict[str, Described] | None:
        """The tensors' types, shapes and receipts; their values are neither read nor decoded. None as for `get`."""
        row = None
        try:
            found = self._find(key)
            if found is None:
                return None
            if isinstance(found, Entry):
                return {name: tensor.described for name, tensor in found.tensors.items()}
            row = found
            return read_specs(self._segments, key, row)
        except (RecordCorrupt, TierUnavailable, OSError) as error:
            self._distrust(key, row, error)
            return None

    def row_of(self, key: Key) -> Row | None:
        """The row that is valid now; None for a key that is not held, or waits to be written.

        Raises TierUnavailable where the index cannot be read.
        """
        with self.changed:
            there = self._pending.find(key) is None and self._holder.holds(key)
            return self._row(key) if there else None

    def raw(self, key: Key) -> tuple[Row, Bytes] | None:
        """A key's row and its record, whose checksums match; None: not here, or damaged and dropped, or unreadable.

        Of a key that is being put anew the record that is still on the disk. Raises TierUnavailable where the index
        cannot be read.
        """
        while True:
            with self.changed:
                gone = isinstance(self._pending.find(key), Delete) or not self._holder.holds(key)
                row = None if gone else self._row(key)
            if row is None:
                return None
            try:
                return row, read_record(self._segments, key, row)
            except (RecordCorrupt, OSError):
                now = self.row_of(key)
                if now is None or now.place == row.place:
                    self.get(key)  # damaged: it is dropped and counted there; or it left meanwhile
                    return None

    def _find(self, key: Key, *, seen: bool = False) -> Entry | Row | None:
        with self.changed:
            operation = self._pending.find(key)
            if isinstance(operation, Delete) or not (seen or self._holder.holds(key)):
                return None
            if isinstance(operation, Put):
                return operation.entry
            row = self._row(key)
        if row is None:
            raise RecordCorrupt("row is missing or damaged")
        return row

    def _row(self, key: Key) -> Row | None:
        """The row on disk; None: there is none, or it is damaged. Raises TierUnavailable: nobody can tell now."""
        try:
            return self._rows.get(key)
        except lmdb.Error as error:
            raise TierUnavailable(f"cold's index cannot be read now: {error}") from None

    def _committed_cost(self, key: Key) -> int | None:
        """Bytes counted for the record on disk; 0: there is none. None: nobody can tell now."""
        with suppress(TierUnavailable):
            return self._cost_on_disk(key)
        return None

    def _cost_on_disk(self, key: Key) -> int:
        row = self._row(key)
        return cost_of(row.place.nbytes) if row is not None else 0

    def _distrust(self, key: Key, row: Row | None, error: Exception) -> Entry | None:
        """A read failed. Either the record moved or left meanwhile (what is there now, then), or it is damaged.

        Only what was read and is not what was written is damage. An errno, whatever it is, says nothing of the record:
        it is a miss now, and its row stays.
        """
        with self.changed:
            operation = self._pending.find(key)
            if isinstance(operation, Put):
                return operation.entry
            if operation is not None or not self._holder.holds(key):
                return None
            try:
                now = self._row(key)
            except TierUnavailable as unreadable:
                now, error = None, unreadable
            moved = now is not None and row is not None and now.place != row.place
            if not moved and isinstance(error, UnknownSeal | TierUnavailable | OSError):
                self.counters.read_errors += 1
                self._tell_unreadable(key, error)
                return None
            if not moved:
                self.counters.corrupt_total += 1
                self._holder.forget(key)
                owner = self._holder.owner_of(key)
                self._pending.add(key, Delete(owner=owner), cost_of(now.place.nbytes) if now else 0)
                self.changed.notify_all()
        if moved:
            return self.get(key)
        log.error("cold key=%s event=corrupt error=%s", key.hex(), printable(error))
        self._holder.dropped(key, "corrupt")
        return None

    def _tell_unreadable(self, key: Key, error: Exception) -> None:
        """One line for each errno: a directory of files that cannot be read would fill the log."""
        if isinstance(error, OSError) and error.errno not in self._told:
            self._told.add(error.errno)
            log.error(
                "cold key=%s event=unreadable error=%s effect=%s",
                key.hex(), printable(error), "a miss, nothing is deleted; further ones are only counted",
            )  # fmt: skip

    # Sizes.

    def price(self, entry: Entry, meta: Meta | None) -> int:
        """What an entry will cost once it is written; a little more where compression will save something.

        Not `entry.nbytes`, which is what it takes in memory. Without the lock: see `record_nbytes`.
        """
        return cost_of(record_nbytes(entry, sealed=meta is not None and self._seal_of(meta) is not None))

    def cost(self, key: Key) -> int:
        """Bytes counted for a key; 0 when there is no record of it. With the lock held. Raises TierUnavailable."""
        operation = self._pending.find(key)
        return self._cost_on_disk(key) if operation is None else operation.cost

    def record_nbytes(self, key: Key) -> int | None:
        """Bytes of the record on disk of a key for which nothing is pending; None: none, or nobody can tell now.

        With the lock held.
        """
        with suppress(TierUnavailable):
            row = self._row(key) if self._pending.find(key) is None else None
            return None if row is None else row.place.nbytes
        return None

    # Changing. With the lock held.

    def append(self, entry: Entry, cost: int, *, owner: Owner, durable: bool) -> int:
        """Queue an entry to be written, in place of an older one of its key; its ticket."""
        self._seq += 1
        self._writer.dirty.pop(entry.key, None)
        put = Put(entry, self._seq, cost, durable=durable, owner=owner)
        ticket = self._pending.add(entry.key, put, self._committed_cost(entry.key))
        self.changed.notify_all()
        return ticket

    def delete(self, key: Key, *, durable: bool, owner: Owner) -> int | None:
        """Queue a deletion; its ticket, None when the disk never had the key."""
        if self._pending.cancel(key):
            self.changed.notify_all()
            return None
        waiting = self._pending.find(key)
        cost = self._committed_cost(key)
        if cost == 0 and waiting is None:
            return None
        if isinstance(waiting, Delete) and not durable:
            return waiting.ticket
        ticket = self._pending.add(key, Delete(durable=durable, owner=owner), cost)
        self.changed.notify_all()
        return ticket

    def touch(self, keys: Iterable[Key]) -> None:
        """Use of keys, in this order. Written down by the next `flush_rows`."""
        for key in keys:
            self._seq += 1
            self._writer.dirty[key] = self._seq

    def give_to(self, key: Key, owner: Owner) -> None:
        """Count a key's pending operation as this owner's from now on."""
        operation = self._pending.find(key)
        if operation is not None:
            operation.owner = owner

    def leaves(self, owner: Owner, record_nbytes: int) -> None:
        """A record will leave the disk by `evict_now`: count it out."""
        self._pending.let_go(owner, cost_of(record_nbytes))

    def ask_for_room(self) -> None:
        """Have the writer ask its tier for room when it comes to it."""
        self._writer.room_due = True
        self.changed.notify_all()

    def evict_now(self, keys: list[Key]) -> None:
        """Delete rows that nothing is pending for and free their places at once. On the writer's thread, unlocked."""
        self._writer.evict_now(keys)

    # Waiting.

    def wait_for_buffer(self, nbytes: int, limit_nbytes: int) -> None:
        """Return once an entry fits the write buffer; a larger one goes in alone. With the lock held.

        Raises TierUnavailable when the disk refuses writes, or the index cannot be read: what evicting would free is
        not known then.
        """
        if not self.readable:
            raise TierUnavailable("cold's index cannot be read now")

        def fits() -> bool:
            buffered = self.pending_nbytes
            return buffered == 0 or buffered + nbytes <= limit_nbytes

        self.changed.wait_for(lambda: fits() or not self.healthy or not self.writes, WAIT_S)
        if not fits():
            raise TierUnavailable(f"cold cannot be written now; {self.pending_nbytes} bytes of entries are waiting")

    def wait(self, ticket: int, timeout_s: float = WAIT_S) -> None:
        """Return once what a ticket stands for is committed. Raises TierUnavailable after `timeout_s` seconds."""

        def done() -> bool:
            return (self._pending.oldest() or ticket + 1) > ticket

        with self.changed:
            self.changed.wait_for(lambda: done() or not self.writes, timeout_s)
            if not done():
                raise TierUnavailable(f"cold could not write within {timeout_s} s; trying again")

    def flush(self, timeout_s: float = WAIT_S) -> None:
        """Return once everything pending now is committed. Raises TierUnavailable after `timeout_s` seconds."""
        with self.changed:
            self.wait(self._pending.last_ticket, timeout_s)

    def flush_rows(self, timeout_s: float = WAIT_S) -> None:
        """Write order and deadlines of everything touched since, in few transactions. Raises TierUnavailable."""
        with self.changed:
            if not self._writer.wait_rows(timeout_s):
                raise TierUnavailable(f"cold could not write order and deadlines within {timeout_s} s; trying again")

    def check_readers(self) -> None:
        """Free the slots of LMDB readers that died."""
        self._rows.check_readers()

    def close(self) -> None:
        """Write what is pending, order and deadlines, and let the directory go. A failing disk is only logged."""
        clean = True
        try:
            self.flush()
            self.flush_rows()
        except TierUnavailable as error:
            clean = False
            log.warning("cold path=%s event=unclean_close error=%s", self._directory.path, error)
        self._writer.stop()
        self._segments.close()
        self._rows.close()
        try:
            self._directory.write_state(clean=clean)
        except OSError as error:
            log.warning("cold path=%s event=unclean_close error=%s", self._directory.path, error)
        self._directory.release()

    # The writer's questions.

    def _seal_of(self, meta: Meta) -> SealKey | None:
        return self._seals.of_owner(meta.owner.tenant, meta.owner.namespace)

    def _unwritable(self, key: Key, reason: str) -> None:
        """An entry that can never be written: the writer found out."""
        with self.changed:
            if self._pending.find(key) is None:
                self._holder.forget(key)
        self._holder.dropped(key, reason)
