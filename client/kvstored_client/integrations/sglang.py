"""kvstored as SGLang's third level of HiCache (0.5.23): a dynamic storage backend.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "kvstored", "module_path": "kvstored_client.integrations.sglang",
      "class_name": "KvstoredHiCache", "interface_v1": 1, "address": "unix:/run/kvstored/kvstored.sock"}'

SGLang's page hashes are chained and salted. Added to them is a digest of everything configured: the whole configuration
of the storage with all ranks and sizes, that of the server (model, dtypes, attention, LoRA, parallelism), and what the
host pool says of itself, its layout above all (`_HARMLESS` says what is left out). A pool of FP8 holds bytes, whatever
they mean: where SGLang has not published the server's configuration nothing is kept, unless `namespace` in the extra
config, the operator's word for it all, is set. Dtype and size are checked against the page that SGLang asks to fill.
Never raises on the data path: SGLang's controller threads take that for their end. Thread-safe.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sglang
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from kvstore.hit import Fidelity
from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import configured
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard

logger = logging.getLogger(__name__)

T = TypeVar("T")
_KV = str(PoolName.KV)
_PLACE = "where a process or its peers are, not what they compute"
_SIZE = "how much memory or how many requests, not what is in a page"
_WHEN = "when pages move, not what is in them"
_HARMLESS = {
    "HiCacheStorageConfig.enable_storage_metrics": "what is reported",
    "HiCacheStorageConfig.dp_rank": "replicas compute the same pages",
    "extra_config.address": _PLACE,
    "extra_config.lookup_timeout_s": "how long a call is waited for",
    "extra_config.fetch_timeout_s": "how long a call is waited for",
    "extra_config.prefill_tokens_per_s": "what is reported",
    "server.serving": "how requests come in and answers go out",
    "server.schedule": _SIZE,
    "server.observability": "what is reported",
    "server.disagg": _PLACE,
    "server.device": _PLACE,
    "_ConfigBag._fields": "the same values a second time",
    "_ConfigBag._subs": "the same values a second time",
    "_ConfigBag.nccl_port": _PLACE,
    "_ConfigBag.dist_init_addr": _PLACE,
    "_ConfigBag.dist_timeout": _PLACE,
    "_ConfigBag.gated_launch_port": _PLACE,
    "_ConfigBag.node_rank": _PLACE,
    "_ConfigBag.load_balance_method": _WHEN,
    "_ConfigBag.pp_max_micro_batch_size": _SIZE,
    "_ConfigBag.download_dir": _PLACE,
    "_ConfigBag.engine_info_bootstrap_port": _PLACE,
    "_ConfigBag.weight_cache_socket": _PLACE,
    "_ConfigBag.weight_cache_timeout": _PLACE,
    "_ConfigBag.hicache_ratio": _SIZE,
    "_ConfigBag.hicache_size": _SIZE,
    "_ConfigBag.hicache_host_memory_fraction": _SIZE,
    "_ConfigBag.hicache_write_policy": _WHEN,
    "_ConfigBag.hicache_storage_prefetch_policy": _WHEN,
    "_ConfigBag.hicache_storage_prefetch_retry_poll_interval": _WHEN,
    "_ConfigBag.hicache_storage_prefetch_retry_max_attempts": _WHEN,
    "_ConfigBag.hicache_storage_backend_extra_config": "in already, as extra_config",
    "_ConfigBag.watermark_key": "a password",
    "_ConfigBag.watermark_key_b": "a password",
}
"""All of the configuration that is not in the identity. What is not here is in it, other versions' fields included."""
_POOL_HARMLESS = {
    "*.size": _SIZE,
    "*.page_num": _SIZE,
    "*.logical_size": _SIZE,
    "*.device_capacity_tokens": _SIZE,
    "*.num_release_slots": _SIZE,
    "*.device": _PLACE,
    "*.fd": _PLACE,
    "*.pin_memory": _PLACE,
    "*.can_use_write_back_jit": "how pages are copied",
}
"""The same of a host pool's plain attributes."""


