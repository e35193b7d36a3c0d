"""Store: the verbs, embedded. The walk over the tiers, readable in one sitting.

    put -> hot; what it displaces sinks to warm (NF4) and on to cold (records on disk)   (mover)
    get -> hot, warm, cold: the first that has it; a second hit within a minute asks for a copy in hot
    every get refreshes the sliding deadline; an expired entry is never returned
    what is where, and what must hold of it: residency

Thread rule: any thread may call any verb. A get copies; `lease` hands out the held tensors themselves.
Leaves out: prefixes (`prefix`), the network (the daemon and its client offer these same verbs).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from kvstore import arrays
from kvstore.clock import Clock, SystemClock
from kvstore.codecs import codec_named
from kvstore.config import ColdConfig, StoreConfig, from_mapping, read_toml
from kvstore.dtypes import BY_NAME
from kvstore.entry import Entry, Key
from kvstore.errors import EntryTooLarge, InvalidEntry, TierUnavailable
from kvstore.hit import FIDELITIES, EntryInfo, Fidelity, Held, Hit, Match, TensorInfo
from kvstore.index import Meta
from kvstore.inspection import entries, entry_info, snapshot
from kvstore.keys import CHUNK_TOKENS, Identity, check_key, check_keys
from kvstore.maintainer import Maintainer
from kvstore.mover import Mover, Room, leading_first, raw_entry, specs_of
from kvstore.prefix import Namespace
from kvstore.residency import Residency
from kvstore.stats import MissCause, Stats
from kvstore.tiers import TierName
from kvstore.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from kvstore.tiers.cold import Cold


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
    ) -> None:
        self.config = config
        self._framework = framework
        # "cuda" alone is not equal to the "cuda:0" that its tensors report.
        self._device = torch.device("cuda:0" if config.hot.device == "cuda" else config.hot.device)
        pins = config.pin_max_fraction
        self._r = r = Residency(
            clock,
            hot=MemoryTier("hot", config.hot.capacity_nbytes, pin_max_fraction=pins),
            warm=MemoryTier("warm", config.warm.capacity_nbytes, pin_max_fraction=pins),
        )
        self._mover = Mover(r, codec_named("nf4"), self._device, room)
        self._closed = False
        if config.cold.path is not None:
            self._open_cold(Path(config.cold.path))
        self._maintainer = Maintainer(r, self._mover, config)
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
    ) -> Self:
        """Open a store.

        source: a StoreConfig; a `.toml` file with its settings; a directory for the cold tier, the other settings at
        their defaults; or None for a store in memory only. framework: what `get` returns, "torch", "numpy" or "auto".
        background: run the maintainer's thread; without it call `maintain` yourself. room: where tensors promoted to
        hot are made (see `arena`), by default ordinary memory.
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
        return cls(config, clock=clock or SystemClock(), framework=framework, background=background, room=room)

    def put(
        self,
        key: bytes,
        tensors: Mapping[str, Any],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        own: bool = False,
    ) -> bool:
        """Keep a copy of named tensors under a key, replacing what was there. True: stored.

        ttl_s: seconds to live, by default the store's; sliding: a get moves the deadline. pin: keep from eviction and
        expiry. fidelity: "exact" for bit-for-bit in every tier, "auto" lets it become NF4 when it leaves hot.
        own: the torch tensors are handed over, no copy is made. Raises InvalidEntry, EntryTooLarge, OverQuota.
        """
        entry, meta = self._admissible(key, tensors, ttl_s, sliding, fidelity, own=own)
        with self._r.lock:
            self._r.counters.puts += 1
            self._r.counters.put_nbytes += meta.value_nbytes
        self._mover.admit(entry, meta)
        if pin:
            self._pin_new(entry.key)
        return True

    def put_many(
        self,
        entries: Sequence[tuple[bytes, Mapping[str, Any]]],
        *,
        ttl_s: float | None = None,
        sliding: bool = True,
        pin: bool = False,
        fidelity: Fidelity = "auto",
        own: bool = False,
    ) -> int:
        """Put a chain of entries, root first: put deepest first, so that the root ends most recently used."""
        check_keys(key for key, _ in entries)
        for key, tensors in reversed(entries):
            self.put(key, tensors, ttl_s=ttl_s, sliding=sliding, pin=pin, fidelity=fidelity, own=own)
        return len(entries)

    def get(self, key: bytes, *, out: Mapping[str, Any] | None = None) -> Hit | None:
        """The value under a key, copied; None on a miss.

        out: tensors to copy into, by name, of the entry's dtypes and shapes (else InvalidEntry); they are in the hit.
        """
        found = self._read([check_key(key)], leading=False)[0]
        return None if found is None else self._hit(found, out=out)

    def get_many(self, keys: Sequence[bytes], *, leading: bool = False) -> list[Hit | None]:
        """Values in the order of keys, None for a miss. leading: a chain, root first, up to the first miss.

        Keys are touched deepest first.
        """
        found = self._read(check_keys(keys), leading=leading)
        return [None if place is None else self._hit(place) for place in found]

    @contextmanager
    def lease(self, key: bytes) -> Iterator[Hit | None]:
        """The value without a copy: the tensors are those the store holds. Only read them, only inside the block."""
        found = self._read([check_key(key)], leading=False)[0]
        yield None if found is None else self._hit(found, copy=False)

    @contextmanager
    def lease_many(
        self, keys: Sequence[bytes], *, leading: bool = False, room: Room | None = None
    ) -> Iterator[Iterator[Hit | None]]:
        """Like `get_many` without copies, one hit after the other: only one is decoded at a time.

        room: where what must be decoded is made, by default ordinary memory.
        """
        found = self._read(check_keys(keys), leading=leading)
        yield (None if place is None else self._hit(place, copy=False, room=room) for place in found)

    def match(self, keys: Sequence[bytes]) -> Match:
        """How many leading keys of a chain are held, and where. Does not count as use."""
        held: list[Held] = []
        for at in self._locate(check_keys(keys)):
            if at is None:
                break
            held.append(at)
        return Match(tuple(held))

    def locate(self, keys: Sequence[bytes]) -> list[Held | None]:
        """Where each key is held; None where it is not. Does not count as use."""
        return list(self._locate(check_keys(keys)))

    def touch(self, keys: Sequence[bytes], *, ttl_s: float | None = None) -> int:
        """Count as use, deepest first, and move sliding deadlines (to ttl_s from now). Returns how many are held."""
        ttl = None if ttl_s is None else self._check_ttl(ttl_s)
        checked = check_keys(keys)
        with self._r.lock:
            now = self._r.clock.now()
            live = [(Key(key), meta) for key in checked if (meta := self._r.live(Key(key))) is not None]
            for key, meta in live:
                meta.refresh(now, ttl)
                self._r.deadlines.watch(key, meta.expires_at)
            self._r.touch(leading_first(key for key, _ in live))
            return len(live)

    def delete(self, *keys: bytes) -> int:
        """Forget keys in all tiers, for good: no restart or power cut brings them back. Returns how many were held."""
        gone = self._forget(check_keys(keys))
        with self._r.lock:
            self._r.counters.deletes += gone
        return gone

    def evict(self, *keys: bytes) -> int:
        """Forget keys, counted as evictions. Returns how many were held."""
        with self._r.lock:
            for key in check_keys(keys):
                tiers = self._r.tiers_of(Key(key))
                if tiers:
                    self._r.counters.tiers[tiers[0]].evictions += 1
        return self._forget(check_keys(keys))

    def pin(self, *keys: bytes) -> int:
        """Keep keys from eviction and expiry until `unpin`. Returns how many are held. Raises OverQuota."""
        changed = 0
        for key in check_keys(keys):
            with self._r.lock:
                meta = self._r.live(Key(key))
                if meta is None:
                    continue
                # The lowest form is the one that would leave the store; copies above it may come and go.
                self._tier(self._r.tiers_of(Key(key))[-1]).pin(Key(key))
                meta.pinned = True
                changed += 1
        return changed

    def unpin(self, *keys: bytes) -> int:
        """Let keys be evicted and expire again; the deadline starts anew. Returns how many are held."""
        changed = 0
        with self._r.lock:
            now = self._r.clock.now()
            for key in map(Key, check_keys(keys)):
                meta = self._r.live(key)
                if meta is None:
                    continue
                meta.pinned = False
                meta.expires_at = now + meta.ttl_s
                self._r.deadlines.watch(key, meta.expires_at)
                for name in self._r.tiers_of(key):
                    self._tier(name).unpin(key)
                changed += 1
        return changed

    def demote(self, *keys: bytes) -> int:
        """Move keys one tier down. Returns how many moved; pinned keys stay."""
        return sum(self._mover.demote(Key(key)) for key in check_keys(keys))

    def promote(self, *keys: bytes) -> int:
        """Copy keys to hot. Returns how many were copied."""
        return sum(self._mover.promote(Key(key)) for key in check_keys(keys))

    def inspect(self, key: bytes) -> EntryInfo | None:
        """What is known of an entry, its tensors' types and shapes included. Does not count as use."""
        return entry_info(self._r, Key(check_key(key)), with_tensors=True)

    def entries(
        self, *, tier: str | None = None, key_prefix: bytes = b"", limit: int | None = None
    ) -> Iterator[EntryInfo]:
        """Entries in order of key; tensors are described only where they are in memory."""
        return entries(self._r, tier=tier, key_prefix=key_prefix, limit=limit)

    def stats(self) -> Stats:
        """Counters since start and gauges of now."""
        return snapshot(self._r)

    def namespace(self, *, chunk_tokens: int = CHUNK_TOKENS, **identity: Any) -> Namespace:
        """The prefixes of one model: `identity` is the fields of `keys.Identity`, all that have no default."""
        return Namespace(self, identity_of(identity), chunk_tokens)

    def maintain(self) -> None:
        """One turn of the maintainer: expiry sweep, queued promotions, periodic flushes."""
        self._maintainer.run_once()

    def drain(self) -> int:
        """Write to cold whatever is only in memory. Returns entries written."""
        return self._mover.drain()

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

        r = self._r
        r.cold = Cold.open(
            path,
            self.config.cold,
            r.clock,
            meta_of=r.index.get,
            on_drop=r.dropped_from_cold,
        )
        with r.lock:
            for key, meta in r.cold.recovered():
                r.index[key] = meta
                r.deadlines.watch(key, meta.expires_at)

    def _check_ttl(self, ttl_s: float) -> float:
        if not 0 < ttl_s <= self.config.ttl_max_s:  # NaN included
            raise InvalidEntry(f"ttl_s must be over 0 and at most {self.config.ttl_max_s} seconds, got {ttl_s!r}")
        return float(ttl_s)

    def _admissible(
        self,
        key: bytes,
        tensors: Mapping[str, Any],
        ttl_s: float | None,
        sliding: bool,  # noqa: FBT001 - passed on by keyword from put
        fidelity: Fidelity,
        *,
        own: bool,
    ) -> tuple[Entry, Meta]:
        """Everything that can be refused is refused here, before a byte is copied."""
        if self._closed:
            raise TierUnavailable("the store is closed")
        checked = Key(check_key(key))
        ttl = self.config.ttl_s if ttl_s is None else self._check_ttl(ttl_s)
        if fidelity not in FIDELITIES:
            raise InvalidEntry(f"fidelity must be one of {', '.join(FIDELITIES)}, got {fidelity!r}")
        if not isinstance(tensors, Mapping):
            raise InvalidEntry(f"tensors are a mapping of names to tensors, got {type(tensors).__name__}")
        specs = {name: arrays.describe(name, x) for name, x in tensors.items()}
        nbytes = arrays.check_specs(specs, self.config.entry_max_nbytes)
        largest = max(t.capacity_nbytes for t in (self._r.hot, self._r.warm, self._r.cold) if t is not None)
        if nbytes > largest and (fidelity == "exact" or nbytes > 9 * largest):
            raise EntryTooLarge(f"an entry of {nbytes} bytes fits no tier, the largest has {largest}")
        now = self._r.clock.now()
        meta = Meta(now, now + ttl, ttl, nbytes, sliding=sliding, exact=fidelity == "exact")
        held = {name: self._owned(x, own=own) for name, x in tensors.items()}
        return raw_entry(checked, held), meta

    def _owned(self, x: Any, *, own: bool) -> torch.Tensor:
        if not arrays.is_torch(x):
            info = arrays.describe("", x)
            # A numpy array is copied on the byte level: its NaN payloads and bfloat16 are bits like any other.
            return arrays.from_bytes(info, arrays.as_bytes(x).copy(), "torch").to(self._device)  # type: ignore[no-any-return]
        dense = x.detach().resolve_conj().resolve_neg()
        if own and dense.is_contiguous() and dense.device == self._device:
            return dense  # type: ignore[no-any-return]
        return dense.to(self._device, copy=True, memory_format=torch.contiguous_format)  # type: ignore[no-any-return]

    def _pin_new(self, key: Key) -> None:
        try:
            self.pin(key)
        except Exception:
            self._forget([key])
            raise

    def _read(self, keys: list[bytes], *, leading: bool) -> list[tuple[Key, TierName, Entry, float] | None]:
        """Find, count and read: (key, tier, entry, age in seconds) or None. Cold entries are read here."""
        if self._closed:
            raise TierUnavailable("the store is closed")
        r = self._r
        with r.lock:
            now = r.clock.now()
            places: list[tuple[Key, TierName, Entry | None, Meta] | None] = []
            for key in map(Key, keys):
                place = self._find(key)
                if place is None and leading:
                    break
                places.append(place)
            used = [place for place in places if place is not None]
            for key, tier, _, meta in used:
                self._count_hit(key, tier, meta, now)
            r.touch(leading_first(key for key, *_ in used))
        found: list[tuple[Key, TierName, Entry, float] | None] = []
        for place in places:
            found.append(self._fetch(place, now) if place is not None else None)
            if found[-1] is None and leading:
                found.pop()
                break
        return found

    def _find(self, key: Key) -> tuple[Key, TierName, Entry | None, Meta] | None:
        r = self._r
        r.counters.gets += 1
        cause: MissCause = r.miss_cause(key)
        meta = r.live(key)
        place = r.lookup(key) if meta is not None else None
        if meta is None or place is None:
            r.counters.misses[cause] += 1
            return None
        return key, place[0], place[1], meta

    def _count_hit(self, key: Key, tier: TierName, meta: Meta, now: float) -> None:
        r = self._r
        r.counters.tiers[tier].hits += 1
        r.counters.hit_nbytes += meta.value_nbytes
        recent = meta.last_hit_at and now - meta.last_hit_at <= self.config.promote_window_s
        meta.hits += 1
        meta.last_hit_at = now
        meta.refresh(now)
        after = self.config.promote_after
        if tier != "hot" and (after == 1 or (after == 2 and recent)):
            self._maintainer.request_promotion(key)

    def _fetch(
        self, place: tuple[Key, TierName, Entry | None, Meta], now: float
    ) -> tuple[Key, TierName, Entry, float] | None:
        key, tier, entry, meta = place
        if entry is None:
            assert self._r.cold is not None
            entry = self._r.cold.get(key)
        with self._r.lock:
            c = self._r.counters
            if entry is None:
                # Counted as a hit when it was found; what it was found in has dropped it since.
                c.tiers[tier].hits -= 1
                c.hit_nbytes -= meta.value_nbytes
                c.misses["corrupt" if key not in self._r.index else "lost"] += 1
                return None
            c.hits_by_encoding[entry.encoding] += 1
        return key, tier, entry, now - meta.created_at

    def _hit(
        self,
        found: tuple[Key, TierName, Entry, float],
        *,
        out: Mapping[str, Any] | None = None,
        copy: bool = True,
        room: Room | None = None,
    ) -> Hit:
        key, tier, entry, age_s = found
        if not copy and entry.encoding == "raw":
            tensors: Mapping[str, Any] = {name: t.parts[""] for name, t in entry.tensors.items()}
        elif out is not None:
            tensors = self._decode_into(entry, out)
        else:
            tensors = self._mover.decode(entry, None if room is None else room(specs_of(entry)))
        if copy and out is None and arrays.resolve_framework(self._framework) == "numpy":
            tensors = {name: _to_numpy(x) for name, x in tensors.items()}
        return Hit(key, tensors, tier, entry.encoding, entry.lossy, age_s)

    def _decode_into(self, entry: Entry, out: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: arrays.describe(name, x) for name, x in out.items()}
        held = specs_of(entry)
        if given != held:
            raise InvalidEntry(f"out must hold exactly the entry's tensors {held}, got {given}")
        # A numpy array is filled through a tensor over its bytes, so both kinds take the one path.
        direct = {name: x if arrays.is_torch(x) else _as_torch(x) for name, x in out.items()}
        if all(x.is_contiguous() and x.device == self._device for x in direct.values()):
            self._mover.decode(entry, direct)
        else:
            for name, x in self._mover.decode(entry).items():
                direct[name].copy_(x)
        return dict(out)

    def _locate(self, keys: list[bytes]) -> Iterator[Held | None]:
        with self._r.lock:
            for key in map(Key, keys):
                meta = self._r.peek(key)
                place = self._r.lookup(key) if meta is not None else None
                yield None if meta is None or place is None else Held(place[0], meta.value_nbytes)

    def _forget(self, keys: list[bytes]) -> int:
        r = self._r
        gone = 0
        tickets: list[int | None] = []
        with r.lock:
            for key in map(Key, keys):
                gone += r.live(key) is not None
                tickets.append(r.forget(key))
        for ticket in tickets:
            if r.cold is not None:
                r.cold.wait(ticket)
        return gone

    def _tier(self, name: TierName) -> "MemoryTier | Cold":
        tiers: dict[TierName, MemoryTier | Cold | None] = {
            "hot": self._r.hot,
            "warm": self._r.warm,
            "cold": self._r.cold,
        }
        tier = tiers[name]
        assert tier is not None
        return tier


def identity_of(fields: Mapping[str, Any]) -> Identity:
    """An Identity from keyword arguments. Raises InvalidEntry for a missing or unknown field, naming it."""
    try:
        return Identity(**fields)
    except TypeError as error:
        raise InvalidEntry(f"namespace: {str(error).removeprefix('Identity.__init__() ')}") from None


def _as_torch(x: Any) -> torch.Tensor:
    """A tensor over the memory of a numpy array. Raises InvalidEntry where they cannot share it."""
    if not (x.flags.c_contiguous and x.flags.writeable and x.dtype.isnative):
        raise InvalidEntry("out: a numpy array must be C-contiguous, writeable and of native byte order")
    return arrays.from_bytes(arrays.describe("", x), arrays.as_bytes(x), "torch")  # type: ignore[no-any-return]


def _to_numpy(x: torch.Tensor) -> Any:
    spec = TensorInfo(str(x.dtype).removeprefix("torch."), tuple(x.shape))
    assert spec.dtype in BY_NAME
    return arrays.from_bytes(spec, arrays.as_bytes(x), "numpy")
