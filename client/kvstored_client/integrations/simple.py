"""The drop-in Python API: keys and values by prefix and layer, for programs that call the model themselves.

    cache = SimpleKVCache(max_cache_size_mb=512)            # embedded: tensors exactly as given
    cache = QuantizedKVCache(max_cache_size_mb=512)         # embedded: NF4, 3.7 (float32: 7.4) times as many
    cache = HybridKVCache(max_cache_size_mb=512)            # recent ones exact, the others NF4
    cache = SimpleKVCache(address="unix:/run/kvstored.sock")   # the same, in the daemon

    pair = cache.get_cached_kv(prefix, layer)
    if pair is None:
        k, v = compute(...)
        cache.cache_kv(prefix, layer, k, v)

A prefix is text, bytes or token ids. A key is the SHA-256 of namespace, prefix and layer: caches of different models
need different namespaces. The store behind it is `kvstore` in all cases; a daemon that is down means misses.
Thread-safe.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.hit import Fidelity
from kvstore.keys import token_bytes
from kvstore.store import Store
from kvstored_client.integrations.guard import Guard

MB = 1 << 20
COSTS_MAX = 65_536
"""Prefixes whose cost is remembered: what they saved is counted, what older ones save is not."""
Prefix = str | bytes | Sequence[int]


class _KVCache:
    """What the three caches have in common; they differ in how an entry is held."""

    _kind = ""
    _fidelity: Fidelity = "auto"
    _demotes = False

    def __init__(
        self,
        max_cache_size_mb: float = 1024,
        *,
        ttl_seconds: float = 3600,
        device: str = "cpu",
        namespace: str = "",
        address: str | None = None,
        cache: Any = None,
    ) -> None:
        if not max_cache_size_mb > 0:
            raise ValueError(f"max_cache_size_mb must be over 0, got {max_cache_size_mb!r}")
        self._device = torch.device(device)
        self._ttl_s = float(ttl_seconds)
        self._namespace = namespace
        self._own = Store.open(self._config(int(max_cache_size_mb * MB))) if address is None and cache is None else None
        # Embedded there is no one to wait for: a lookup takes what a copy takes.
        self._guard = cache if isinstance(cache, Guard) else Guard(self._own or cache or address, lookup_timeout_s=0.5)
        self._lock = threading.Lock()
        self._hits = self._misses = 0
        self._held: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # key: bytes as put, bytes as held
        self._costs: OrderedDict[bytes, tuple[float, int]] = OrderedDict()  # prefix: seconds, layers
        self._missed_at: OrderedDict[bytes, float] = OrderedDict()
        self._saved_s = 0.0

    def __repr__(self) -> str:
        told = f"{len(self._held):,} put, {self._hits:,} hits, {self._misses:,} misses"
        return f"{type(self).__name__}({told}, in {self._guard.cache!r})"

    def _config(self, capacity_nbytes: int) -> StoreConfig:
        raise NotImplementedError

    def cache_kv(self, prefix: Prefix, layer: int, k_tensor: torch.Tensor, v_tensor: torch.Tensor) -> bool:
        """Keep K and V of a prefix at a layer. False: the cache did not take it."""
        key, digest = self._key(prefix, layer)
        # Copies: a put that missed its deadline may still read when the caller reuses its tensors.
        tensors = {"k": k_tensor.detach().clone(), "v": v_tensor.detach().clone()}
        guard, cache = self._guard, self._guard.cache

        def put() -> int | None:
            if not cache.put(key, tensors, ttl_s=self._ttl_s, fidelity=self._fidelity):
                return None
            if self._demotes:
                cache.demote(key)
            return sum(info.tier_nbytes[:1]) if (info := cache.inspect(key)) is not None else None

        now = time.perf_counter()
        held = guard.call(put, guard.fetch_timeout_s, None)
        with self._lock:
            self._note_cost(digest, now)
            if held is None:
                return False
            nbytes = sum(x.numel() * x.element_size() for x in tensors.values())
            self._held[key] = (nbytes, held)
            _trim(self._held)
        return True

    def get_cached_kv(self, prefix: Prefix, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(k, v) on the cache's device, or None."""
        start = time.perf_counter()
        key, digest = self._key(prefix, layer)
        hit = self._guard.get(key)
        with self._lock:
            if hit is None or "k" not in hit.tensors or "v" not in hit.tensors:
                self._misses += 1
                self._held.pop(key, None)
                self._missed_at.setdefault(digest, time.perf_counter())
                _trim(self._missed_at)
                return None
            self._hits += 1
            seconds, layers = self._costs.get(digest, (0.0, 1))
            saved_s = max(0.0, seconds / layers - (time.perf_counter() - start))
            self._saved_s += saved_s
        self._guard.report(prefill_saved_s=saved_s)
        return hit.tensors["k"].to(self._device), hit.tensors["v"].to(self._device)

    def get_stats(self) -> dict[str, float]:
        """Counters of this object.

        memory_saved_mb: bytes as given less bytes as held, of what it put and has not found missing.
        total_time_saved_seconds: for each hit, its share of the time from the prefix's first miss to its first
        cache_kv, less the time of the get.
        """
        with self._lock:
            asked = self._hits + self._misses
            given, held = (sum(pair[i] for pair in self._held.values()) for i in (0, 1))
            return {
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate_percent": 100.0 * self._hits / asked if asked else 0.0,
                "entries": len(self._held),
                "memory_used_mb": held / MB,
                "memory_saved_mb": max(0, given - held) / MB,
                "total_time_saved_seconds": self._saved_s,
            }

    def clear(self) -> None:
        """Forget what this object put."""
        with self._lock:
            keys = list(self._held)
            self._held.clear()
        for start in range(0, len(keys), 1024):
            self._guard.delete(*keys[start : start + 1024])

    def close(self) -> None:
        """Give the embedded store back, or end the connection."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _key(self, prefix: Prefix, layer: int) -> tuple[bytes, bytes]:
        """The entry's key and its prefix's digest."""
        if isinstance(prefix, str):
            data = b"t" + prefix.encode()
        elif isinstance(prefix, bytes | bytearray):
            data = b"b" + bytes(prefix)
        else:
            data = b"i" + token_bytes(prefix)
        if layer < 0:
            raise ValueError(f"a layer is a whole number from 0, got {layer!r}")
        space = hashlib.sha256(f"{self._kind}\0{self._namespace}".encode()).digest()
        digest = hashlib.sha256(space + data).digest()
        return hashlib.sha256(digest + layer.to_bytes(8, "little")).digest(), digest

    def _note_cost(self, digest: bytes, now: float) -> None:
        missed_at = self._missed_at.pop(digest, None)
        if missed_at is not None:
            self._costs[digest] = (now - missed_at, 0)
        if digest in self._costs:
            seconds, layers = self._costs[digest]
            self._costs[digest] = (seconds, layers + 1)
        _trim(self._costs)


class SimpleKVCache(_KVCache):
    """Tensors exactly as given, in memory; the least recently used go when it is full."""

    _kind = "simple"
    _fidelity = "exact"

    def _config(self, capacity_nbytes: int) -> StoreConfig:
        return StoreConfig(hot=HotConfig(capacity_nbytes, str(self._device)), warm=WarmConfig(0))


class QuantizedKVCache(_KVCache):
    """Tensors as NF4 from the start: 3.7 times as many in the same memory (float32: 7.4), nearly the same values."""

    _kind = "quantized"
    _demotes = True

    def _config(self, capacity_nbytes: int) -> StoreConfig:
        # Hot is only the door: an entry is encoded before cache_kv returns, and never promoted.
        return StoreConfig(hot=HotConfig(256 * MB), warm=WarmConfig(capacity_nbytes), promote_after=0)


class HybridKVCache(_KVCache):
    """The two as one: recently used entries exact, the others as NF4, each with a share of the memory."""

    _kind = "hybrid"

    def __init__(self, max_cache_size_mb: float = 1024, *, exact_share: float = 0.25, **options: Any) -> None:
        if not 0 < exact_share < 1:
            raise ValueError(f"exact_share must be over 0 and under 1, got {exact_share!r}")
        self._exact_share = exact_share
        super().__init__(max_cache_size_mb, **options)

    def _config(self, capacity_nbytes: int) -> StoreConfig:
        exact_nbytes = int(capacity_nbytes * self._exact_share)
        hot = HotConfig(exact_nbytes, str(self._device))
        return StoreConfig(hot=hot, warm=WarmConfig(capacity_nbytes - exact_nbytes))


def _trim(found: "OrderedDict[bytes, Any]") -> None:
    while len(found) > COSTS_MAX:
        found.popitem(last=False)
