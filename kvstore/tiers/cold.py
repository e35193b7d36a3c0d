"""The cold tier: records on disk, found again after a restart. The last tier, so what it displaces is gone.

This is the tier: which keys are held, in which order they leave, what is pinned, whether there is room. What becomes of
their records is `disk.record_log`.
Invariants: bytes that fail a checksum are never returned; a key removed with `durable` is gone after kill -9 and after
a power cut; an entry accepted by `put` is readable from that moment on, committed or not, until the tier drops it and
says so through `on_drop(key, reason)` with reason "evicted", "corrupt" or "write_failed".
Thread rule: thread-safe by one lock, the log's, which is never held while records are read or written and never while
`meta_of` or `on_drop` run; both may be called from any thread, the writer's included.
RAM: the keys in their order, about 200 bytes each.
Leaves out: time to live (the store sweeps), which entries deserve a place here (the store), what encodings mean.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np

from kvstore.clock import Clock
from kvstore.config import ColdConfig
from kvstore.disk import Bytes, Disk, SystemDisk
from kvstore.disk.occupancy import place_nbytes, places_nbytes
from kvstore.disk.opening import Directory, IndexDamaged, start_empty, take
from kvstore.disk.record_log import WAIT_S, RecordLog
from kvstore.disk.recovery import Recovered, no_garbage_collection
from kvstore.disk.rows import Row
from kvstore.disk.scrub import SCRUB_NBYTES, Scrubber, verify
from kvstore.disk.writer import ROW_NBYTES, Counters
from kvstore.entries.entry import Described, Entry
from kvstore.entries.sealing import Seals
from kvstore.errors import ConfigError, OverQuota
from kvstore.hit import Verified
from kvstore.keys import Key
from kvstore.metadata.index import Column
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import NOBODY, Owner, labelled
from kvstore.metadata.slices import SLICE, pause
from kvstore.tiers import TierName
from kvstore.tiers.admission import Admission
from kvstore.tiers.order import Order
from kvstore.tiers.pinned import Pinned

log = logging.getLogger(__name__)

OwnersOf = Callable[[Sequence[Key], Sequence[str], Column], tuple[Sequence[Owner], Column]]
"""Keys, the namespaces that occur, which one each key was put under: the owners that occur, which one each key has."""
EVICTIONS_MAX = 128
"""In one hold of the lock, some 20 us each: a large entry may take the place of a hundred thousand small ones."""


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


def owners_by_name(keys: Sequence[Key], names: Sequence[str], of: Column) -> tuple[Sequence[Owner], Column]:
    """Owners for a directory without a store: a record knows no more than a namespace's name."""
    del keys
    return [labelled(name) for name in names], of


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
        self._free_min_fraction = config.free_min_fraction
        self.admission = Admission(config.admission, config.write_nbytes_per_day, clock)
        self._buffer_nbytes = config.write_buffer_nbytes
        self._clock = clock
        self._meta_of = meta_of
        self._on_drop = on_drop
        self._order = Order(tier="cold") if order is None else order
        self._pinned = Pinned(int(config.capacity_nbytes * pin_max_fraction), "cold", self._order.tenants)
        self._recovered = Recovered()
        self._scrubber = Scrubber(self)
        self._records = RecordLog(
            directory, disk, config.capacity_nbytes, seals, self,
            meta_of=meta_of, count=self._order.count, wrote=self.admission.wrote,
        )  # fmt: skip
        self._changed = self._records.changed
        self.get = self._records.get

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
        owners_of: OwnersOf = owners_by_name,
    ) -> "Cold":
        """Take a directory into use, as `disk.opening` says; then ask `recovered` for what it holds.

        meta_of: the store's Meta of a key, asked when a record or a row is written; None: the store forgot the key and
        nothing is written. on_drop: told when an entry leaves by itself. order: who leaves next, without chains.
        owners_of: whose the recovered keys are. Raises ConfigError.
        """
        seals = Seals(config.key_files)
        directory = take(path, meanwhile=True)
        try:
            while True:
                cold = cls(
                    directory, config, clock, disk or SystemDisk(), seals,
                    meta_of=meta_of, on_drop=on_drop, pin_max_fraction=pin_max_fraction, order=order,
                )  # fmt: skip
                try:
                    with no_garbage_collection():
                        cold._recover(owners_of)
                    break
                except IndexDamaged as damage:
                    cold._records.abandon()
                    start_empty(directory, str(damage))
        except (OSError, lmdb.Error) as error:
            directory.release()
            raise ConfigError(f"cold.path {path} cannot be used: {error}") from None
        except BaseException:
            directory.release()
            raise
        cold._records.start()
        return cold

    def _recover(self, owners_of: OwnersOf) -> None:
        """Order, pins and used bytes from the rows; expired and damaged ones are removed."""
        found = self._recovered = self._records.recover(self._clock.now())
        owners, owner = owners_of(found.keys, found.namespaces, found.namespace)
        found.resting.owners, found.resting.table["owner"] = owners, owner
        nbytes = places_nbytes(found.places[:, 2]) + ROW_NBYTES
        pinned = found.resting.table["pinned"]
        free = found.order[~pinned[found.order]]
        self._order.recover(found.keys, free, owners, owner)
        for row in np.flatnonzero(pinned).tolist():
            self._pinned.hold(found.keys[row], int(nbytes[row]), owners[owner[row]].tenant)
        used = np.bincount(owner, nbytes, len(owners)).astype(np.int64)
        self._records.recovered(zip(owners, used.tolist(), strict=True))

    def recovered(self) -> Recovered:
        """What was found at opening, least recently used first: once, then nothing. Values were not read."""
        found, self._recovered = self._recovered, Recovered()
        return found

    @property
    def used_nbytes(self) -> int:
        """Blocks of records and what their rows cost, the pending ones estimated."""
        return self._records.used_nbytes

    @property
    def pending_nbytes(self) -> int:
        """Bytes of entries that wait for the writer."""
        return self._records.pending_nbytes

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded. While not, entries stay in memory and writing is tried again."""
        return self._records.healthy

    @property
    def corrupt_total(self) -> int:
        """Records found damaged since the tier was opened."""
        return self._records.counters.corrupt_total

    def verify(self) -> Iterator[Verified]:
        """Check every record while serving."""
        return verify(self)

    @property
    def unreadable_total(self) -> int:
        """Records found damaged, or not readable, since the tier was opened."""
        return self._records.counters.corrupt_total + self._records.counters.read_errors

    def row_of(self, key: Key) -> Row | None:
        """The row that is valid now; None for a key that is not held, or waits to be written."""
        return self._records.row_of(key)

    def raw(self, key: Key) -> tuple[Row, Bytes] | None:
        """A key's row and its record as it is on the disk; None: it left, or cannot be read."""
        return self._records.raw(key)

    def gauges(self) -> dict[str, float]:
        """Numbers by name for the store's stats."""
        return self._records.gauges() | {
            "cold_refusals": float(self.admission.refusals),
            "cold_write_left_nbytes": self.admission.shown_nbytes,
        }

    def stats(self) -> ColdStats:
        """Counters and gauges."""
        return ColdStats(
            len(self), self.used_nbytes, self.capacity_nbytes, self.pending_nbytes, self.disk_nbytes(), self.healthy,
            self._records.quarantined, self._records.counters,
        )  # fmt: skip

    def disk_nbytes(self) -> int:
        """Bytes the file system has given to segments and index."""
        return self._records.disk_nbytes()

    def __len__(self) -> int:
        with self._changed:
            return len(self._order) + len(self._pinned)

    def __contains__(self, key: object) -> bool:
        with self._changed:
            return self.holds(key)

    def holds(self, key: object) -> bool:
        """Whether the tier holds a key. With the lock held."""
        return self._order.tracks(key) or key in self._pinned

    def owner_of(self, key: Key) -> Owner:
        """Whose a key is."""
        return self._order.owner_of(key)

    def keys(self) -> Iterator[Key]:
        """Keys as of now: the pinned ones, then least recently used first."""
        return iter([*self._pinned.keys_now(), *self._order.keys_now()])

    def specs_of(self, key: Key) -> dict[str, Described] | None:
        """The tensors' types, shapes and receipts; their values are neither read nor decoded. None as for `get`."""
        return self._records.specs_of(key)

    def nbytes_of(self, key: Key) -> int:
        """Bytes counted for a key against the budget; 0 when it is not here."""
        with self._changed:
            return self._records.cost(key)

    def displace(self, entry: Entry) -> None:
        """Make room for an entry: in the write buffer by waiting, in the budget and its owner's quotas by evicting.

        There is no tier below, so nothing is ever handed back: each evicted key goes to on_drop(key, "evicted").
        Call it without a lock that `on_drop` takes. Raises OverQuota when pinned entries or a quota leave no room, and
        TierUnavailable when the buffer is full and the disk refuses writes.
        """
        cost = self._records.price(entry, self._meta_of(entry.key))
        while not self._displace_some(entry, cost):
            pause()

    def _displace_some(self, entry: Entry, cost: int) -> bool:
        """Evict a few; False: more have to go."""
        with self._changed:
            self._records.wait_for_buffer(entry.nbytes, self._buffer_nbytes)
            # What lies idle in shared blocks counts against the budget too, or the files would outgrow it.
            owner, slack = self._order.owner_of(entry.key), self._records.slack_nbytes

            def fits(besides: int) -> bool:
                return self.used_nbytes + cost + besides <= self.capacity_nbytes and self._order.within_quota(
                    owner, cost
                )

            evicted = self._evict(lambda: not fits(slack), owner, cost) if self._order.admits(owner, cost) else []
            full = not fits(0)
            pinned_nbytes = self._pinned.nbytes
        for victim in evicted:
            self._on_drop(victim, "evicted")
        if full and len(evicted) == EVICTIONS_MAX:
            return False
        if full:
            raise OverQuota(
                f"{cost} bytes do not fit the cold tier: {pinned_nbytes} of its "
                f"{self.capacity_nbytes} bytes are pinned, or the quota of {owner.name!r} is too small; "
                "unpin something or enlarge the tier or the quota"
            )
        return True

    def resize(self, nbytes: int, pin_max_nbytes: int) -> int:
        """Another budget, and another limit of pins: what no longer fits is evicted. Returns how many entries.

        Call it without a lock that `on_drop` takes. Pinned entries stay.
        """
        with self._changed:
            self.capacity_nbytes = nbytes
            self._pinned.limit_nbytes = pin_max_nbytes
        count = 0
        while True:
            with self._changed:
                evicted = self._evict(lambda: self.used_nbytes > self.capacity_nbytes, NOBODY, 0)
            for victim in evicted:
                self._on_drop(victim, "evicted")
            count += len(evicted)
            if len(evicted) < EVICTIONS_MAX:
                return count
            pause()

    def _evict(self, too_full: Callable[[], bool], owner: Owner, nbytes: int) -> list[Key]:
        evicted: list[Key] = []
        while len(evicted) < EVICTIONS_MAX and self._records.readable and too_full():
            victim = self._order.victim(owner, nbytes)
            if victim is None:
                break
            self._delete(victim, durable=False)
            self._records.counters.evictions += 1
            self.admission.left(victim)
            evicted.append(victim)
        return evicted

    def put(self, entry: Entry, *, durable: bool = False) -> None:
        """Hold an entry as the most recently used; displace first. It is written behind: `flush` waits for that.

        durable: return once the entry survives a power cut. Never waits otherwise.
        """
        meta = self._meta_of(entry.key)
        cost = self._records.price(entry, meta)
        with self._changed:
            owner = self._order.owner_of(entry.key)
            ticket = self._records.append(entry, cost, owner=owner, durable=durable)
            self.forget(entry.key)
            if meta is not None and meta.pinned:
                self._pinned.hold(entry.key, cost, owner.tenant)
            else:
                self._order.track(entry.key, owner=owner)
            if durable:
                self._records.wait(ticket)

    def touch(self, keys: Collection[Key]) -> None:
        """Count as use, in the order given. Written down by the next `flush_meta`."""
        with self._changed:
            held = self._order.touch(keys)
            if self._pinned.nbytes:
                held += filter(self._pinned.__contains__, keys)
            if held:
                self._records.touch(held)

    def pin(self, key: Key) -> None:
        """Keep a key out of eviction. Not here: nothing happens. Raises OverQuota over the tier's share for pins."""
        cost = self.nbytes_of(key)
        with self._changed:
            if key in self._order:
                tenant = self._order.owner_of(key).tenant
                self._pinned.check(cost, tenant)
                self._order.forget(key)
                self._pinned.hold(key, cost, tenant)
        self.touch([key])

    def unpin(self, key: Key) -> None:
        """Let a key be evicted again, as the most recently used."""
        with self._changed:
            if self._pinned.release(key):
                self._order.track(key)
        self.touch([key])

    def remove(self, key: Key) -> bool:
        """Forget a key. True: it was here. The record goes a little later, so that a crash could bring it back."""
        with self._changed:
            here = self.holds(key)
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
            self._records.wait(ticket)

    def _delete(self, key: Key, *, durable: bool) -> int | None:
        """Queue a deletion; its ticket, None when the disk never had the key."""
        self.forget(key)
        return self._records.delete(key, durable=durable, owner=self._order.owner_of(key))

    def forget(self, key: Key) -> None:
        """Hold a key no longer. With the lock held; the record is the caller's."""
        self._order.forget(key)
        self._pinned.release(key)

    def let_go(self, keys: Iterable[Key]) -> list[tuple[Key, bool, int]]:
        """Take keys out of the order, not out of the tier: their owner changes. Returns (key, if pinned, bytes).

        Raises TierUnavailable where the index cannot be read; all of them stay then.
        """
        with self._changed:
            found = [(key, key in self._pinned, self._records.cost(key)) for key in keys if self.holds(key)]
            for key, _, cost in found:
                self._order.count(self._order.owner_of(key), -cost)
                self._order.forget(key)
            return found

    def take_back(self, keys: Iterable[tuple[Key, bool, int]]) -> None:
        """Order again what `let_go` returned, under the owner each key has now."""
        with self._changed:
            for key, pinned, cost in keys:
                owner = self._order.owner_of(key)
                self._order.count(owner, cost)
                self._records.give_to(key, owner)
                if not pinned:
                    self._order.track(key, owner=owner)
                else:
                    self._pinned.hold(key, cost, owner.tenant)

    def tenants(self) -> dict[str, int]:
        """Bytes held by tenant."""
        with self._changed:
            return self._order.used()

    def flush(self, timeout_s: float = WAIT_S) -> None:
        """Return once everything pending now is committed. Raises TierUnavailable after `timeout_s` seconds."""
        self._records.flush(timeout_s)

    def flush_meta(self) -> None:
        """Write order and deadlines of everything touched since. Raises TierUnavailable after 30 s."""
        self._records.flush_rows()

    def maintain(self) -> None:
        """What the maintainer calls now and then: room on the disk, slots of readers that died, a little scrubbing."""
        self._records.check_readers()
        with self._changed:
            self._records.ask_for_room()
        if self._records.readable:
            self._scrubber.turn(SCRUB_NBYTES)

    def dropped(self, key: Key, reason: str) -> None:
        """The log lost a record: tell the store. Without the lock."""
        self._on_drop(key, reason)

    def make_room(self, nbytes: int) -> bool:
        """The writer asks, before it writes so many bytes and after it failed to: evict until the disk has them."""
        free, total = self._records.room()
        missing = nbytes + int(total * self._free_min_fraction) - free
        if missing <= 0:
            return True
        evicted = 0
        while missing > 0 and (victims := self._oldest_on_disk(missing)):
            missing -= sum(place_nbytes(record_nbytes) for record_nbytes in victims.values())
            evicted += len(victims)
            # Should this fail, the rows stay until the next start finds them: space is lost for a while, nothing else.
            self._records.evict_now(list(victims))
            for key in victims:
                self._on_drop(key, "evicted")
        log.warning("cold event=disk_full evicted=%s", evicted)
        return missing <= 0

    def _oldest_on_disk(self, nbytes: int) -> dict[Key, int]:
        """Let go of the least recently used records, up to so many bytes or `EVICTIONS_MAX`; their sizes by key."""
        found: dict[Key, int] = {}
        with self._changed:
            for key in islice(self._order, SLICE):  # those that something is pending for are passed over
                record_nbytes = self._records.record_nbytes(key)
                if record_nbytes is None:
                    continue
                found[key] = record_nbytes
                nbytes -= place_nbytes(record_nbytes)
                self._records.leaves(self._order.owner_of(key), record_nbytes)
                if nbytes <= 0 or len(found) == EVICTIONS_MAX:
                    break
            for key in found:
                self.forget(key)
            self._records.counters.evictions += len(found)
        return found

    def may_gather(self, nbytes: int) -> bool:
        """Whether so many bytes may be written only to save room: not above the write budget, not on a full disk."""
        try:
            free, total = self._records.room()
        except OSError:
            return False
        return not self.admission.exhausted and free - nbytes > total * self._free_min_fraction

    def close(self) -> None:
        """Write what is pending, order and deadlines, and let the directory go. A failing disk is only logged."""
        self._records.close()
