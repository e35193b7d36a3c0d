"""kvstored as a KV connector of vLLM 0.32: blocks are kept as they are filled and loaded before a prefill.

    --kv-transfer-config '{"kv_connector": "KvstoredConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "kvstored_client.integrations.vllm",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": "unix:/run/kvstored/kvstored.sock"}}'

Set the policy: vLLM's default ("fail") ends a request whose block was there at the lookup and is gone at the load.
Keys come from `request.block_hashes`, which cover salt, images, LoRA's name and path and embeddings, never from token
ids; the bytes of a LoRA adapter's files are added here, and a request whose adapter cannot be read runs without the
store. The rest of a key is a digest of the whole configuration (`_HARMLESS` says what is left out) and the rank. It is
made in the scheduler, and the workers are told: what a worker changes in its own copy cannot part the two. All ranks'
shards of a block must be held for it to count. A block is one entry of all layers as they lie in the paged buffer, K
and V packed or not, and moved as bytes of their dtype.
Only full attention in one cache group; other models run without the store. Never raises into the engine.
"""

import hashlib
import logging
import secrets
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kvstore.hit import Fidelity
from kvstore.lookup import ELSEWHERE, Lookup
from kvstored_client.integrations import adapters, configured
from kvstored_client.integrations.guard import FETCH_TIMEOUT_S, LOOKUP_TIMEOUT_S, Guard
from kvstored_client.integrations.prefill_time import PrefillTime

logger = logging.getLogger(__name__)

_UNDERSTOOD = ("FullAttentionSpec", "MLAAttentionSpec")
_SAID_MAX = 1000
"""Reasons that are logged, once each."""
_APART_DIM = 5
"""(blocks, 2, tokens, heads, head_dim)."""
_PLACE = "where a process or its peers are, not what they compute"
_SIZE = "how much memory or how many requests, not what is in a block"
_OUTPUT = "what is done with the logits: the blocks are there before"
_HARMLESS = {
    "ParallelConfig.rank": "in each key, beside the digest",
    "ParallelConfig.data_parallel_rank": "replicas compute the same blocks",
    "ParallelConfig.data_parallel_rank_local": "replicas compute the same blocks",
    "ParallelConfig.data_parallel_index": "replicas compute the same blocks",
    "ParallelConfig.data_parallel_master_ip": _PLACE,
    "ParallelConfig.data_parallel_master_port": _PLACE,
    "ParallelConfig.data_parallel_rpc_port": _PLACE,
    "ParallelConfig._data_parallel_master_port_list": _PLACE,
    "ParallelConfig._coord_store_port": _PLACE,
    "ParallelConfig._api_process_count": _PLACE,
    "ParallelConfig._api_process_rank": _PLACE,
    "ParallelConfig.master_addr": _PLACE,
    "ParallelConfig.master_port": _PLACE,
    "ParallelConfig.node_rank": _PLACE,
    "ParallelConfig.numa_bind_nodes": _PLACE,
    "ParallelConfig.numa_bind_cpus": _PLACE,
    "ParallelConfig.assigned_physical_gpu_ids": _PLACE,
    "ParallelConfig.placement_group": _PLACE,
    "ParallelConfig.ray_runtime_env": _PLACE,
    "CacheConfig.gpu_memory_utilization": _SIZE,
    "CacheConfig.num_gpu_blocks": _SIZE,
    "CacheConfig.num_gpu_blocks_override": _SIZE,
    "CacheConfig.num_cpu_blocks": _SIZE,
    "CacheConfig.kv_cache_size_tokens": _SIZE,
    "CacheConfig.kv_cache_max_concurrency": _SIZE,
    "CacheConfig.kv_cache_memory_bytes": _SIZE,
    "CacheConfig.kv_offloading_size": _SIZE,
    "KVCacheConfig.num_blocks": _SIZE,
    "KVCacheConfig.kv_cache_tensors": _SIZE,
    "KVCacheConfig.hisparse_host_num_blocks": _SIZE,
    "ModelConfig.hf_token": "a password",
    "ModelConfig.served_model_name": "what clients call the model",
    "ModelConfig.allowed_local_media_path": _PLACE,
    "ModelConfig.max_logprobs": _OUTPUT,
    "ModelConfig.logprobs_mode": _OUTPUT,
    "*._name_or_path": "where a configuration was read from: the model's name is in, and all of the configuration",
    "DeviceConfig.device": "which card; its type is in",
    "LoadConfig.download_dir": _PLACE,
    "LoadConfig.use_tqdm_on_load": "a progress bar",
    "KVTransferConfig.engine_id": "random, and new at each start",
    "KVTransferConfig.kv_port": _PLACE,
    "KVTransferConfig.kv_role": "who computes blocks and who reads them share them",
    "KVTransferConfig.kv_load_failure_policy": "what happens without a block",
    "kv_connector_extra_config.address": _PLACE,
    "kv_connector_extra_config.lookup_timeout_s": "how long a call is waited for",
    "kv_connector_extra_config.fetch_timeout_s": "how long a call is waited for",
    "VllmConfig.instance_id": "random, and new at each start",
    "VllmConfig.scheduler_config": _SIZE,
    "VllmConfig.compilation_config": "how kernels are made; filled with live layers and graphs while the engine starts",
    "VllmConfig.observability_config": "what is reported",
    "VllmConfig.profiler_config": "what is reported",
    "VllmConfig.logging_config": "what is reported",
    "VllmConfig.kv_events_config": "what is reported",
    "VllmConfig.structured_outputs_config": _OUTPUT,
    "VllmConfig.reasoning_config": _OUTPUT,
    "VllmConfig.watermark_config": _OUTPUT,
    "VllmConfig.shutdown_timeout": "how an engine ends",
}
"""All that is not in the identity. A field that is not here is in it, those of other versions of vLLM included."""
_BLOCKS_PER_FETCH = 8
"""Blocks of one call: a block of 128 tokens has 5 MB or more, and a fetch has a deadline."""