class KvstoredHiCache(HiCacheStorage):
    """HiCache pages in kvstored: the generic, the zero-copy (v1) and the pool (v2) interfaces."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        del kwargs
        extra = storage_config.extra_config or {}
        self._guard = Guard(
            extra.get("address"),
            lookup_timeout_s=float(extra.get("lookup_timeout_s", LOOKUP_TIMEOUT_S)),
            fetch_timeout_s=float(extra.get("fetch_timeout_s", FETCH_TIMEOUT_S)),
            prefill_tokens_per_s=float(extra.get("prefill_tokens_per_s", 0.0)),
        )
        # "auto" lets pages become NF4 below hot; the default gives back every bit.
        self._fidelity: Fidelity = "auto" if extra.get("fidelity") == "auto" else "exact"
        self._root = self._understood(lambda: _identity(storage_config))
        self._pools: dict[str, bytes | None] = {}
        self.registered_pools: dict[str, Any] = {}

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The host pool of KV pages."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[_KV] = self._pool_root(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A host pool beside it, or it again."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pools[str(host_pool_name)] = self._pool_root(str(host_pool_name), host_pool)

    def _pool_root(self, name: str, pool: Any) -> bytes | None:
        facts = configured.plain_attributes(pool, _POOL_HARMLESS)
        whole = {"root": self._root, "pool": name, "facts": facts}
        return self._root and self._understood(lambda: configured.digest("sglang-pool", whole))

    def _understood(self, work: Callable[[], bytes]) -> bytes | None:
        try:
            return work()
        except configured.NoStableForm as error:
            logger.warning("running without the store: %s", error)
            return None

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """The page under a key, in `target_location` where that is given; None on a miss."""
        return self.batch_get([key], [target_location], target_sizes)[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Pages in the order of keys."""
        del target_sizes
        targets = list(target_locations) if target_locations is not None else [None] * len(keys)
        return self._safely(lambda: self._pages(_KV, keys, targets), [None] * len(keys))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Keep a page. False: it was not taken."""
        return self.batch_set([key], [value], target_location, target_sizes)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Keep pages, first ones first. False: not all were taken."""
        del target_locations, target_sizes
        return self._safely(lambda: all(self._keep(_KV, keys, values)), otherwise=False)

    def exists(self, key: str) -> bool:
        """Whether a page is held."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are held."""
        del extra_info
        return self._safely(lambda: self._leading(keys), 0)

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Fill pages of the host pool. Returns which were."""
        del extra_info
        return self._safely(lambda: self._fill(_KV, self.mem_pool_host, keys, host_indices), [False] * len(keys))

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        """Keep pages of the host pool. Returns which were taken."""
        del extra_info
        return self._safely(lambda: self._take(_KV, self.mem_pool_host, keys, host_indices), [False] * len(keys))

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[PoolTransfer] | None = None, extra_info: Any = None
    ) -> PoolTransferResult:
        """The longest prefix that all pools can restore, by their policies."""
        del extra_info
        return self._safely(lambda: self._exists_in_pools(keys, pool_transfers or []), PoolTransferResult.empty())

    def batch_get_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        """Fill pages of several pools."""
        del extra_info
        return self._each_pool(transfers, self._fill)

    def batch_set_v2(self, transfers: list[PoolTransfer], extra_info: Any = None) -> dict[str, list[bool]]:
        """Keep pages of several pools."""
        del extra_info
        return self._each_pool(transfers, self._take)

    def get_stats(self) -> None:
        """None: the daemon's own metrics say more."""

    def _each_pool(
        self, transfers: list[PoolTransfer], work: Callable[[str, Any, list[str], torch.Tensor], list[bool]]
    ) -> dict[str, list[bool]]:
        done = {}
        for transfer in transfers:
            keys = transfer.keys or []

            def one(transfer: PoolTransfer = transfer, keys: list[str] = keys) -> list[bool]:
                return work(str(transfer.name), self.registered_pools[transfer.name], keys, transfer.host_indices)

            done[transfer.name] = self._safely(one, [False] * len(keys))
        return done

    def _exists_in_pools(self, keys: list[str], transfers: list[PoolTransfer]) -> PoolTransferResult:
        pages = self._leading(keys)
        hits: dict[str, int] = {PoolName.KV: pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in transfers:
            if not restorable:
                break
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # a second form of pages that are there in full: it never gates, and is not kept here
            held = [at is not None for at in self._guard.locate(self._keys(str(transfer.name), keys[:pages]))]
            trailing = pages
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                trailing = max(1, len(transfer.keys or []))
            usable = {n for n in range(1, pages + 1) if all(held[max(0, n - trailing) : n])}
            if usable:
                hits[transfer.name] = max(usable)
            restorable = [n for n in restorable if n in usable]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    def _leading(self, keys: list[str]) -> int:
        """Leading KV pages held: the lookup of a prompt, as SGLang makes it."""
        tokens = self._page_tokens()
        lookup = Lookup(len(keys), len(keys) * tokens, tokens)
        return int(self._guard.match(self._keys(_KV, keys), lookup=lookup))

    def _page_tokens(self) -> int:
        """Tokens of a KV page; 0 where SGLang has not said."""
        return int(getattr(getattr(self, "mem_pool_host", None), "page_size", 0) or 0)

    def _fill(self, pool_name: str, pool: Any, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        starts = _page_starts(pool, keys, host_indices)
        blank: Any = pool.get_dummy_flat_data_page() if keys else None

        def fill(at: int, page: torch.Tensor) -> bool | None:
            if page.dtype != blank.dtype or page.numel() != blank.numel():
                return None
            pool.set_from_flat_data_page(starts[at], page.view(blank.shape))
            return True

        return [done is not None for done in self._read(pool_name, keys, fill)]

    def _take(self, pool_name: str, pool: Any, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        starts = _page_starts(pool, keys, host_indices)
        return self._keep(pool_name, keys, [pool.get_data_page(start, flat=True) for start in starts])

    def _pages(self, pool_name: str, keys: list[str], targets: Sequence[Any]) -> list[torch.Tensor | None]:
        def copy(at: int, page: torch.Tensor) -> torch.Tensor | None:
            target: torch.Tensor | None = targets[at]
            if target is None:
                return page.clone()
            fits = page.dtype == target.dtype and page.numel() == target.numel()
            return target.copy_(page.view(target.shape)) if fits else None

        return self._read(pool_name, keys, copy)

    def _read(self, pool_name: str, keys: list[str], use: Callable[[int, torch.Tensor], T | None]) -> list[T | None]:
        """What `use` makes of each page that is held, out of the store's own memory; None: it does not fit."""
        found: list[T | None] = []
        began = time.perf_counter()
        with self._guard.lease_many(self._keys(pool_name, keys), lookup=ELSEWHERE) as hits:
            for at, hit in enumerate(hits):
                page = None if hit is None else hit.tensors.get("page")
                found.append(None if page is None else use(at, page))
                del hit, page
        if pool_name == _KV:
            pages = sum(one is not None for one in found)
            self._guard.restored(pages * self._page_tokens(), time.perf_counter() - began)
        return found

    def _keep(self, pool_name: str, keys: list[str], values: Sequence[torch.Tensor]) -> list[bool]:
        # Copies: a put given up at its deadline may still be reading when SGLang reuses the page.
        pages = self._guard.copies(values)
        entries = [(k, {"page": page}) for k, page in zip(self._keys(pool_name, keys), pages, strict=True)]
        stored = self._guard.put_many(entries, fidelity=self._fidelity)
        # The store puts a chain as a whole or not at all: what is uncertain is not called kept.
        return [stored == len(entries)] * len(entries)

    def _keys(self, pool_name: str, keys: list[str]) -> list[bytes]:
        """Our keys for SGLang's. Raises _Off where nothing is kept of this pool."""
        root = self._pools.get(pool_name, self._root)
        if root is None:
            raise _Off(pool_name)
        base = root + pool_name.encode() + b"\0"
        return [hashlib.sha256(base + key.encode()).digest() for key in keys]

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except _Off:  # said when it was found out
            return otherwise
        except Exception as error:  # noqa: BLE001 - the boundary: SGLang's threads end with an exception
            logger.warning("answered as a miss: %s: %s", type(error).__name__, error)
            return otherwise


class _Off(Exception):
    """Nothing is kept of this pool."""


def _identity(config: HiCacheStorageConfig) -> bytes:
    """Whose pages these are. Raises NoStableForm. MLA models hold the same on all tensor-parallel ranks of a shard."""
    whole = {"version": sglang.__version__, "storage": config, "server": _server()}
    if whole["server"] is None and not (config.extra_config or {}).get("namespace"):
        raise configured.NoStableForm("SGLang has not published its configuration, and no namespace is set")
    harmless = {**_HARMLESS, "HiCacheStorageConfig.tp_rank": "MLA: the same on all ranks"}
    return configured.digest("sglang", whole, harmless if config.is_mla_model else _HARMLESS)


def _server() -> dict[str, Any] | None:
    """The server's resolved configuration by namespace; None where this process has none."""
    try:
        from sglang.srt.runtime_context import get_context

        return dict(get_context()._config_bags) or None  # noqa: SLF001 - public access asks for each by name
    except (ImportError, AttributeError, TypeError):
        return None


def _page_starts(pool: Any, keys: list[str], host_indices: torch.Tensor | None) -> list[int]:
    """Where each page begins in the host pool. Raises ValueError where indices and keys do not fit."""
    page_size = int(getattr(pool, "page_size", 1) or 1)
    if host_indices is None or host_indices.numel() != len(keys) * page_size:
        n = 0 if host_indices is None else host_indices.numel()
        raise ValueError(f"{len(keys)} pages of {page_size} tokens need as many indices, got {n}")
    return [int(host_indices[i * page_size]) for i in range(len(keys))]
