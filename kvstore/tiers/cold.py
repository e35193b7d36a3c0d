"""The cold tier: records on disk, found again after a restart. The last tier, so what it displaces is gone.

Invariants: bytes that fail a checksum are never returned; a key removed with `durable` is gone after kill -9 and after
a power cut; an entry accepted by `put` is readable from that moment on, committed or not, until the tier drops it and
says so through `on_drop(key, reason)` with reason "evicted", "corrupt" or "write_failed".
Thread rule: thread-safe by its own lock, which is never held while records are read or written and never while
`meta_of` or `on_drop` run; both may be called from any thread, the writer's included.
RAM: the keys in their order, about 200 bytes each; places, sizes and deadlines stay in LMDB (`disk.rows`).
Leaves out: time to live (the store sweeps), which entries deserve a place here (the store), what encodings mean.
"""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import lmdb

from kvstore.clock import Clock
from kvstore.config import ColdConfig
from kvstore.disk import Disk, SystemDisk
from kvstore.disk.occupancy import place_nbytes
from kvstore.disk.opening import Directory, take
from kvstore.disk.pending import Delete, Pending, Put
from kvstore.disk.reading import read_entry, read_specs
from kvstore.disk.recovery import Recovered, no_garbage_collection, recover
from kvstore.disk.rows import Row, Rows
from kvstore.disk.scrub import SCRUB_NBYTES, Scrubber, verify
from kvstore.disk.segments import Segments
from kvstore.disk.writer import ROW_NBYTES, Callbacks, Counters, Writer, cost_of
from kvstore.entries.entry import Described, Entry
from kvstore.entries.record import record_nbytes
from kvstore.entries.sealing import Key as SealKey
from kvstore.entries.sealing import Seals
from kvstore.errors import ConfigError, OverQuota, RecordCorrupt, TierUnavailable, UnknownSeal
from kvstore.hit import Verified
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner
from kvstore.printable import printable
from kvstore.tiers import TierName
from kvstore.tiers.admission import Admission
from kvstore.tiers.order import Order

log = logging.getLogger(__name__)

WAIT_S = 30.0
"""How long a durable call waits for the writer before it gives up: ten times the slowest commit seen."""
SEGMENTS_PER_TIER = 16
"""Holes give space back at once, so segments are only as short as gathering wants them: a new one costs 5 ms."""
SEGMENT_MIN_NBYTES, SEGMENT_MAX_NBYTES = 16 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class ColdStats:
    """The tier at one moment. healthy: the last write did not fail. disk_nbytes: given by the file system."""

    entries: int
    used_nbytes: int
    capacity_nbytes: int
    pending_nbytes: int
    disk_nbytes: int
    healthy: bool
    quarantined: str | None
    counters: Counters