@dataclass
class _Work(KVConnectorMetadata):
    """What a step's worker loads and keeps: block hashes and where the blocks are. root: the scheduler's identity.

    prefill: tokens of the step where it is one whole prefill and nothing else, so that its time can be told; else 0.
    """

    root: bytes = b""
    prefill: int = 0
    loads: list[tuple[bytes, int]] = field(default_factory=list)
    saves: list[tuple[bytes, int]] = field(default_factory=list)
    told: dict[bytes, Any] = field(default_factory=dict)
    """By hash of a block to save, what routers are told of it (`vllm_events.Block`)."""


@dataclass
class _Tracked:
    """A request in the scheduler: its blocks so far, and how many leading ones need no saving."""

    request: Any
    salt: bytes
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
        self._ranks, self._rank = _ranks(vllm_config.parallel_config)
        self._root = b""
        why_not = _not_understood(kv_cache_config)
        try:
            self._root = _identity(vllm_config, kv_cache_config)
            self._block_size = 1 if why_not else _tokens_per_block(vllm_config, kv_cache_config)
        except (configured.NoStableForm, ValueError) as error:
            why_not = why_not or str(error)
        self._on = not why_not
        if why_not:
            logger.warning("running without the store: %s", why_not)
        self._head_dim = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.head_size) if self._on else 0
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[tuple[bytes, int]] = []
        self._layers: dict[str, torch.Tensor] = {}
        self._failed: set[int] = set()
        self._said: set[str] = set()
        self._time = PrefillTime()
        self._loaded_at = 0.0
        self._announced: Any = None
        self._reported: Any = None
        if self._on and _wants_events(vllm_config):  # imported here alone: it needs vLLM's own clients of ZeroMQ
            from kvstored_client.integrations.vllm_events import Announced, Reported

            self._announced, self._reported = Announced(self._ranks), Reported()

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
            salt = adapters.salt_of(request)
            hashes = _hashes(request, salt)[: (request.num_tokens - 1) // self._block_size]
            # A request that waits for room, or was preempted, is asked for again: that is no other lookup.
            held = self._held(hashes, counted=request.request_id not in self._tracked)
        except adapters.Unknown as error:
            self._say_once(f"requests run without the store: {error}")
            return 0, False
        except Exception:
            logger.exception("a lookup failed")
            return 0, False
        if self._announced is not None and held < len(hashes):
            self._announced.missing(_bare(request)[held : len(hashes)])
        first = num_computed_tokens // self._block_size
        self._tracked[request.request_id] = _Tracked(request, salt, saved=held, first_load=first)
        return max(0, held - first) * self._block_size, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Remember which blocks the loaded tokens go to."""
        tracked = self._tracked.get(request.request_id)
        if not self._on or tracked is None or num_external_tokens <= 0:
            return
        ids = blocks.get_block_ids()[0]
        last = tracked.first_load + num_external_tokens // self._block_size
        hashes = _hashes(request, tracked.salt)
        self._loads += [(hashes[i], ids[i]) for i in range(tracked.first_load, last)]

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """This step's loads, and the blocks that it fills."""
        work = _Work(root=self._root, loads=self._loads)
        self._loads = []
        if not self._on:
            return work
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            self._note(new.req_id, new.block_ids, fresh=True)
            work.saves += self._filled(new.req_id, new.num_computed_tokens + scheduled.get(new.req_id, 0))
            alone = len(scheduled) == 1 and not new.num_computed_tokens
            work.prefill = int(scheduled.get(new.req_id, 0)) if alone else 0
        old = scheduler_output.scheduled_cached_reqs
        for i, name in enumerate(old.req_ids):
            self._note(name, old.new_block_ids[i], fresh=name in old.resumed_req_ids)
            work.saves += self._filled(name, old.num_computed_tokens[i] + scheduled.get(name, 0))
        if self._announced is not None and work.saves:
            work.told = self._facts({found for found, _ in work.saves})
        return work

    def _facts(self, saved: set[bytes]) -> dict[bytes, Any]:
        """What routers are told of blocks, by the hash that they are saved under."""
        from kvstored_client.integrations.vllm_events import Block

        size, told = self._block_size, dict[bytes, Any]()
        for tracked in self._tracked.values():
            bare = _bare(tracked.request)
            tokens = getattr(tracked.request, "all_token_ids", ())
            lora = getattr(getattr(tracked.request, "lora_request", None), "lora_name", None)
            for i, found in enumerate(_hashes(tracked.request, tracked.salt)[: len(tracked.blocks)]):
                if found in saved:
                    block = Block(bare[i - 1] if i else None, tuple(tokens[i * size : (i + 1) * size]), lora)
                    told[found] = bare[i], block
        return told

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have put since the last step."""
        events = getattr(connector_output, "kv_cache_events", None)
        if self._announced is not None and events is not None:
            self._announced.reported(events.get_all_events())

    def take_events(self) -> Any:
        """`BlockStored` and `BlockRemoved` since the last call, for routers; see `vllm_events`."""
        return () if self._announced is None else self._announced.take()

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

    def reset_cache(self) -> bool:
        """Make all blocks kept so far misses for this engine: its weights may have changed, and it does not say how."""
        self._root = hashlib.sha256(self._root + secrets.token_bytes(32)).digest()
        if self._announced is not None:
            self._announced.reset()
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._said and len(self._said) < _SAID_MAX:
            self._said.add(text)
            logger.warning(text)

    def _held(self, hashes: list[bytes], *, counted: bool) -> int:
        """Leading blocks of which every rank's shard is held. The first rank's question is counted for all."""
        if not hashes:
            return 0
        whole = Lookup(len(hashes), len(hashes) * self._block_size, self._block_size) if counted else ELSEWHERE
        return min(
            int(self._guard.match([self._key(h, rank) for h in hashes], lookup=ELSEWHERE if rank else whole))
            for rank in range(self._ranks)
        )

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
        hashes = _hashes(tracked.request, tracked.salt)
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
        self._told(work)
        began, filled = self._time.clock(), 0
        for start in range(0, len(loads), _BLOCKS_PER_FETCH):
            part = loads[start : start + _BLOCKS_PER_FETCH]
            hits = self._guard.get_many([self._key(found, self._rank) for found, _ in part], lookup=ELSEWHERE)
            for (_, block), hit in zip(part, hits, strict=True):
                if hit is None or not self._filled_block(block, hit.tensors):
                    self._failed.add(block)
                else:
                    filled += 1
        self._loaded_at = self._time.clock()
        tokens = filled * self._block_size
        if tokens and not self._rank:  # the ranks compute side by side
            self._guard.report(prefill_saved_s=self._time.restored(1, tokens, tokens, self._loaded_at - began))

    def _told(self, work: Any) -> None:
        self._root = getattr(work, "root", b"") or self._root

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
        self._told(work)
        for found, block in saves:
            tensors = {name: part.detach().to("cpu", copy=True) for name, part in self._parts(block).items()}
            if work.prefill:  # the copy has waited for the device, so the forward pass has ended
                self._time.observe(1, work.prefill, self._time.clock() - self._loaded_at)
                work.prefill = 0
            nbytes = sum(part.numel() * part.element_size() for part in tensors.values())
            entry = [(self._key(found, self._rank), tensors)]
            told = work.told.get(found)
            self._guard.later(lambda entry=entry, told=told: self._put(entry, told), nbytes)  # type: ignore[misc]  # bound now

    def _put(self, entry: list[tuple[bytes, dict[str, torch.Tensor]]], told: Any) -> None:
        stored = self._guard.cache.put_many(entry, fidelity=self._fidelity)
        if stored and told is not None and self._reported is not None:
            self._reported.stored(*told)

    def get_kv_connector_kv_cache_events(self) -> Any:
        """What this worker has put since the last step; None: nothing."""
        return None if self._reported is None else self._reported.take()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be filled since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Finish what is waiting."""
        self._guard.flush()

    def _key(self, block_hash: bytes, rank: int) -> bytes:
        return hashlib.sha256(self._root + rank.to_bytes(4, "little") + block_hash).digest()


def _hashes(request: Any, salt: bytes) -> list[bytes]:
    found = [bytes(each) for each in request.block_hashes]
    return [hashlib.sha256(salt + each).digest() for each in found] if salt else found


def _bare(request: Any) -> list[bytes]:
    """The hashes as the engine publishes them: routers know no salt of ours."""
    return [bytes(each) for each in request.block_hashes]


def _wants_events(vllm_config: Any) -> bool:
    return bool(getattr(getattr(vllm_config, "kv_events_config", None), "enable_kv_cache_events", False))


def _ranks(parallel: Any) -> tuple[int, int]:
    """How many shards a block has, and whose this process's is. Ranks of decode context are among the tensor ranks."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    ranks = 1
    for name in sizes:
        ranks *= int(getattr(parallel, name, 1))
    return ranks, int(getattr(parallel, "rank", 0)) % ranks


def _not_understood(kv_cache_config: Any) -> str:
    """Why this model's cache cannot be kept; "" where it can."""
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    understood = len(kinds) == 1 and kinds[0] in _UNDERSTOOD
    return (
        "" if understood else f"this model's cache is not one group of full attention: {', '.join(kinds) or 'unknown'}"
    )


def _tokens_per_block(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of one block over all ranks: what one of the request's hashes covers. Raises ValueError if they differ."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    shared_by = int(getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1))
    tokens = int(spec.block_size) * (shared_by if getattr(spec, "dcp_sharded", True) else 1)
    hashed = getattr(kv_cache_config, "hash_block_size", None)
    if hashed not in (None, tokens):
        raise ValueError(f"a block has {tokens} tokens and a hash covers {hashed}")
    return tokens


def _identity(vllm_config: Any, kv_cache_config: Any) -> bytes:
    """Digest of whatever makes blocks interchangeable. Raises NoStableForm.

    The settings of the connector are in it: `namespace`, the operator's word for the weights, and `fidelity`, so that
    who demands exact bytes is not given what another let become lossy.
    """
    whole = {"version": vllm.__version__, "vllm": vllm_config, "kv_cache": kv_cache_config}
    return configured.digest("vllm", whole, _HARMLESS)
