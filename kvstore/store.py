"""Store: the verbs, embedded. The walk over the tiers, readable in one sitting.

    put -> hot; what it displaces sinks to warm (NF4) and on to cold (records on disk)   (mover)
    get -> hot, warm, cold: the first that has it; a second hit within a minute asks for a copy in hot
    every get refreshes the sliding deadline; an expired entry is never returned
    what is where, and what must hold of it: residency.state

Thread rule: any thread may call any verb. A get copies; `lease` hands out the held tensors themselves.
Leaves out: prefixes (`prefix`), the network (the daemon and its client offer these same verbs).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from kvstore.clock import Clock, SystemClock
from kvstore.config import ColdConfig, StoreConfig, from_mapping, read_toml, with_budgets
from kvstore.device import MemoryDriver
from kvstore.entries.entry import Entry
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import TierUnavailable
from kvstore.hit import EntryInfo, Explanation, Fidelity, Held, Hit, Match, Priority
from kvstore.keys import CHUNK_TOKENS, CheckedKeys, IdentityFields, Key, check_key, check_prefix, identity_of, named
from kvstore.lookup import Lookup, check_lookup, check_saved
from kvstore.metadata.slices import slices
from kvstore.metadata.tombstones import GoneCause
from kvstore.options import PutOptions
from kvstore.packed import refuse_both
from kvstore.prefix import Namespace
from kvstore.residency import departures, pins
from kvstore.residency.budget_verbs import BudgetVerbs
from kvstore.residency.device_codecs import forms_of
from kvstore.residency.device_hot import open_device
from kvstore.residency.disk_verbs import DiskVerbs
from kvstore.residency.inspection import entries, entry_info, explain, snapshot
from kvstore.residency.maintainer import Maintainer
from kvstore.residency.mover import Mover
from kvstore.residency.opening import open_cold, residency_of
from kvstore.residency.read_path import NOTHING, Found, Plan, ReadPath
from kvstore.residency.shared_verbs import SharedVerbs
from kvstore.residency.sharing import opened as sharing_of
from kvstore.residency.write_path import WritePath, check_ttl
from kvstore.shared import Engine
from kvstore.shm.arena import Room
from kvstore.stats import Fill, Stats, fills_html, fills_text, ratio_text


class Store(SharedVerbs, BudgetVerbs, DiskVerbs):
    """A tiered store of tensors. Open one with `Store.open`; close it, or use it as a context manager."""

    def __init__(
        self,
        config: StoreConfig,
        *,
        clock: Clock,
        framework: str = "auto",
        background: bool = True,
        room: Room | None = None,
        tenants: Mapping[str, Sequence[bytes]] | None = None,
        engine: Engine | None = None,
        driver: MemoryDriver | None = None,
    ) -> None:
        self.config = config
        self._framework = framework
        self._r = r = residency_of(config, clock)
        for name, prefixes in (tenants or {}).items():
            r.register_tenant(name, CheckedKeys(prefixes))
        self._device_hot = hot = open_device(config, r, driver)
        self._transcoder, self._answers = forms_of(config, r, hot, framework=framework, room=room, forget=self._forget)
        self._mover = Mover(r, self._transcoder)
        if hot is not None:
            hot.displace = self._mover.displace_until
        self._write_path = WritePath(r, self._mover, config, hot)
        self._closed = False
        if config.cold.path is not None:
            open_cold(r, Path(config.cold.path), config.cold)
        self._maintainer = Maintainer(r, self._mover, config)
        self._read_path = ReadPath(r, config, self._maintainer.request_promotions)
        self._sharing = sharing_of(r, self._mover, self._write_path, config, engine)
        self.shares = self._sharing is not None
        if background:
            self._maintainer.start()
            if self._sharing is not None:
                self._sharing.source.start()

    @classmethod
    def open(  # noqa: PLR0913 - keyword-only, each one optional
        cls,
        source: str | Path | StoreConfig | None = None,
        *,
        hot: int | str | None = None,
        warm: int | str | None = None,
        cold: int | str | None = None,
        ttl_s: float | None = None,
        clock: Clock | None = None,
        framework: str = "auto",
        background: bool = True,
        room: Room | None = None,
        tenants: Mapping[str, Sequence[bytes]] | None = None,
        engine: Engine | None = None,
        driver: MemoryDriver | None = None,
    ) -> Self:
        """Open a store.

        source: a StoreConfig; a `.toml` file with its settings; a directory for the cold tier, the other settings at
        their defaults; or None for a store in memory only. hot, warm, cold: the tiers' budgets in bytes, or as text
        ("8GiB"), instead of the source's; ttl_s: seconds that an entry lives after its last use. framework: what `get`
        returns, "torch", "numpy" or "auto".
        background: run the maintainer's thread; without it call `maintain` yourself. room: where tensors promoted to
        hot are made (see `arena`), by default ordinary memory. tenants: those known from the start, as for
        `register_tenant`, which costs more once the store holds something. engine: the shared store, instead of what
        `shared.url` names. driver: who works for a hot tier on a device, by default CUDA.
        Raises ConfigError, or TierUnavailable when another process has the directory.
        """
        if isinstance(source, StoreConfig):
            config = source
        elif source is None:
            config = StoreConfig()
        elif Path(source).suffix == ".toml":
            config = from_mapping(StoreConfig, read_toml(source))
        else:
            config = replace(StoreConfig(), cold=ColdConfig(path=str(source)))
        config = with_budgets(config, hot=hot, warm=warm, cold=cold, ttl_s=ttl_s)
        return cls(config, clock=clock or SystemClock(), framework=framework, background=background, room=room,
                   tenants=tenants, engine=engine, driver=driver)  # fmt: skip

    @without_torch_modes
    def put(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        key: bytes,
        tensors: Mapping[str, Any],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        own: bool = False,
        priority: Priority = "normal",
        parent: bytes | None = None,
        namespace: str = "",
    ) -> bool:
        """Keep a copy of named tensors under a key, replacing what was there. True: stored.

        ttl_s: seconds to live, by default the store's; sliding: a get moves the deadline. pin: keep from eviction and
        expiry. fidelity: "exact" for bit-for-bit in every tier, "auto" lets it become NF4 when it leaves hot.
        own: the torch tensors are handed over, no copy is made. priority: "low" leaves before others unless it is hit.
        parent: the key of the chunk that this one continues; it will not outlive it. False: the parent is not held.
        namespace: the name under which it is counted, and limited by `namespaces` in the configuration; with a parent
        it is the parent's.
        Raises InvalidEntry, EntryTooLarge, OverQuota.
        """
        self._check_open()
        options = PutOptions(ttl_s, sliding, pin, fidelity, priority, namespace)
        at, before = check_key(key), None if parent is None else check_key(parent)
        return self._write_path.put(at, tensors, options, before, own=own)

    @without_torch_modes
    def put_many(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        entries: Sequence[tuple[bytes, Mapping[str, Any]]],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        own: bool = False,
        priority: Priority = "normal",
        chain: bool = False,
        parent: bytes | None = None,
        namespace: str = "",
    ) -> int:
        """Put entries, root first: the deepest is put first, so that the root ends most recently used.

        chain: each entry continues the one before it, the first one `parent` (None: it is a root); a chunk never
        outlives the one it continues. Of two entries under one key the later one is kept, as in a dictionary; both
        count. Returns how many were stored, 0 when `parent` is not held.
        """
        self._check_open()
        pairs = list(entries)
        keys = CheckedKeys(key for key, _ in pairs)
        held = list(dict(zip(keys, (tensors for _, tensors in pairs), strict=True)).items())
        options = PutOptions(ttl_s, sliding, pin, fidelity, priority, namespace)
        if chain:
            before = None if parent is None else check_key(parent)
            stored = self._write_path.put_chain(held, options, before, own=own)
        else:
            stored = sum(self._write_path.put(key, tensors, options, own=own) for key, tensors in reversed(held))
        return len(keys) if stored == len(held) else stored

    def put_entries(
        self, entries: Sequence[Entry], options: PutOptions, *, chain: bool = False, parent: Key | None = None
    ) -> int:
        """As `put_many`, of entries that a door has made and checked on its own thread: handed over as they are."""
        self._check_open()
        held = list({entry.key: entry for entry in entries}.values())
        stored = self._write_path.take_entries(held, options, parent, chain=chain)
        return len(entries) if stored == len(held) else stored

    def get(self, key: bytes, *, out: Mapping[str, Any] | None = None, packed: bool = False) -> Hit | None:
        """The value under a key, copied; None on a miss.

        out: tensors to copy into, by name, of the entry's dtypes and shapes (else InvalidEntry); they are in the hit.
        packed: tensors that are held encoded come as they are held, as `PackedTensor`. Not with out.
        """
        refuse_both(out, packed=packed)
        found = self._read((check_key(key),))[0]
        return None if found is None else self._answers.hit(found, out=out, packed=packed)

    def get_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None, packed: bool = False
    ) -> list[Hit | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss.

        Keys are touched deepest first. lookup: how it counts among the lookups, by default each key as one.
        """
        found = self._read(CheckedKeys(keys), leading=leading, lookup=lookup)
        return list(self._answers.hits(found, leading=leading, packed=packed))

    def lease(self, key: bytes, *, packed: bool = False) -> AbstractContextManager[Hit | None]:
        """The value without a copy: the tensors are those the store holds. Only read them, only inside the block."""
        return self._lease(CheckedKeys([key]), packed=packed)

    @contextmanager
    def _lease(self, keys: CheckedKeys, *, packed: bool) -> Iterator[Hit | None]:
        with self._lease_many(keys, leading=False, lookup=None, packed=packed) as hits:
            yield next(hits)

    def lease_many(
        self, keys: Sequence[bytes], *, leading: bool = False, lookup: Lookup | None = None, packed: bool = False
    ) -> AbstractContextManager[Iterator[Hit | None]]:
        """Like `get_many` without copies, one hit after the other: only one is decoded at a time."""
        return self._lease_many(CheckedKeys(keys), leading=leading, lookup=lookup, packed=packed)

    @contextmanager
    def _lease_many(
        self, keys: CheckedKeys, *, leading: bool, lookup: Lookup | None, packed: bool
    ) -> Iterator[Iterator[Hit | None]]:
        found = self._read(keys, leading=leading, lookup=lookup)
        with self._answers.lent():
            yield self._answers.hits(found, leading=leading, copy=False, packed=packed)

    def plan(  # noqa: PLR0913 - keyword-only, each one optional
        self,
        keys: Sequence[bytes],
        *,
        leading: bool = False,
        accept: Collection[str] = NOTHING,
        from_nbytes: int = 0,
        at_most_nbytes: float = inf,
        whole_if_hot: bool = False,
        charge: Callable[[Plan], None] | None = None,
        count_later: bool = False,
        lookup: Lookup | None = None,
    ) -> Plan:
        """The one look of a get, for a server: what is where, how big it is and what it needs; `read` then reads it.

        All under one lock: finds the keys, calls `charge` with the plan, and counts hits, misses and use. What `charge`
        raises is raised, and nothing was counted; EntryTooLarge only if no record lied about its size: such a one is
        dropped, and the look made again. leading: a chain, root first, up to the first miss. accept: encodings
        that the caller decodes itself, from `from_nbytes` decoded bytes on. at_most_nbytes: of one lot, once decoded:
        the plan covers the first key, and as many more as fit; ask again for the rest. whole_if_hot: what lies in hot
        and needs no copy is no lot, and `charge` is not called for it. count_later: where all is in hot, whoever is
        waiting is answered first; it is counted as soon as anybody takes the lock, or by `settle`. lookup: checked; the
        plan's own for the rest.
        """
        self._check_open()
        return self._read_path.plan(
            _checked(keys), leading=leading, accept=accept, from_nbytes=from_nbytes, at_most_nbytes=at_most_nbytes,
            whole_if_hot=whole_if_hot, charge=charge, count_later=count_later, lookup=lookup,
        )  # fmt: skip

    def read(self, plan: Plan, *, room: Room | None = None) -> Iterator[Hit | Found | None]:
        """The hits of a plan, in the order of its keys, not copied: only read them. None: a miss, or lost meanwhile.

        A chain ends before what was lost. What the plan's caller decodes itself comes as the `Found` it is. room: where
        what must be decoded is made, by default ordinary memory. One is decoded at a time; the disk is read at once.
        """
        self._check_open()
        return self._answers.of_plan(plan, self._read_path.fetch(plan), room)

    def settle(self) -> None:
        """Count the gets that were to be counted later. Nobody has to: whoever takes the lock does."""
        if self._r.lock.owed:
            with self._r.lock:
                pass

    def match(self, keys: Sequence[bytes], *, lookup: Lookup | None = None, local: bool = False) -> Match:
        """How many leading keys of a chain are held, and where. Does not count as use.

        lookup: how it counts among the lookups, by default each key as one; a get of the same keys within a minute
        belongs to it. What this host could fetch from another counts as held, in the tier "shared", unless `local`.
        """
        more = None if self._sharing is None or local else self._sharing.more
        return Match(tuple(self._read_path.leading(_checked(keys), lookup, more)))

    def locate(self, keys: Sequence[bytes], *, lookup: Lookup | None = None) -> list[Held | None]:
        """Where each key is held; None where it is not. Does not count as use, nor as a lookup unless that is said."""
        return self._read_path.peek(_checked(keys), lookup)

    def first_held(self, keys: Sequence[bytes]) -> int:
        """Which of some keys is the first that is held; their number: none is. Counts nothing, and takes no lock."""
        return self._r.first_held(_checked(keys))

    def report(self, *, prefill_saved_s: float) -> None:
        """Add seconds of prefill that hits made unnecessary to the counters: 0 to 86400. Raises InvalidEntry."""
        with self._r.lock:
            self._r.counters.prefill_saved_s += check_saved(prefill_saved_s)

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first; move deadlines that slide, to ttl_s from now. Returns how many are held."""
        ttl = None if ttl_s is None else check_ttl(ttl_s, self.config)
        touched = 0
        for part in slices(list(dict.fromkeys(_checked(keys)))[::-1]):
            with self._r.lock:
                touched += self._r.use(part, ttl)
        return touched

    def delete(self, *keys: bytes | CheckedKeys, keep_shared: bool = False) -> int:
        """Forget keys in all tiers, for good: no restart or power cut brings them back. Returns how many were held.

        Chunks that continue a key go with it, uncounted; with `keep_shared` a key that others continue stays instead.
        Name a prefix deepest first then. With [store.shared] their objects are deleted there, too, and until that is
        acknowledged this host neither reads nor publishes them; what other hosts hold of them stays there.
        """
        doomed = named(keys)
        with self._barred(doomed, some_stay=keep_shared):
            gone = self._forget(doomed, "deleted", keep_shared=keep_shared)
        with self._r.lock:
            self._r.counters.deletes += gone
        return gone

    def evict(self, *keys: bytes | CheckedKeys) -> int:
        """Forget keys, counted as evictions. Returns how many were held."""
        checked = named(keys)
        for part in slices(checked):
            with self._r.lock:
                for key in part:
                    tiers = self._r.tiers_of(key)
                    if tiers:
                        self._r.counters.tiers[tiers[0]].evictions += 1
        return self._forget(checked, "evicted")

    def pin(self, *keys: bytes | CheckedKeys, ttl_s: float | None = None) -> int:
        """Keep keys, and the chunks before them, from eviction and expiry until `unpin`, or for `ttl_s` seconds.

        Returns how many are held. Raises OverQuota, with none newly pinned.
        """
        return pins.pin(self._r, named(keys), None if ttl_s is None else check_ttl(ttl_s, self.config))

    def unpin(self, *keys: bytes | CheckedKeys) -> int:
        """Let keys be evicted and expire again; the deadline starts anew. Returns how many are held and unpinned now.

        A chunk stays pinned while one that continues it is: name a prefix whole, root first.
        """
        return pins.unpin(self._r, named(keys))

    @without_torch_modes
    def demote(self, *keys: bytes | CheckedKeys) -> int:
        """Move keys one tier down, the chunks that continue them first. Returns how many moved; pinned keys stay."""
        return sum(self._mover.demote(key) for key in reversed(named(keys)))

    @without_torch_modes
    def promote(self, *keys: bytes | CheckedKeys) -> int:
        """Copy keys to hot. Returns how many were copied."""
        return sum(self._mover.promote(key) for key in reversed(named(keys)))

    def inspect(self, key: bytes) -> EntryInfo | None:
        """What is known of an entry, its tensors' types and shapes included. Does not count as use."""
        return entry_info(self._r, check_key(key), with_tensors=True)

    def register_tenant(self, name: str, prefixes: Sequence[bytes]) -> None:
        """Keys that begin with one of these 16-byte prefixes are this tenant's: its quotas hold, and fair eviction.

        For a server that puts the prefixes before its callers' keys itself. Raises InvalidEntry.
        """
        self._r.register_tenant(name, CheckedKeys(prefixes))

    def tenants(self) -> dict[str, dict[str, int]]:
        """Bytes held by tier and tenant; "" is everybody outside the tenants."""
        with self._r.lock:
            tiers = (self._r.hot, self._r.warm, self._r.cold)
            return {tier.name: tier.tenants() for tier in tiers if tier is not None}

    def explain(self, *keys: bytes | CheckedKeys) -> list[Explanation]:
        """For each key where it is held, or why it is gone, as far as that is still known. Does not count as use."""
        return self._with_shared(explain(self._r, named(keys)))

    def entries(
        self,
        *,
        tier: str | None = None,
        key_prefix: bytes = b"",
        tenant: str = "",
        namespace: str = "",
        limit: int | None = None,
    ) -> Iterator[EntryInfo]:
        """Entries in order of key; tensors are described only where they are in memory. Filters narrow each other.

        namespace: the name they were put under, its versions (NAME@...) included.
        """
        prefix = check_prefix(key_prefix)
        return entries(self._r, tier=tier, key_prefix=prefix, tenant=tenant, namespace=namespace, limit=limit)

    def stats(self) -> Stats:
        """Counters since start and gauges of now."""
        shared = {} if self._sharing is None else self._sharing.source.gauges()
        device = {} if self._device_hot is None else self._device_hot.gauges()
        return snapshot(self._r, {"promotions_waiting": self._maintainer.waiting, **shared, **device})

    def namespace(self, *, chunk_tokens: int = CHUNK_TOKENS, **identity: Unpack[IdentityFields]) -> Namespace:
        """The prefixes of one model: `identity` is the fields of `keys.Identity`, all that have no default."""
        return Namespace(self, identity_of(identity), chunk_tokens)

    @without_torch_modes
    def maintain(self) -> None:
        """One turn of the maintainer: expiry sweep, queued promotions, periodic flushes; and of the shared store's."""
        self._maintainer.run_once()
        if self._sharing is not None:
            self._sharing.source.run_once()

    def heartbeat_age_s(self) -> float:
        """Seconds since the background thread last ended a turn: large when it hangs, on a disk for example."""
        return self._r.clock.now() - self._maintainer.turned_at

    @without_torch_modes
    def close(self) -> None:
        """Drain to cold, if there is one, and give everything back. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._maintainer.stop()
        if self._sharing is not None:
            self._sharing.source.close()
        try:
            self._mover.drain()
        finally:
            if self._r.cold is not None:
                self._r.cold.close()
            with self._r.lock:
                self._r.hot.close()
                self._r.warm.close()
                self._r.index.clear()
            if self._device_hot is not None:
                self._device_hot.close()

    def __repr__(self) -> str:
        if self._closed:
            return "Store(closed)"
        at = f" at {self.config.cold.path}" if self._r.cold is not None else ""
        parts = [f"{len(self._r.index):,} entries", *fills_text(self._fills()), ratio_text(self._lookups())]
        return f"Store({'; '.join(parts)}{at})"

    def _repr_html_(self) -> str:
        """For notebooks: a bar for each tier, and the hit ratio."""
        if self._closed:
            return "<p>Store(closed)</p>"
        return fills_html(self._fills(), f"{len(self._r.index):,} entries, {ratio_text(self._lookups())}")

    def _fills(self) -> list[Fill]:
        # No lock and no disk: a debugger shows this, too.
        tiers = (self._r.hot, self._r.warm, self._r.cold)
        return [(tier.name, tier.used_nbytes, tier.capacity_nbytes) for tier in tiers if tier is not None]

    def _lookups(self) -> dict[str, float]:
        counted = self._r.counters.lookups
        return {f"lookup_{name}": getattr(counted, name) for name in ("keys", "hit_keys", "tokens", "hit_tokens")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailable("the store is closed")

    def _read(self, keys: Sequence[Key], *, leading: bool = False, lookup: Lookup | None = None) -> list[Found | None]:
        self._check_open()
        checked = check_lookup(lookup)
        if self._sharing is not None:
            self._sharing.bring(keys, checked, leading=leading)
        return self._read_path.fetch(self._read_path.plan(keys, leading=leading, lookup=checked))

    def _forget(self, keys: Sequence[Key], cause: GoneCause, *, keep_shared: bool = False) -> int:
        gone, ticket = departures.take_out(self._r, keys, cause, keep_shared=keep_shared)
        if self._r.cold is not None:
            self._r.cold.wait(ticket)
        return gone


def _checked(keys: Sequence[bytes]) -> CheckedKeys:
    """The keys of a call: as they are from a door, which has checked them."""
    return keys if type(keys) is CheckedKeys else CheckedKeys(keys)
