"""kvstored as SGLang's third level of HiCache (0.5.23): a dynamic storage backend.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "kvstored", "module_path": "kvstored_client.integrations.sglang",
      "class_name": "KvstoredHiCache", "interface_v1": 1, "address": "unix:/run/kvstored/kvstored.sock"}'

SGLang's page hashes are chained and salted; model, ranks and layout are added to them here, so that another shard's or
layout's page is another key. Dtype and size are checked against the page that SGLang asks to fill.
Never raises on the data path: SGLang's controller threads take that for their end. Thread-safe.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard

logger = logging.getLogger(__name__)

T = TypeVar("T")
_KV = str(PoolName.KV)


class KvstoredHiCache(HiCacheStorage):
    """HiCache pages in kvstored: the generic, the zero-copy (v1) and the pool (v2) interfaces."""

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: dict[str, Any] | None = None) -> None:
        del kwargs
        extra = storage_config.extra_config or {}
        self._guard = Guard(
            extra.get("address"),
            lookup_timeout_s=float(extra.get("lookup_timeout_s", LOOKUP_TIMEOUT_S)),
            fetch_timeout_s=float(extra.get("fetch_timeout_s", FETCH_TIMEOUT_S)),
        )
        # "auto" lets pages become NF4 below hot; the default gives back every bit.
        self._fidelity: Fidelity = "auto" if extra.get("fidelity") == "auto" else "exact"
        self._identity = _identity(storage_config)
        self.registered_pools: dict[str, Any] = {}

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
        return self._safely(lambda: int(self._guard.match(self._keys(_KV, keys))), 0)

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
        pages = int(self._guard.match(self._keys(_KV, keys)))
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

    def _fill(self, pool_name: str, pool: Any, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        starts = _page_starts(pool, keys, host_indices)
        blank = [pool.get_dummy_flat_data_page() for _ in keys]
        done = []
        for start, page in zip(starts, self._pages(pool_name, keys, blank), strict=True):
            if page is not None:
                pool.set_from_flat_data_page(start, page)
            done.append(page is not None)
        return done

    def _take(self, pool_name: str, pool: Any, keys: list[str], host_indices: torch.Tensor) -> list[bool]:
        starts = _page_starts(pool, keys, host_indices)
        return self._keep(pool_name, keys, [pool.get_data_page(start, flat=True) for start in starts])

    def _pages(self, pool_name: str, keys: list[str], targets: Sequence[Any]) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for hit, target in zip(self._guard.get_many(self._keys(pool_name, keys)), targets, strict=True):
            page = None if hit is None else hit.tensors.get("page")
            if page is not None and target is not None:
                fits = page.dtype == target.dtype and page.numel() == target.numel()
                page = target.copy_(page.view(target.shape)) if fits else None
            found.append(page)
        return found

    def _keep(self, pool_name: str, keys: list[str], values: Sequence[torch.Tensor]) -> list[bool]:
        # Copies: a put given up at its deadline may still be reading when SGLang reuses the page.
        entries = [(k, {"page": v.clone()}) for k, v in zip(self._keys(pool_name, keys), values, strict=True)]
        stored = self._guard.put_many(entries, fidelity=self._fidelity)
        # The store puts a chain as a whole or not at all: what is uncertain is not called kept.
        return [stored == len(entries)] * len(entries)

    def _keys(self, pool_name: str, keys: list[str]) -> list[bytes]:
        base = f"{self._identity}\0{pool_name}\0"
        return [hashlib.sha256((base + key).encode()).digest() for key in keys]

    def _safely(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the boundary: SGLang's threads end with an exception
            logger.warning("answered as a miss: %s: %s", type(error).__name__, error)
            return otherwise


def _identity(config: HiCacheStorageConfig) -> str:
    """Whose pages these are. MLA models hold the same on all tensor-parallel ranks of a shard."""
    shard = [config.dcp_rank, config.dcp_size] if config.is_mla_model else [config.tp_rank, config.tp_size]
    fields = [
        "sglang", config.model_name, config.is_mla_model, shard, config.pp_rank, config.pp_size,
        config.attn_cp_rank, config.attn_cp_size, config.is_page_first_layout, config.should_split_heads,
        config.tp_lcm_size, config.logical_page_size, (config.extra_config or {}).get("namespace", ""),
    ]  # fmt: skip
    return json.dumps(fields)


def _page_starts(pool: Any, keys: list[str], host_indices: torch.Tensor | None) -> list[int]:
    """Where each page begins in the host pool. Raises ValueError where indices and keys do not fit."""
    page_size = int(getattr(pool, "page_size", 1) or 1)
    if host_indices is None or host_indices.numel() != len(keys) * page_size:
        n = 0 if host_indices is None else host_indices.numel()
        raise ValueError(f"{len(keys)} pages of {page_size} tokens need as many indices, got {n}")
    return [int(host_indices[i * page_size]) for i in range(len(keys))]
