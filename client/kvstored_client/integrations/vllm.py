"""kvstored as a KV connector of vLLM 0.32: blocks are kept as they are filled and loaded before a prefill.

    --kv-transfer-config '{"kv_connector": "KvstoredConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvstored_client.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": "unix:/run/kvstored/kvstored.sock"}}'

Set the policy: vLLM's default ("fail") ends a request whose block was there at the lookup and is gone at the load.
Keys come from `request.block_hashes`, which cover salt, LoRA and embeddings, never from token ids. All ranks' shards
of a block must be held for it to count. A block is one entry of all layers as they lie in the paged buffer, K and V
packed or not, and moved as bytes of their dtype.
Only full attention in one cache group; other models run without the store. Never raises into the engine.
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvstore.hit import Fidelity
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard

logger = logging.getLogger(__name__)

_UNDERSTOOD = ("FullAttentionSpec", "MLAAttentionSpec")
_APART_DIM = 5
"""(blocks, 2, tokens, heads, head_dim)."""
_BLOCKS_PER_FETCH = 8
"""Blocks of one call: a block of 128 tokens has 5 MB or more, and a fetch has a deadline."""


@dataclass
class _Work(KVConnectorMetadata):
    """What a step's worker loads and keeps: block hashes and where the blocks are."""

    loads: list[tuple[bytes, int]] = field(default_factory=list)
    saves: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass
class _Tracked:
    """A request in the scheduler: its blocks so far, and how many leading ones need no saving."""

    request: Any
    saved: int = 0
    first_load: int = 0
    blocks: list[int] = field(default_factory=list)


class KvstoredConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in the scheduler, one in each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config or {}
        self._guard = Guard(
            extra.get("address"),
            lookup_timeout_s=float(extra.get("lookup_timeout_s", LOOKUP_TIMEOUT_S)),
            fetch_timeout_s=float(extra.get("fetch_timeout_s", FETCH_TIMEOUT_S)),
        )
        # "auto" lets blocks become NF4 below hot; the default gives back every bit.
        self._fidelity: Fidelity = "auto" if extra.get("fidelity") == "auto" else "exact"
        self._block_size = int(vllm_config.cache_config.block_size)
        parallel = vllm_config.parallel_config
        self._ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        self._rank = int(getattr(parallel, "rank", 0)) % self._ranks
        self._root = _identity(vllm_config, extra)
        self._on = _understood(kv_cache_config)
        if not self._on:
            logger.warning("this model's cache is not one group of full attention: running without the store")
        self._head_dim = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.head_size) if self._on else 0
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[tuple[bytes, int]] = []
        self._layers: dict[str, torch.Tensor] = {}
        self._failed: set[int] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """No: a cache. A put that is dropped is a later miss, and no request is computed anew for it."""
        return False

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that can be loaded beyond those computed; never the last token, which must be run."""
        if not self._on:
            return 0, False
        try:
            hashes = self._hashes(request)[: (request.num_tokens - 1) // self._block_size]
            held = self._held(hashes)
        except Exception:
            logger.exception("a lookup failed")
            return 0, False
        first = num_computed_tokens // self._block_size
        self._tracked[request.request_id] = _Tracked(request, saved=held, first_load=first)
        return max(0, held - first) * self._block_size, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember which blocks the loaded tokens go to."""
        tracked = self._tracked.get(request.request_id)
        if not self._on or tracked is None or num_external_tokens <= 0:
            return
        ids = blocks.get_block_ids()[0]
        last = tracked.first_load + num_external_tokens // self._block_size
        hashes = self._hashes(request)
        self._loads += [(hashes[i], ids[i]) for i in range(tracked.first_load, last)]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads, and the blocks that it fills."""
        work = _Work(loads=self._loads)
        self._loads = []
        if not self._on:
            return work
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self._note(new.req_id, new.block_ids, fresh=True)
            work.saves += self._filled(new.req_id, new.num_computed_tokens + scheduled.get(new.req_id, 0))
        old = scheduler_output.scheduled_cached_reqs
        for i, name in enumerate(old.req_ids):
            self._note(name, old.new_block_ids[i], fresh=name in old.resumed_req_ids)
            work.saves += self._filled(name, old.num_computed_tokens[i] + scheduled.get(name, 0))
        return work

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed at once: what is being put was copied."""
        del block_ids
        self._tracked.pop(request.request_id, None)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished."""
        del block_ids
        return self.request_finished(request, [])

    def _hashes(self, request: Any) -> list[bytes]:
        return [bytes(found) for found in request.block_hashes]

    def _held(self, hashes: list[bytes]) -> int:
        """Leading blocks of which every rank's shard is held."""
        if not hashes:
            return 0
        return min(int(self._guard.match([self._key(h, rank) for h in hashes])) for rank in range(self._ranks))

    def _note(self, name: str, block_ids: Any, *, fresh: bool) -> None:
        tracked = self._tracked.get(name)
        if tracked is None or block_ids is None:
            return
        # A request that comes back after a preemption has a fresh list of blocks.
        tracked.blocks = [*([] if fresh else tracked.blocks), *block_ids[0]]

    def _filled(self, name: str, tokens: int) -> list[tuple[bytes, int]]:
        """Blocks that are full after this step and were not saved before."""
        tracked = self._tracked.get(name)
        if tracked is None:
            return []
        hashes = self._hashes(tracked.request)
        full = min(tokens // self._block_size, len(hashes), len(tracked.blocks))
        found = [(hashes[i], tracked.blocks[i]) for i in range(tracked.saved, full)]
        tracked.saved = max(tracked.saved, full)
        return found

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The paged buffers: block is their first dimension."""
        self._layers = dict(sorted(kv_caches.items()))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill this step's blocks; those that are gone are reported as load errors."""
        del forward_context, kwargs
        work = self._get_connector_metadata()
        loads = work.loads if isinstance(work, _Work) else []
        for start in range(0, len(loads), _BLOCKS_PER_FETCH):
            part = loads[start : start + _BLOCKS_PER_FETCH]
            hits = self._guard.get_many([self._key(found, self._rank) for found, _ in part])
            for (_, block), hit in zip(part, hits, strict=True):
                if hit is None or not self._filled_block(block, hit.tensors):
                    self._failed.add(block)

    def _filled_block(self, block: int, tensors: Any) -> bool:
        targets = self._parts(block)
        if {n: (t.shape, t.dtype) for n, t in targets.items()} != {n: (t.shape, t.dtype) for n, t in tensors.items()}:
            return False
        for name, target in targets.items():
            target.copy_(tensors[name])
        return True

    def _parts(self, block: int) -> dict[str, torch.Tensor]:
        """One block's view of each layer, under names that say what is K and what is V: codecs below hot go by them."""
        parts = {}
        for i, layer in enumerate(self._layers.values()):
            if layer.shape[-1] == 2 * self._head_dim:
                parts[f"kv.{i}"] = layer[block]  # side by side in the last dimension
            elif layer.dim() == _APART_DIM and layer.shape[1] == 2:  # K and V
                parts[f"k.{i}"], parts[f"v.{i}"] = layer[block]
            else:
                parts[str(i)] = layer[block]  # MLA: one latent for both
        return parts

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are done before the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the forward."""

    def wait_for_save(self) -> None:
        """Copy the blocks that this step filled; they are put on another thread."""
        work = self._get_connector_metadata()
        saves = work.saves if isinstance(work, _Work) else []
        for found, block in saves:
            tensors = {name: part.detach().to("cpu", copy=True) for name, part in self._parts(block).items()}
            nbytes = sum(part.numel() * part.element_size() for part in tensors.values())
            entry = [(self._key(found, self._rank), tensors)]
            self._guard.later(lambda entry=entry: self._put(entry), nbytes)  # type: ignore[misc]  # bound now

    def _put(self, entry: list[tuple[bytes, dict[str, torch.Tensor]]]) -> None:
        self._guard.cache.put_many(entry, fidelity=self._fidelity)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be filled since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Finish what is waiting."""
        self._guard.flush()

    def _key(self, block_hash: bytes, rank: int) -> bytes:
        return hashlib.sha256(self._root + rank.to_bytes(4, "little") + block_hash).digest()


def _understood(kv_cache_config: Any) -> bool:
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
    return len(groups) == 1 and type(groups[0].kv_cache_spec).__name__ in _UNDERSTOOD


def _identity(vllm_config: Any, extra: dict[str, Any]) -> bytes:
    """Digest of whatever makes blocks interchangeable. `namespace` is the operator's word for the weights."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    fields = [
        "vllm", model.model, model.revision, str(model.dtype), model.hf_config.to_json_string(), cache.block_size,
        cache.cache_dtype, getattr(cache, "prefix_caching_hash_algo", None), parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size, model.quantization, extra.get("namespace", ""),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(fields, default=str).encode()).digest()
