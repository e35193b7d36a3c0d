"""Store: the verbs, embedded. The walk over the tiers, readable in one sitting.

    put -> hot; what it displaces sinks to warm (NF4) and on to cold (records on disk)   (mover)
    get -> hot, warm, cold: the first that has it; a second hit within a minute asks for a copy in hot
    every get refreshes the sliding deadline; an expired entry is never returned
    what is where, and what must hold of it: residency.state

Thread rule: any thread may call any verb. A get copies; `lease` hands out the held tensors themselves.
Leaves out: prefixes (`prefix`), the network (the daemon and its client offer these same verbs).
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch

from kvstore.clock import Clock, SystemClock
from kvstore.codecs.choice import CodecChoice
from kvstore.config import ColdConfig, StoreConfig, from_mapping, read_toml
from kvstore.entries.torch_modes import without_torch_modes
from kvstore.errors import InvalidEntry, TierUnavailable
from kvstore.hit import EntryInfo, Explanation, Fidelity, Held, Hit, Match, Priority, Verified
from kvstore.keys import CHUNK_TOKENS, Identity, Key, check_key, check_keys, check_prefix
from kvstore.metadata.tombstones import GoneCause
from kvstore.prefix import Namespace
from kvstore.residency import pins
from kvstore.residency.answers import Answers, is_sent_encoded
from kvstore.residency.inspection import entries, entry_info, explain, holds_truly, locate, snapshot
from kvstore.residency.maintainer import Maintainer
from kvstore.residency.mover import Mover
from kvstore.residency.read_path import Found, ReadPath, Resident, leading_first
from kvstore.residency.resizing import set_hot_capacity
from kvstore.residency.state import residency_of
from kvstore.residency.transcode import Room, TensorTranscoder
from kvstore.residency.write_path import PutOptions, WritePath, check_ttl
from kvstore.stats import Stats

log = logging.getLogger(__name__)


class Store:
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
    ) -> None:
        self.config = config
        self._framework = framework
        # "cuda" alone is not equal to the "cuda:0" that its tensors report.
        self._device = torch.device("cuda:0" if config.hot.device == "cuda" else config.hot.device)
        self._r = r = residency_of(config, clock)
        for name, prefixes in (tenants or {}).items():
            r.register_tenant(name, check_keys(prefixes))
        self._transcoder = TensorTranscoder(CodecChoice(config.warm), self._device, r, room)
        self._answers = Answers(r, self._transcoder, framework, self._device, self._forget)
        self._mover = Mover(r, self._transcoder)
        self._write_path = WritePath(r, self._mover, config, self._device)
        self._closed = False
        if config.cold.path is not None:
            self._open_cold(Path(config.cold.path))
        self._maintainer = Maintainer(r, self._mover, config)
        self._read_path = ReadPath(r, config, self._maintainer.request_promotions)
        if background:
            self._maintainer.start()

    @classmethod
    def open(
        cls,
        source: str | Path | StoreConfig | None = None,
        *,
        clock: Clock | None = None,
        framework: str = "auto",
        background: bool = True,
        room: Room | None = None,
        tenants: Mapping[str, Sequence[bytes]] | None = None,
    ) -> Self:
        """Open a store.

        source: a StoreConfig; a `.toml` file with its settings; a directory for the cold tier, the other settings at
        their defaults; or None for a store in memory only. framework: what `get` returns, "torch", "numpy" or "auto".
        background: run the maintainer's thread; without it call `maintain` yourself. room: where tensors promoted to
        hot are made (see `arena`), by default ordinary memory. tenants: those known from the start, as for
        `register_tenant`, which costs more once the store holds something.
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
        return cls(config, clock=clock or SystemClock(), framework=framework, background=background, room=room,
                   tenants=tenants)  # fmt: skip

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
        return self._write_path.put(
            key, tensors, PutOptions(ttl_s, sliding, pin, fidelity, own, priority, namespace), parent
        )

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
        keys = check_keys(key for key, _ in pairs)
        held = list(dict(zip(keys, (tensors for _, tensors in pairs), strict=True)).items())
        options = PutOptions(ttl_s, sliding, pin, fidelity, own, priority, namespace)
        if chain:
            stored = self._write_path.put_chain(held, options, parent)
        else:
            stored = sum(self._write_path.put(key, tensors, options) for key, tensors in reversed(held))
        return len(keys) if stored == len(held) else stored

    def get(self, key: bytes, *, out: Mapping[str, Any] | None = None) -> Hit | None:
        """The value under a key, copied; None on a miss.

        out: tensors to copy into, by name, of the entry's dtypes and shapes (else InvalidEntry); they are in the hit.
        """
        found = self._read([check_key(key)], leading=False)[0]
        return None if found is None else self._answers.hit(found, out=out)

    def get_many(self, keys: Sequence[bytes], *, leading: bool = False) -> list[Hit | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss.

        Keys are touched deepest first.
        """
        found = self._read(check_keys(keys), leading=leading)
        return list(self._answers.hits(found, leading=leading))

    def lease(self, key: bytes) -> AbstractContextManager[Hit | None]:
        """The value without a copy: the tensors are those the store holds. Only read them, only inside the block."""
        return self._lease(check_key(key))

    @contextmanager
    def _lease(self, key: bytes) -> Iterator[Hit | None]:
        found = self._read([key], leading=False)[0]
        yield None if found is None else self._answers.hit(found, copy=False)

    def lease_many(
        self, keys: Sequence[bytes], *, leading: bool = False
    ) -> AbstractContextManager[Iterator[Hit | None]]:
        """Like `get_many` without copies, one hit after the other: only one is decoded at a time."""
        return self._lease_many(check_keys(keys), leading=leading)

    @contextmanager
    def _lease_many(self, keys: list[bytes], *, leading: bool) -> Iterator[Iterator[Hit | None]]:
        found = self._read(keys, leading=leading)
        yield self._answers.hits(found, leading=leading, copy=False)

    @contextmanager
    def lease_as_held(
        self,
        keys: Sequence[bytes],
        accept: Collection[str],
        *,
        from_nbytes: int = 0,
        leading: bool = False,
        room: Room | None = None,
    ) -> Iterator[Iterator[Hit | Found | None]]:
        """As `lease_many`; an entry in one of the encodings `accept` is not decoded but given out as the `Found` it is.

        from_nbytes: decoded bytes below which it is decoded all the same. room: where what must be decoded is made, by
        default ordinary memory.
        """

        def stays(at: Found) -> bool:
            return is_sent_encoded(at.entry, accept, from_nbytes)

        found = self._read(check_keys(keys), leading=leading)
        yield self._answers.hits(found, leading=leading, copy=False, room=room, stays=stays if accept else None)

    def at_hand(
        self, keys: Sequence[bytes], accept: Collection[str], *, from_nbytes: int = 0, at_most_nbytes: float = inf
    ) -> bool:
        """Whether `lease_as_held` of these would have nothing to read from a disk and nothing to decode, just now.

        at_most_nbytes: as they are held, in all; with more they are not at hand.
        """
        checked = check_keys(keys)
        with self._r.lock:
            found = [self._r.lookup(Key(key)) for key in checked]
        entries = [at[1] for at in found if at is not None and at[1] is not None]
        return (
            len(entries) == len(checked)
            and sum(entry.nbytes for entry in entries) <= at_most_nbytes
            and all(entry.encoding == "raw" or is_sent_encoded(entry, accept, from_nbytes) for entry in entries)
        )

    def resident(
        self, keys: Sequence[bytes], *, at_most_nbytes: float = inf, count_later: bool = False
    ) -> Resident | None:
        """The held entries themselves where hot has every one of the keys: a get of all of them, counted as one.

        None, counted as nothing: at least one is elsewhere or missing, or several have more bytes than at most wanted.
        Only read the tensors; they live as long as they are referred to. count_later: whoever is waiting gets them
        first; `settle` counts.
        """
        self._check_open()
        checked = cast("list[Key]", check_keys(keys))
        return self._read_path.resident(checked, at_most_nbytes, count_later=count_later)

    def settle(self) -> None:
        """Count the gets that were to be counted later. A get and `stats` do so first; call it before other verbs."""
        self._read_path.settle()

    def match(self, keys: Sequence[bytes]) -> Match:
        """How many leading keys of a chain are held, and where. Does not count as use."""
        return Match(tuple(self._read_path.leading(check_keys(keys))))

    def locate(self, keys: Sequence[bytes]) -> list[Held | None]:
        """Where each key is held; None where it is not. Does not count as use."""
        return locate(self._r, map(Key, check_keys(keys)))

    def holds_truly(self, key: bytes) -> bool:
        """Whether a key is held and its record's head agrees with what is known of it; one that does not is dropped."""
        return holds_truly(self._r, Key(check_key(key)))

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first, and move sliding deadlines (to ttl_s from now). Returns how many are held."""
        ttl = None if ttl_s is None else check_ttl(ttl_s, self.config)
        checked = check_keys(keys)
        with self._r.lock:
            now = self._r.clock.now()
            live = [(Key(key), meta) for key in checked if (meta := self._r.live(Key(key))) is not None]
            for key, meta in live:
                meta.refresh(now, ttl)
                self._r.deadlines.watch(key, meta)
            self._r.touch(leading_first(key for key, _ in live))
            return len(live)

    def delete(self, *keys: bytes, keep_shared: bool = False) -> int:
        """Forget keys in all tiers, for good: no restart or power cut brings them back. Returns how many were held.

        Chunks that continue a key go with it, uncounted; with `keep_shared` a key that others continue stays instead.
        Name a prefix deepest first then.
        """
        gone = self._forget(check_keys(keys), "deleted", keep_shared=keep_shared)
        with self._r.lock:
            self._r.counters.deletes += gone
        return gone

    def evict(self, *keys: bytes) -> int:
        """Forget keys, counted as evictions. Returns how many were held."""
        checked = check_keys(keys)
        with self._r.lock:
            for key in checked:
                tiers = self._r.tiers_of(Key(key))
                if tiers:
                    self._r.counters.tiers[tiers[0]].evictions += 1
        return self._forget(checked, "evicted")

    def pin(self, *keys: bytes, ttl_s: float | None = None) -> int:
        """Keep keys, and the chunks before them, from eviction and expiry until `unpin`, or for `ttl_s` seconds.

        Returns how many are held. Raises OverQuota, with none newly pinned.
        """
        checked = check_keys(keys)
        return pins.pin(self._r, checked, None if ttl_s is None else check_ttl(ttl_s, self.config))

    def unpin(self, *keys: bytes) -> int:
        """Let keys be evicted and expire again; the deadline starts anew. Returns how many are held and unpinned now.

        A chunk stays pinned while one that continues it is: name a prefix whole, root first.
        """
        return pins.unpin(self._r, check_keys(keys))

    @without_torch_modes
    def demote(self, *keys: bytes) -> int:
        """Move keys one tier down, the chunks that continue them first. Returns how many moved; pinned keys stay."""
        return sum(self._mover.demote(Key(key)) for key in reversed(check_keys(keys)))

    @without_torch_modes
    def promote(self, *keys: bytes) -> int:
        """Copy keys to hot. Returns how many were copied."""
        return sum(self._mover.promote(Key(key)) for key in reversed(check_keys(keys)))

    def inspect(self, key: bytes) -> EntryInfo | None:
        """What is known of an entry, its tensors' types and shapes included. Does not count as use."""
        return entry_info(self._r, Key(check_key(key)), with_tensors=True)

    def register_tenant(self, name: str, prefixes: Sequence[bytes]) -> None:
        """Keys that begin with one of these 16-byte prefixes are this tenant's: its quotas hold, and fair eviction.

        For a server that puts the prefixes before its callers' keys itself. Raises InvalidEntry.
        """
        checked = check_keys(prefixes)
        with self._r.lock:
            self._r.register_tenant(name, checked)

    def tenants(self) -> dict[str, dict[str, int]]:
        """Bytes held by tier and tenant; "" is everybody outside the tenants."""
        with self._r.lock:
            tiers = (self._r.hot, self._r.warm, self._r.cold)
            return {tier.name: tier.tenants() for tier in tiers if tier is not None}

    def explain(self, *keys: bytes) -> list[Explanation]:
        """For each key where it is held, or why it is gone, as far as that is still known. Does not count as use."""
        return explain(self._r, check_keys(keys))

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
        self._read_path.settle()
        return snapshot(self._r, {"promotions_waiting": self._maintainer.waiting})

    def namespace(self, *, chunk_tokens: int = CHUNK_TOKENS, **identity: Any) -> Namespace:
        """The prefixes of one model: `identity` is the fields of `keys.Identity`, all that have no default."""
        return Namespace(self, identity_of(identity), chunk_tokens)

    @without_torch_modes
    def maintain(self) -> None:
        """One turn of the maintainer: expiry sweep, queued promotions, periodic flushes."""
        self._maintainer.run_once()

    @without_torch_modes
    def drain(self) -> int:
        """Write to cold whatever is only in memory. Returns entries written."""
        return self._mover.drain()

    def verify(self) -> Iterator[Verified]:
        """Read and check every record on disk while serving; how far it is after each. Damaged ones are dropped.

        Does not count as use. Nothing to check, without a disk: one report of 0 records.
        """
        self._check_open()
        return iter([Verified(0, 0, 0, 0)]) if self._r.cold is None else self._r.cold.verify()

    @property
    def hot_budget_nbytes(self) -> int:
        """The hot tier's budget as configured or, with `split = "auto"`, as learned; pressure may hold it below."""
        balance = self._r.balance
        return self.config.hot.capacity_nbytes if balance is None else balance.hot_nbytes

    @property
    def hot_capacity_nbytes(self) -> int:
        """The hot tier's budget now: as configured, unless `set_hot_capacity` changed it."""
        return self._r.hot.capacity_nbytes

    @without_torch_modes
    def set_hot_capacity(self, nbytes: int) -> int:
        """Shrink or grow the hot tier's budget while it runs. Returns how many entries sank to the tier below."""
        return set_hot_capacity(self._r, self._mover, nbytes)

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
        try:
            self._mover.drain()
        finally:
            if self._r.cold is not None:
                self._r.cold.close()
            with self._r.lock:
                self._r.hot.close()
                self._r.warm.close()
                self._r.index.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_cold(self, path: Path) -> None:
        from kvstore.tiers.cold import Cold
        from kvstore.tiers.order import Order

        r = self._r
        cold = Cold.open(
            path,
            self.config.cold,
            r.clock,
            meta_of=r.index.get,
            on_drop=r.dropped_from_cold,
            order=Order(owner_of=r.owner_of, tier="cold"),
            owner_of=r.recovered_owner,
        )
        r.cold = cold
        with r.lock:
            found = cold.recovered()
            r.recover(zip(found.keys, found.metas, strict=True))
            r.forget_orphans(found.orphans)

    def _check_open(self) -> None:
        if self._closed:
            raise TierUnavailable("the store is closed")

    def _read(self, keys: list[bytes], *, leading: bool) -> list[Found | None]:
        self._check_open()
        return self._read_path.read(keys, leading=leading)

    def _forget(self, keys: list[bytes], cause: GoneCause, *, keep_shared: bool = False) -> int:
        r = self._r
        gone = 0
        tickets: list[int | None] = []
        with r.lock:
            for key in map(Key, keys):
                if keep_shared and any(r.chains.children(key)):
                    continue
                gone += r.live(key) is not None
                tickets.append(r.forget(key, cause))
        for ticket in tickets:
            if r.cold is not None:
                r.cold.wait(ticket)
        return gone


def identity_of(fields: Mapping[str, Any]) -> Identity:
    """An Identity from keyword arguments. Raises InvalidEntry for a missing or unknown field, naming it."""
    try:
        return Identity(**fields)
    except TypeError as error:
        raise InvalidEntry(f"namespace: {str(error).removeprefix('Identity.__init__() ')}") from None