class Cold:
    """Records under a directory. Make one with `Cold.open`."""

    name: TierName = "cold"

    def __init__(  # noqa: PLR0913 - `open` alone calls it
        self,
        directory: Directory,
        config: ColdConfig,
        clock: Clock,
        disk: Disk,
        seals: Seals,
        *,
        meta_of: Callable[[Key], Meta | None],
        on_drop: Callable[[Key, str], None],
        pin_max_fraction: float,
        order: Order | None = None,
    ) -> None:
        self.capacity_nbytes = config.capacity_nbytes
        self._directory = directory
        self._free_min_fraction = config.free_min_fraction
        self.admission = Admission(config.admission, config.write_nbytes_per_day, clock)
        self._buffer_nbytes = config.write_buffer_nbytes
        self._clock = clock
        self._disk = disk
        self._meta_of = meta_of
        self._seals = seals
        self._on_drop = on_drop
        self._changed = threading.Condition()
        # Sizes are the pending operations' to count: they alone know what is estimated and what is on disk.
        self._order = Order(tier="cold") if order is None else order
        self._pending = Pending(self._order.count)
        self._pinned: dict[Key, int] = {}
        self._pin_max_nbytes = int(config.capacity_nbytes * pin_max_fraction)
        self._seq = 0
        self._recovered = Recovered()
        self._scrubber = Scrubber(self)
        self._rows = Rows(directory.index, config.capacity_nbytes // 4)
        segment_nbytes = min(max(config.capacity_nbytes // SEGMENTS_PER_TIER, SEGMENT_MIN_NBYTES), SEGMENT_MAX_NBYTES)
        self._segments = Segments(directory.segments, disk, segment_nbytes)
        callbacks = Callbacks(
            meta_of, self._drop, self._make_room, self.admission.wrote, self._may_gather, self._seal_of
        )
        self._writer = Writer(self._rows, self._segments, self._pending, self._changed, callbacks)

    @classmethod
    def open(  # noqa: PLR0913 - the store passes what the tier must ask it
        cls,
        path: Path,
        config: ColdConfig,
        clock: Clock,
        *,
        meta_of: Callable[[Key], Meta | None],
        on_drop: Callable[[Key, str], None],
        pin_max_fraction: float = 0.5,
        disk: Disk | None = None,
        order: Order | None = None,
        owner_of: Callable[[Key, Meta], Owner] = lambda _key, _meta: NOBODY,
    ) -> "Cold":
        """Take a directory into use, as `disk.opening` says; then ask `recovered` for what it holds.

        meta_of: the store's Meta of a key, asked when a record or a row is written; None: the store forgot the key and
        nothing is written. on_drop: told when an entry leaves by itself. order: who leaves next, without chains.
        owner_of: whose a recovered key is. Raises ConfigError.
        """
        seals = Seals(config.key_files)
        directory = take(path)
        try:
            cold = cls(
                directory, config, clock, disk or SystemDisk(), seals,
                meta_of=meta_of, on_drop=on_drop, pin_max_fraction=pin_max_fraction, order=order,
            )  # fmt: skip
            with no_garbage_collection():
                cold._recover(owner_of)
        except (OSError, lmdb.Error) as error:
            directory.release()
            raise ConfigError(f"cold.path {path} cannot be used: {error}") from None
        cold._writer.start()
        return cold

    def _recover(self, owner_of: Callable[[Key, Meta], Owner]) -> None:
        """Order, pins and used bytes from the rows; expired and damaged ones are removed."""
        found = recover(self._rows, self._clock.now())
        used: dict[Owner, int] = {}
        for key, meta, nbytes in zip(found.keys, found.metas, found.nbytes, strict=True):
            owner = meta.owner = owner_of(key, meta)
            used[owner] = used.get(owner, 0) + nbytes + ROW_NBYTES
            if meta.pinned:
                self._pinned[key] = cost_of(nbytes)
            else:
                self._order.track(key, owner=owner)
        for owner, nbytes in used.items():
            self._pending.recovered(owner, nbytes)
        self._seq = found.last_seq
        self._writer.dirty.update(found.clamped)
        self._recovered = found
        self._writer.counters.corrupt_total += found.damaged
        if found.gone:
            self._rows.write({}, found.gone)
            self._rows.sync()
        # Every page of the index is mapped now, 280 bytes a key; opened anew it has those that are asked for.
        self._rows.reopen()
        self._segments.recover(found.places)

    def recovered(self) -> Recovered:
        """What was found at opening, least recently used first: once, then nothing. Values were not read."""
        found, self._recovered = self._recovered, Recovered()
        return found

    @property
    def used_nbytes(self) -> int:
        """Blocks of records and what their rows cost, the pending ones estimated."""
        return self._pending.used_nbytes

    @property
    def pending_nbytes(self) -> int:
        """Bytes of entries that wait for the writer."""
        return self._pending.buffered_nbytes

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded. While not, entries stay in memory and writing is tried again."""
        return self._writer.healthy

    @property
    def corrupt_total(self) -> int:
        """Records found damaged since the tier was opened."""
        return self._writer.counters.corrupt_total

    def verify(self) -> Iterator[Verified]:
        """Check every record while serving."""
        return verify(self)

    def gauges(self) -> dict[str, float]:
        """Numbers by name for the store's stats."""
        counters = {f"cold_{name}": float(value) for name, value in asdict(self._writer.counters).items()}
        return counters | {
            "cold_healthy": float(self.healthy),
            "cold_pending_nbytes": float(self.pending_nbytes),
            "cold_disk_nbytes": float(self.disk_nbytes()),
            "cold_refusals": float(self.admission.refusals),
            "cold_write_left_nbytes": self.admission.left_nbytes,
            "cold_quarantined": float(self._directory.quarantined is not None),
        }

    def stats(self) -> ColdStats:
        """Counters and gauges."""
        return ColdStats(
            len(self), self.used_nbytes, self.capacity_nbytes, self.pending_nbytes, self.disk_nbytes(), self.healthy,
            self._directory.quarantined, self._writer.counters,
        )  # fmt: skip

    def disk_nbytes(self) -> int:
        """Bytes the file system has given to segments and index."""
        return self._segments.disk_nbytes() + self._rows.disk_nbytes()

    def __len__(self) -> int:
        with self._changed:
            return len(self._order) + len(self._pinned)

    def __contains__(self, key: object) -> bool:
        with self._changed:
            return key in self._pinned or key in self._order

    def keys(self) -> Iterator[Key]:
        """Keys as of now: the pinned ones, then least recently used first."""
        with self._changed:
            return iter([*self._pinned, *self._order])

    def get(self, key: Key) -> Entry | None:
        """The entry, in memory of its own. None: not here, or found corrupt and dropped, or unreadable just now."""
        found = self._find(key)
        return self._read(key, found) if isinstance(found, Row) else found

    def specs_of(self, key: Key) -> dict[str, Described] | None:
        """The tensors' types, shapes and receipts; their values are neither read nor decoded. None as for `get`."""
        found = self._find(key)
        if found is None:
            return None
        if isinstance(found, Entry):
            return {name: tensor.described for name, tensor in found.tensors.items()}
        try:
            return read_specs(self._segments, key, found)
        except (RecordCorrupt, TierUnavailable, OSError) as error:
            self._distrust(key, found, error)
            return None

    def _find(self, key: Key) -> Entry | Row | None:
        with self._changed:
            operation = self._pending.find(key)
            if isinstance(operation, Delete) or not (key in self._order or key in self._pinned):
                return None
            if isinstance(operation, Put):
                return operation.entry
            row = self._rows.get(key)
        if row is None:
            self._distrust(key, None, RecordCorrupt("row is missing or damaged"))
        return row

    def _read(self, key: Key, row: Row) -> Entry | None:
        try:
            return read_entry(self._segments, key, row, self._seals)
        except (RecordCorrupt, TierUnavailable, OSError) as error:
            return self._distrust(key, row, error)

    def _seal_of(self, meta: Meta) -> SealKey | None:
        owner = meta.owner
        model = owner.namespace.rpartition("@")[0]
        return self._seals.sealing((owner.name, owner.namespace, model, owner.tenant))

    def _distrust(self, key: Key, row: Row | None, error: Exception) -> Entry | None:
        """A read failed. Either the record moved or left meanwhile (what is there now, then), or it is damaged."""
        with self._changed:
            operation = self._pending.find(key)
            now = self._rows.get(key)
            moved = now is not None and row is not None and now.place != row.place
            if isinstance(operation, Delete):
                return None
            if isinstance(operation, Put):
                return operation.entry
            if isinstance(error, UnknownSeal | TierUnavailable) or (
                isinstance(error, OSError) and error.errno in _TRANSIENT
            ):
                self._writer.counters.read_errors += 1
                return None
            if key not in self._order and key not in self._pinned:
                return None
            if not moved:
                self._writer.counters.corrupt_total += 1
                self._forget(key)
                owner = self._order.owner_of(key)
                self._pending.add(key, Delete(owner=owner), cost_of(now.place.nbytes) if now else 0)
                self._changed.notify_all()
        if moved:
            return self.get(key)
        log.error("cold key=%s event=corrupt error=%s", key.hex(), printable(error))
        self._on_drop(key, "corrupt")
        return None

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key against the budget; 0 when it is not here."""
        with self._changed:
            return self._cost(key)

    def _cost(self, key: Key) -> int:
        operation = self._pending.find(key)
        if operation is not None:
            return operation.cost
        row = self._rows.get(key)
        return cost_of(row.place.nbytes) if row is not None else 0

    def _price(self, entry: Entry, meta: Meta | None) -> int:
        """What an entry will cost once it is written; a little more where compression will save something.

        Not `entry.nbytes`, which is what it takes in memory. Without the lock: see `record_nbytes`.
        """
        return cost_of(record_nbytes(entry, sealed=meta is not None and self._seal_of(meta) is not None))

    def displace(self, entry: Entry) -> None:
        """Make room for an entry: in the write buffer by waiting, in the budget and its owner's quotas by evicting.

        There is no tier below, so nothing is ever handed back: each evicted key goes to on_drop(key, "evicted").
        Call it without a lock that `on_drop` takes. Raises OverQuota when pinned entries or a quota leave no room, and
        TierUnavailable when the buffer is full and the disk refuses writes.
        """
        cost = self._price(entry, self._meta_of(entry.key))
        with self._changed:
            self._wait_for_buffer(entry.nbytes)
            # What lies idle in shared blocks counts against the budget too, or the files would outgrow it.
            owner, slack = self._order.owner_of(entry.key), self._segments.slack_nbytes

            def fits(besides: int) -> bool:
                return self.used_nbytes + cost + besides <= self.capacity_nbytes and self._order.within_quota(
                    owner, cost
                )

            evicted = self._evict(lambda: not fits(slack), owner, cost) if self._order.admits(owner, cost) else []
            full = not fits(0)
            pinned_nbytes = sum(self._pinned.values()) if full else 0
        for victim in evicted:
            self._on_drop(victim, "evicted")
        if full:
            raise OverQuota(
                f"{cost} bytes do not fit the cold tier: {pinned_nbytes} of its "
                f"{self.capacity_nbytes} bytes are pinned, or the quota of {owner.name!r} is too small; "
                "unpin something or enlarge the tier or the quota"
            )

    def _wait_for_buffer(self, nbytes: int) -> None:
        """Backpressure: the caller slows down to the disk. An entry larger than the buffer goes in alone."""

        def fits() -> bool:
            buffered = self.pending_nbytes
            return buffered == 0 or buffered + nbytes <= self._buffer_nbytes

        self._changed.wait_for(lambda: fits() or not self.healthy or not self._writer.alive, WAIT_S)
        if not fits():
            raise TierUnavailable(f"cold cannot be written now; {self.pending_nbytes} bytes of entries are waiting")

    def _evict(self, too_full: Callable[[], bool], owner: Owner, nbytes: int) -> list[Key]:
        evicted: list[Key] = []
        while too_full() and (victim := self._order.victim(owner, nbytes)) is not None:
            self._delete(victim, durable=False)
            self._writer.counters.evictions += 1
            self.admission.left(victim)
            evicted.append(victim)
        return evicted

    def put(self, entry: Entry, *, durable: bool = False) -> None:
        """Hold an entry as the most recently used; displace first. It is written behind: `flush` waits for that.

        durable: return once the entry survives a power cut. Never waits otherwise.
        """
        meta = self._meta_of(entry.key)
        cost = self._price(entry, meta)
        with self._changed:
            self._seq += 1
            row = self._rows.get(entry.key)
            owner = self._order.owner_of(entry.key)
            put = Put(entry, self._seq, cost, durable=durable, owner=owner)
            self._writer.dirty.pop(entry.key, None)
            ticket = self._pending.add(entry.key, put, cost_of(row.place.nbytes) if row else 0)
            self._forget(entry.key)
            if meta is not None and meta.pinned:
                self._pinned[entry.key] = put.cost
            else:
                self._order.track(entry.key, owner=owner)
            self._changed.notify_all()
            if durable:
                self._wait_for(ticket, WAIT_S)

    def touch(self, keys: Collection[Key]) -> None:
        """Count as use, in the order given. Written down by the next `flush_meta`."""
        with self._changed:
            held = self._order.touch(keys)
            if self._pinned:
                held += filter(self._pinned.__contains__, keys)
            for key in held:
                self._seq += 1
                self._writer.dirty[key] = self._seq

    def pin(self, key: Key) -> None:
        """Keep a key out of eviction. Not here: nothing happens. Raises OverQuota over the tier's share for pins."""
        cost = self.nbytes_of(key)
        with self._changed:
            if key in self._order:
                pinned_nbytes = sum(self._pinned.values()) + cost
                if pinned_nbytes > self._pin_max_nbytes:
                    raise OverQuota(
                        f"pinning {cost} bytes would make {pinned_nbytes} pinned bytes in the cold tier, "
                        f"the limit is {self._pin_max_nbytes} (pin_max_fraction); unpin something"
                    )
                self._order.forget(key)
                self._pinned[key] = cost
        self.touch([key])

    def unpin(self, key: Key) -> None:
        """Let a key be evicted again, as the most recently used."""
        with self._changed:
            if self._pinned.pop(key, None) is not None:
                self._order.track(key)
        self.touch([key])

    def remove(self, key: Key) -> bool:
        """Forget a key. True: it was here. The record goes a little later, so that a crash could bring it back."""
        with self._changed:
            here = key in self._order or key in self._pinned
            self._delete(key, durable=True)
        return here

    def queue_removal(self, key: Key) -> int | None:
        """Forget a key; a ticket to `wait` for until no crash or power cut can bring it back. None: nothing is due."""
        with self._changed:
            return self._delete(key, durable=True)

    def wait(self, ticket: int | None) -> None:
        """Return once what a ticket stands for is committed: outside any lock that `on_drop` takes.

        Raises TierUnavailable after 30 s: the key is gone from this process and its deletion is tried again, but a
        crash could bring it back.
        """
        if ticket is not None:
            with self._changed:
                self._wait_for(ticket, WAIT_S)

    def _delete(self, key: Key, *, durable: bool) -> int | None:
        """Queue a deletion; its ticket, None when the disk never had the key."""
        self._forget(key)
        if self._pending.cancel(key):
            self._changed.notify_all()
            return None
        waiting = self._pending.find(key)
        row = self._rows.get(key)
        if row is None and waiting is None:
            return None
        if isinstance(waiting, Delete) and not durable:
            return waiting.ticket
        delete = Delete(durable=durable, owner=self._order.owner_of(key))
        ticket = self._pending.add(key, delete, cost_of(row.place.nbytes) if row else 0)
        self._changed.notify_all()
        return ticket

    def _forget(self, key: Key) -> None:
        self._order.forget(key)
        self._pinned.pop(key, None)

    def let_go(self, concerns: Callable[[Key], bool]) -> list[tuple[Key, bool]]:
        """Take keys out of the order, not out of the tier: their owner is about to change. Returns whether pinned."""
        with self._changed:
            found = [key for key in self._order if concerns(key)]
            pinned = [key for key in self._pinned if concerns(key)]
            for key in (*found, *pinned):
                self._order.count(self._order.owner_of(key), -self._cost(key))
                self._order.forget(key)
            return [*((key, False) for key in found), *((key, True) for key in pinned)]

    def take_back(self, keys: Iterable[tuple[Key, bool]]) -> None:
        """Order again what `let_go` returned, under the owner each key has now."""
        with self._changed:
            for key, pinned in keys:
                owner = self._order.owner_of(key)
                self._order.count(owner, self._cost(key))
                operation = self._pending.find(key)
                if operation is not None:
                    operation.owner = owner
                if not pinned:
                    self._order.track(key, owner=owner)

    def tenants(self) -> dict[str, int]:
        """Bytes held by tenant."""
        with self._changed:
            return self._order.used()

    def flush(self, timeout_s: float = WAIT_S) -> None:
        """Return once everything pending now is committed. Raises TierUnavailable after `timeout_s` seconds."""
        with self._changed:
            self._wait_for(self._pending.last_ticket, timeout_s)

    def _wait_for(self, ticket: int, timeout_s: float) -> None:
        def done() -> bool:
            return (self._pending.oldest() or ticket + 1) > ticket

        self._changed.wait_for(lambda: done() or not self._writer.alive, timeout_s)
        if not done():
            raise TierUnavailable(f"cold could not write within {timeout_s} s; trying again")

    def flush_meta(self, timeout_s: float = WAIT_S) -> None:
        """Write order and deadlines of everything touched since, in few transactions. Raises TierUnavailable."""
        with self._changed:
            if not self._writer.wait_rows(timeout_s):
                raise TierUnavailable(f"cold could not write order and deadlines within {timeout_s} s; trying again")

    def maintain(self) -> None:
        """What the maintainer calls now and then: room on the disk, slots of readers that died, a little scrubbing."""
        self._rows.check_readers()
        with self._changed:
            self._writer.room_due = True
            self._changed.notify_all()
        self._scrubber.turn(SCRUB_NBYTES)

    def _drop(self, key: Key, reason: str) -> None:
        """An entry that can never be written: the writer found out."""
        with self._changed:
            if self._pending.find(key) is None:
                self._forget(key)
        self._on_drop(key, reason)

    def _make_room(self, nbytes: int) -> bool:
        """The writer asks, before it writes so many bytes and after it failed to: evict until the disk has them."""
        free, total = self._disk.room(self._directory.path)
        missing = nbytes + int(total * self._free_min_fraction) - free
        if missing <= 0:
            return True
        victims: list[Key] = []
        with self._changed:
            for key in self._order:
                row = self._rows.get(key) if self._pending.find(key) is None else None
                if row is None:
                    continue
                victims.append(key)
                missing -= place_nbytes(row.place.nbytes)
                self._pending.let_go(self._order.owner_of(key), cost_of(row.place.nbytes))
                if missing <= 0:
                    break
            for key in victims:
                self._forget(key)
            self._writer.counters.evictions += len(victims)
        log.warning("cold event=disk_full evicted=%s", len(victims))
        # Should this fail, the rows stay until the next start finds them: space is lost for a while, nothing else.
        self._writer.evict_now(victims)
        for key in victims:
            self._on_drop(key, "evicted")
        return missing <= 0

    def _may_gather(self, nbytes: int) -> bool:
        """Whether so many bytes may be written only to save room: not above the write budget, not on a full disk."""
        try:
            free, total = self._disk.room(self._directory.path)
        except OSError:
            return False
        return not self.admission.exhausted and free - nbytes > total * self._free_min_fraction

    def close(self) -> None:
        """Write what is pending, order and deadlines, and let the directory go. A failing disk is only logged."""
        clean = True
        try:
            self.flush()
            self.flush_meta()
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


_TRANSIENT = frozenset({11, 12, 23, 24})
"""EAGAIN, ENOMEM, ENFILE, EMFILE: say nothing about the record."""
