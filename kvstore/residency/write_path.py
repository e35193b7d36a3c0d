"""The write side: what may come in, as what, and where it belongs in its chain.

Everything that can be refused is refused before a byte is copied. A chunk whose parent is not held is not taken:
nothing could ever match it. A chain is put deepest first, so that the root ends most recently used; until its parents
arrive a chunk waits for them, and if they do not arrive it is forgotten again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch

from kvstore import arrays
from kvstore.boundary import Blaming, blamed
from kvstore.codecs.packing import copied_entry
from kvstore.config import StoreConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge, InvalidEntry, OverQuota
from kvstore.keys import CHUNK_TOKENS, KEYS_PER_CALL_MAX, Key
from kvstore.metadata.meta import Meta
from kvstore.metadata.slices import SLICE, pause, slices
from kvstore.options import PutOptions
from kvstore.packed import PackedTensor, any_packed
from kvstore.residency import pins
from kvstore.residency.device_hot import DeviceHot
from kvstore.residency.mover import Mover
from kvstore.residency.state import Residency
from kvstore.residency.transcode import made_entry

TOKEN_AXIS = 1


class WritePath:
    """Takes entries in. Any thread. config: in force for the next put."""

    def __init__(
        self, residency: Residency, mover: Mover, config: StoreConfig, device_hot: DeviceHot | None = None
    ) -> None:
        """device_hot: where hot is, unless it is in RAM."""
        self._r = residency
        self._mover = mover
        self.config = config
        self._device_hot = device_hot
        self.offer: Callable[[Sequence[Key], int], None] | None = None
        """Told of the chunks of a chain that were put, root first, and of their bytes as put."""

    def put(
        self, key: Key, tensors: Mapping[str, Any], options: PutOptions, parent: Key | None = None, *, own: bool
    ) -> bool:
        """Take one entry in. False: it names a parent that is not held, and nothing was copied."""
        if parent is not None and not self._continues(parent):
            return False
        return self._take_one(self._copied(key, tensors, options, own=own), options, parent)

    def take_entries(self, entries: Sequence[Entry], options: PutOptions, parent: Key | None, *, chain: bool) -> int:
        """Take in entries that are made already, under one key each, the last one first. Returns how many were stored.

        chain: as `put_chain`.
        """
        if len(entries) == 1 and not chain:
            return int(self._take_one(entries[0], options, None))
        now = self._r.clock.now()
        held = [(entry, self._meta(entry, options, now)) for entry in entries[::-1]]
        if not chain:
            return self._take_all(held, options)
        keys = [entry.key for entry in entries]
        return self.take_chain(keys, held, parent, pin=options.pin, namespace=options.namespace)

    def _take_all(self, held: Sequence[tuple[Entry, Meta]], options: PutOptions) -> int:
        """Take in entries that continue nothing, the first one first. A few new ones are taken at once if they fit."""
        r = self._r
        with r.lock:
            owners = {r.tenants.owner(entry.key, options.namespace) for entry, _ in held}
            at_once = self._device_hot is None and len(owners) == 1 and len(held) <= SLICE
            at_once = at_once and r.put_new(held, owners.pop())
        if not at_once:
            return sum([self._take_one(entry, options, None) for entry, _ in held])
        for entry, meta in held:
            if options.pin or meta.pinned_children:
                self._pin(entry.key, asked=options.pin)
        return len(held) - (0 if r.events is None else len(self._settle([entry.key for entry, _ in held])))

    def put_chain(
        self, entries: Sequence[tuple[Key, Mapping[str, Any]]], options: PutOptions, parent: Key | None, *, own: bool
    ) -> int:
        """Take a chain in, root first, which continues `parent`. Returns how many were stored; 0: parent is not held.

        Counts as use of the chunks before it.
        """
        copied = (self._copied(key, tensors, options, own=own) for key, tensors in reversed(entries))
        held = ((entry, self._meta(entry, options)) for entry in copied)
        return self.take_chain([key for key, _ in entries], held, parent, pin=options.pin, namespace=options.namespace)

    def take_chain(
        self,
        keys: Sequence[Key],
        deepest_first: Iterable[tuple[Entry, Meta]],
        parent: Key | None,
        *,
        pin: bool = False,
        namespace: str = "",
    ) -> int:
        """Like `put_chain`, of entries with their Metas. They may be made while they are taken, one at a time.

        A short list of new ones for which there is room is taken at once.
        """
        if not keys:
            return 0
        r, chained = self._r, _chained(deepest_first, keys, parent)
        if isinstance(deepest_first, list) and len(keys) <= SLICE and self._device_hot is None:
            chained = list(chained)
        with r.lock:
            if parent is not None and r.live(parent) is None:
                r.counters.refused_chunks += len(keys)
                return 0
            # A chain is one namespace's, whatever its later chunks are put under.
            owner = r.index[parent].owner if parent is not None else r.tenants.owner(keys[0], namespace)
            whole = isinstance(chained, list) and r.put_new(chained, owner)
        lost: list[Key] = []
        nbytes = 0
        rooted = whole and r.events is None
        try:
            for entry, meta in chained:
                if not whole:
                    meta.owner = owner
                    self._take(entry, meta)
                if pin or meta.pinned_children:  # or a pinned chunk continues it
                    self._pin(entry.key, asked=pin)
                nbytes += meta.value_nbytes
                rooted = rooted and meta.rooted
        finally:
            if not rooted:
                lost = self._settle(keys)
        if self.offer is not None:
            self.offer(keys, nbytes)
        if parent is not None:
            self._touch_upwards(parent)
        return len(keys) - len(lost)

    def take_from_outside(
        self, keys: Sequence[Key], deepest_first: Iterable[tuple[Entry, Meta]], parent: Key | None, namespace: str,
        wanted: Callable[[Key], bool],
    ) -> int:  # fmt: skip
        """Take in a chain that another host has put, below hot. Returns how many of its chunks are held, root first.

        What is held here already stays. wanted: asked under the lock, just before a chunk is installed.
        """
        r = self._r
        with r.lock:
            if parent is not None and r.live(parent) is None:
                return 0
            owner = r.index[parent].owner if parent is not None else r.tenants.owner(keys[0], namespace)
        for part in slices(keys):
            with r.lock:
                for key in part:
                    r.live(key)  # an expired one leaves now: later it would take along what continues it
        try:
            for entry, meta in _chained(deepest_first, keys, parent):
                meta.owner = owner
                try:
                    self._mover.admit_below(entry, meta, partial(wanted, entry.key))
                except OverQuota:
                    continue  # pinned meanwhile, or no room for its owner: what continues it goes with it
        finally:
            lost = set(self._settle(keys))
        return next((i for i, key in enumerate(keys) if key in lost), len(keys))

    def _touch_upwards(self, key: Key) -> None:
        """Count a chunk and those before it as used, nearest first, as many as a call could name."""
        r, at = self._r, key
        for start in range(0, KEYS_PER_CALL_MAX, SLICE):
            if start:
                pause()
            with r.lock:
                part = [at, *islice(r.chains.ancestors(at), SLICE - 1)]
                r.touch(part)
                meta = r.index.get(part[-1])
                if meta is None or meta.parent is None:
                    return
                at = meta.parent

    def _continues(self, parent: Key) -> bool:
        """Whether a chunk may continue `parent`; counted where it may not."""
        with self._r.lock:
            if self._r.live(parent) is not None:
                return True
            self._r.counters.refused_chunks += 1
            return False

    def _take_one(self, entry: Entry, options: PutOptions, parent: Key | None) -> bool:
        meta, r = self._meta(entry, options), self._r
        meta.parent = parent
        tickets: Sequence[int] | None = None
        with r.lock:
            above = None if parent is None else r.index.get(parent)
            meta.owner = above.owner if above is not None else r.tenants.owner(entry.key, options.namespace)
            if self._device_hot is None:
                tickets = () if r.put_new(((entry, meta),), meta.owner) else self._mover.admit_at_once(entry, meta)
        if tickets:
            self._mover.wait(tickets)
        elif tickets is None and self._device_hot is None:
            self._mover.admit_by_moving(entry, meta)
        elif tickets is None:
            self._take(entry, meta)
        if options.pin or meta.pinned_children:
            self._pin(entry.key, asked=options.pin)
        # A root is linked when it is taken; in a chain its parent may have left meanwhile.
        rooted = meta.parent is None or (tickets is not None and meta.rooted)
        stored = (rooted and r.events is None) or not self._settle((entry.key,))
        if stored and parent is not None and self.offer is not None:
            self.offer((entry.key,), meta.value_nbytes)
        return stored

    def _take(self, entry: Entry, meta: Meta) -> None:
        if self._device_hot is not None and entry.encoding == "raw":
            entry = self._device_hot.place(entry, meta.owner)
        self._mover.admit(entry, meta)

    def _pin(self, key: Key, *, asked: bool) -> None:
        """Pin what was put, because that was asked for, or because a pinned chunk continues it."""
        r = self._r
        try:
            pins.pin(r, [key], None)
        except OverQuota:
            if not asked:
                # Put again, the chunk is larger than the form that was pinned: what continues it loses its pin.
                pins.unpin_below(r, key)
                return
            with r.lock:
                r.forget(key, "over quota")
            raise

    def _settle(self, keys: Sequence[Key]) -> list[Key]:
        """Forget those whose parent did not arrive, or has left since; the keys that are gone with them."""
        r, gone = self._r, list[Key]()
        for part in slices(keys):  # root first: what is forgotten takes only keys with it that come later
            with r.lock:
                gone += [key for key in part if not self._rooted(key)]
                if r.events is not None:
                    self._announce(part)
        return gone

    def _rooted(self, key: Key) -> bool:
        """Note that all chunks before a key are there, if they are; False: the key is gone, or an orphan and forgotten.

        For the keys of a chain that came deepest first, root first. Under the lock.
        """
        r = self._r
        meta = r.index.get(key)
        if meta is not None and meta.parent is not None and not meta.rooted:
            before = r.index.get(meta.parent)
            if before is None:
                r.forget(key, "orphaned")
                return False
            meta.rooted = before.rooted
        return meta is not None and key not in r.leaving

    def _announce(self, keys: Sequence[Key]) -> None:
        """Tell routers of those that are held, what is continued before what continues it. Under the lock."""
        r = self._r
        assert r.events is not None
        for key in keys:
            place = None if r.is_gone(key) else r.lookup(key)
            if place is not None:
                r.events.stored(key, r.index[key].parent, CHUNK_TOKENS if place[1] is None else tokens_of(place[1]))

    def _copied(self, key: Key, tensors: Mapping[str, Any], options: PutOptions, *, own: bool) -> Entry:
        """An entry of a caller's tensors, copied unless they are handed over. Nothing is copied of what is refused."""
        if not isinstance(tensors, Mapping):
            raise InvalidEntry(f"tensors are a mapping of names to tensors, got {type(tensors).__name__}")
        tensors = dict(tensors)  # asked once: a mapping that makes its tensors may make others the second time
        if any_packed(tensors):
            return self._packed(key, tensors, options)
        described = {name: arrays.describe(name, x) for name, x in tensors.items()}
        specs = arrays.CheckedSpecs(described, self.config.entry_max_nbytes)
        self._check(specs.nbytes, options)
        return made_entry(key, specs, {name: self._owned(x, specs[name], own=own) for name, x in tensors.items()})

    def _packed(self, key: Key, tensors: Mapping[str, Any], options: PutOptions) -> Entry:
        """The same where some of the tensors are packed. They are checked as what comes over the network is."""
        if options.fidelity == "exact":
            raise InvalidEntry("fidelity exact is for values bit for bit as put, and packed ones have lost some")
        specs = {
            name: x.spec if isinstance(x, PackedTensor) else arrays.describe(name, x) for name, x in tensors.items()
        }
        with Blaming(InvalidEntry, "packed"):
            nbytes = arrays.check_specs(specs, self.config.entry_max_nbytes)
        self._check(nbytes, options)
        return copied_entry(key, tensors)

    def _meta(self, entry: Entry, options: PutOptions, now: float | None = None) -> Meta:
        """The Meta of a new value. now: of the store's clock, where the caller has looked. Raises as `_check`."""
        nbytes = entry.value_nbytes
        ttl, exact = self._check(nbytes, options), options.fidelity == "exact"
        if now is None:
            now = self._r.clock.now()
        return Meta(now, now + ttl, ttl, nbytes, sliding=options.sliding, exact=exact, soon=options.priority == "low")

    def _check(self, nbytes: int, options: PutOptions) -> float:
        """How many seconds a new value of `nbytes` lives.

        Raises InvalidEntry or EntryTooLarge for what only a store knows to be too much.
        """
        r = self._r
        if nbytes > r.hot.capacity_nbytes:
            largest = max(t.capacity_nbytes for t in (r.hot, r.warm, r.cold) if t is not None)
            if nbytes > largest and (options.fidelity == "exact" or nbytes > 9 * largest):
                raise EntryTooLarge(
                    f"an entry of {nbytes} bytes fits no tier, the largest has {largest}: put it in parts"
                )
        return self.config.ttl_s if options.ttl_s is None else check_ttl(options.ttl_s, self.config)

    def _owned(self, x: Any, spec: TensorSpec, *, own: bool) -> torch.Tensor:
        if type(x) is not torch.Tensor and not arrays.is_torch(x):
            # A numpy array is copied on the byte level: its NaN payloads and bfloat16 are bits like any other.
            return arrays.from_bytes(spec, arrays.as_bytes(x).copy(), "torch")  # type: ignore[no-any-return]
        try:
            if self._device_hot is not None and self._device_hot.is_here(x):
                arrays.check_storage(x)
                return x.detach()  # type: ignore[no-any-return]
            if type(x) is torch.Tensor:
                return self._owned_torch(x, own=own)
            plain = x.as_subclass(torch.Tensor)
            if arrays.describe("", plain) != spec:
                raise InvalidEntry(f"{type(x).__name__} says it is {spec}, and is {arrays.describe('', plain)}")
            return self._owned_torch(plain, own=own)
        except Exception as error:  # noqa: BLE001 - the boundary: a subclass may raise anything
            raise blamed(error, InvalidEntry, "tensor") from None

    def _owned_torch(self, x: torch.Tensor, *, own: bool) -> torch.Tensor:
        arrays.check_storage(x)
        dense = x.detach().resolve_conj().resolve_neg()
        if self._device_hot is not None:  # copied once, when there is room on the device
            return dense
        if own and dense.is_contiguous() and dense.device.type == "cpu":
            return dense
        return dense.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _chained(
    deepest_first: Iterable[tuple[Entry, Meta]], keys: Sequence[Key], parent: Key | None
) -> Iterable[tuple[Entry, Meta]]:
    """The entries of a chain, whose keys are these, root first, each one's Meta naming the chunk that it continues."""
    for (entry, meta), before in zip(deepest_first, reversed([parent, *keys[:-1]]), strict=True):
        meta.parent, meta.root = before, before is None
        yield entry, meta


def tokens_of(entry: Entry) -> int:
    """Tokens of a chunk, by the shape that keys and values have; a whole chunk where it is another one."""
    found = (spec.shape[TOKEN_AXIS] for spec in entry.specs.values() if len(spec.shape) == 4)
    return max(1, next(found, CHUNK_TOKENS))


def check_ttl(ttl_s: float, config: StoreConfig) -> float:
    """Seconds to live as asked for. Raises InvalidEntry."""
    if not 0 < ttl_s <= config.ttl_max_s:  # NaN included
        raise InvalidEntry(f"ttl_s must be over 0 and at most {config.ttl_max_s} seconds, got {ttl_s!r}")
    return float(ttl_s)
