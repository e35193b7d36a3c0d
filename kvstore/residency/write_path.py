"""The write side: what may come in, as what, and where it belongs in its chain.

Everything that can be refused is refused before a byte is copied. A chunk whose parent is not held is not taken:
nothing could ever match it. A chain is put deepest first, so that the root ends most recently used; until its parents
arrive a chunk waits for them, and if they do not arrive it is forgotten again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore import arrays
from kvstore.boundary import blamed
from kvstore.config import StoreConfig
from kvstore.entries.arriving import ArrivingTensors
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge, InvalidEntry, OverQuota
from kvstore.hit import FIDELITIES, PRIORITIES, Fidelity, Priority
from kvstore.keys import Key, check_key, check_namespace
from kvstore.metadata.meta import Meta
from kvstore.residency import pins
from kvstore.residency.mover import Mover
from kvstore.residency.state import Residency
from kvstore.residency.transcode import raw_entry


@dataclass(frozen=True, slots=True)
class PutOptions:
    """How to keep what is put; `Store.put` says what each means."""

    ttl_s: float | None = None
    sliding: bool = True
    pin: bool = False
    fidelity: Fidelity = "auto"
    own: bool = False
    priority: Priority = "normal"
    namespace: str = ""


class WritePath:
    """Takes entries in. Any thread."""

    def __init__(self, residency: Residency, mover: Mover, config: StoreConfig, device: torch.device) -> None:
        self._r = residency
        self._mover = mover
        self._config = config
        self._device = device

    def put(self, key: bytes, tensors: Mapping[str, Any], options: PutOptions, parent: bytes | None = None) -> bool:
        """Take one entry in. False: it names a parent that is not held."""
        at, before = Key(check_key(key)), None if parent is None else Key(check_key(parent))
        with self._r.lock:
            if before is not None and self._r.live(before) is None:
                self._r.counters.refused_chunks += 1
                return False
        entry, meta = self._admissible(at, tensors, options)
        meta.parent = before
        with self._r.lock:
            above = None if before is None else self._r.index.get(before)
            meta.owner = above.owner if above is not None else self._r.tenants.owner(entry.key, options.namespace)
        self._take(entry, meta, pin=options.pin)
        return not self._settle([at])

    def put_chain(
        self, entries: Sequence[tuple[bytes, Mapping[str, Any]]], options: PutOptions, parent: bytes | None
    ) -> int:
        """Take a chain in, root first, which continues `parent`. Returns how many were stored; 0: parent is not held.

        Counts as use of the chunks before it.
        """
        if not entries:
            return 0
        batch = [(Key(check_key(key)), tensors) for key, tensors in entries]
        keys = [key for key, _ in batch]
        made = (self._admissible(key, tensors, options) for key, tensors in reversed(batch))
        before = None if parent is None else Key(check_key(parent))
        return self.take_chain(keys, made, before, pin=options.pin, namespace=options.namespace)

    def take_chain(
        self,
        keys: Sequence[Key],
        deepest_first: Iterable[tuple[Entry, Meta]],
        parent: Key | None,
        *,
        pin: bool = False,
        namespace: str = "",
    ) -> int:
        """Like `put_chain`, of entries made already, or while they are taken: only one need be in memory at a time."""
        r = self._r
        with r.lock:
            if parent is not None and r.live(parent) is None:
                r.counters.refused_chunks += len(keys)
                return 0
            # A chain is one namespace's, whatever its later chunks are put under.
            owner = r.index[parent].owner if parent is not None else r.tenants.owner(keys[0], namespace)
        lost: list[Key] = []
        try:
            for (entry, meta), before in zip(deepest_first, reversed([parent, *keys[:-1]]), strict=True):
                meta.parent, meta.root = before, before is None
                meta.owner = owner
                self._take(entry, meta, pin=pin)
        finally:
            lost = self._settle(keys)
        with r.lock:
            if parent is not None:
                r.touch([parent, *r.chains.ancestors(parent)])
        return len(keys) - len(lost)

    def _take(self, entry: Entry, meta: Meta, *, pin: bool) -> None:
        r = self._r
        self._mover.admit(entry, meta)
        with r.lock:
            r.counters.puts += 1
            r.counters.put_nbytes += meta.value_nbytes
            if not (pin or pins.continued_by_a_pin(r, entry.key)):
                return
            try:
                pins.pin(r, [entry.key], None)
            except OverQuota:
                if pin:
                    r.forget(entry.key, "over quota")
                    raise
                # Put again, the chunk is larger than the form that was pinned: what continues it loses its pin.
                for key in r.chains.descendants(entry.key):
                    r.unpin(key)

    def _settle(self, keys: Sequence[Key]) -> list[Key]:
        """Forget those whose parent did not arrive, or has left since; the keys that are gone with them."""
        r = self._r
        with r.lock:
            index = r.index
            for key in keys:
                meta = index.get(key)
                if meta is not None and meta.parent is not None and meta.parent not in index:
                    r.forget(key, "orphaned")
            return [key for key in keys if key not in index]

    def _admissible(self, key: Key, tensors: Mapping[str, Any], options: PutOptions) -> tuple[Entry, Meta]:
        ttl = self._config.ttl_s if options.ttl_s is None else check_ttl(options.ttl_s, self._config)
        if options.fidelity not in FIDELITIES:
            raise InvalidEntry(f"fidelity must be one of {', '.join(FIDELITIES)}, got {options.fidelity!r}")
        if options.priority not in PRIORITIES:
            raise InvalidEntry(f"priority must be one of {', '.join(PRIORITIES)}, got {options.priority!r}")
        check_namespace(options.namespace)
        if not isinstance(tensors, Mapping):
            raise InvalidEntry(f"tensors are a mapping of names to tensors, got {type(tensors).__name__}")
        exact = options.fidelity == "exact"
        arriving = tensors if isinstance(tensors, ArrivingTensors) else None  # checked by the door it came through
        if arriving is None:
            tensors = dict(tensors)  # asked once: a mapping that makes its tensors may make others the second time
            specs = {name: arrays.describe(name, x) for name, x in tensors.items()}
            nbytes = arrays.check_specs(specs, self._config.entry_max_nbytes)
        else:
            nbytes = arriving.value_nbytes
        r = self._r
        largest = max(t.capacity_nbytes for t in (r.hot, r.warm, r.cold) if t is not None)
        if nbytes > largest and (exact or nbytes > 9 * largest):
            raise EntryTooLarge(f"an entry of {nbytes} bytes fits no tier, the largest has {largest}: put it in parts")
        now = r.clock.now()
        meta = Meta(now, now + ttl, ttl, nbytes, sliding=options.sliding, exact=exact, soon=options.priority == "low")
        if arriving is not None:
            return Entry(key, arriving), meta
        held = {name: self._owned(x, own=options.own) for name, x in tensors.items()}
        return raw_entry(key, held), meta

    def _owned(self, x: Any, *, own: bool) -> torch.Tensor:
        if not arrays.is_torch(x):
            info = arrays.describe("", x)
            # A numpy array is copied on the byte level: its NaN payloads and bfloat16 are bits like any other.
            return arrays.from_bytes(info, arrays.as_bytes(x).copy(), "torch").to(self._device)  # type: ignore[no-any-return]
        try:
            return self._owned_torch(x if type(x) is torch.Tensor else x.as_subclass(torch.Tensor), own=own)
        except Exception as error:  # noqa: BLE001 - the boundary: a subclass may raise anything
            raise blamed(error, InvalidEntry, "tensor") from None

    def _owned_torch(self, x: torch.Tensor, *, own: bool) -> torch.Tensor:
        arrays.check_storage(x)
        dense = x.detach().resolve_conj().resolve_neg()
        if own and dense.is_contiguous() and dense.device == self._device:
            return dense
        return dense.to(self._device, copy=True, memory_format=torch.contiguous_format)


def check_ttl(ttl_s: float, config: StoreConfig) -> float:
    """Seconds to live as asked for. Raises InvalidEntry."""
    if not 0 < ttl_s <= config.ttl_max_s:  # NaN included
        raise InvalidEntry(f"ttl_s must be over 0 and at most {config.ttl_max_s} seconds, got {ttl_s!r}")
    return float(ttl_s)
