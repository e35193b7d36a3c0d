"""Whose blocks are interchangeable with whose, in vLLM: the digest in every key, the ranks, and which models are kept.

Every field of vLLM's configuration is in the digest unless `HARMLESS` names it, with the reason.
"""

from dataclasses import dataclass
from typing import Any

import vllm

from kvstored_client.integrations import configured

_PLACE = "where a process or its peers are, not what they compute"
_SIZE = "how much memory or how many requests, not what is in a block"
_OUTPUT = "what is done with the logits: the blocks are there before"
HARMLESS = {
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
    "kv_connector_extra_config.offload_prompt_only": "which blocks are kept, not what is in them",
    "kv_connector_extra_config.sync_load_budget_bytes": "when a load is waited for",
    "kv_connector_extra_config.prefetch_after_s": "when chunks move, not what is in them",
    "kv_connector_extra_config.encode_on_gpu": "where chunks become four bits, which `fidelity` lets them",
    "kv_connector_extra_config.allow_pin": "how long blocks are kept",
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


@dataclass(frozen=True, slots=True)
class Shards:
    """A block has `count`, and this process's is number `mine`. writes: this process is the one that keeps it."""

    count: int
    mine: int
    writes: bool


def shards_of(parallel: Any, spec: Any) -> Shards:
    """Ranks of decode context are among the tensor ranks. All tensor ranks have the same of MLA, and one keeps it."""
    tensor, stages, contexts = (
        int(getattr(parallel, name, 1))
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    )
    rank = int(getattr(parallel, "rank", 0)) % (tensor * stages * contexts)
    shared_by = contexts * int(getattr(parallel, "decode_context_parallel_size", 1))
    if type(spec).__name__ == "MLAAttentionSpec" and shared_by == 1:
        return Shards(stages, rank // tensor, rank % tensor == 0)
    return Shards(tensor * stages * contexts, rank, writes=True)


def tokens_per_block(vllm_config: Any, kv_cache_config: Any) -> int:
    """Tokens of one block over all ranks: what one of the request's hashes covers. Raises ValueError if they differ."""
    groups = kv_cache_config.kv_cache_groups
    spec = groups[0].kv_cache_spec
    shared_by = int(getattr(vllm_config.parallel_config, "decode_context_parallel_size", 1))
    if shared_by > 1 and len(groups) > 1:
        raise ValueError("the ranks of decode context parallelism share blocks of several groups")
    tokens = int(spec.block_size) * (shared_by if getattr(spec, "dcp_sharded", True) else 1)
    hashed = getattr(kv_cache_config, "hash_block_size", None)
    if hashed not in (None, tokens):
        raise ValueError(f"a block has {tokens} tokens and a hash covers {hashed}")
    return tokens


def identity(vllm_config: Any, kv_cache_config: Any, chunk_blocks: int) -> bytes:
    """Digest of whatever makes chunks of so many blocks interchangeable. Raises NoStableForm.

    The settings of the connector are in it: `namespace`, the operator's word for the weights, and `fidelity`, so that
    who demands exact bytes is not given what another let become lossy.
    """
    whole = {
        "version": vllm.__version__, "vllm": vllm_config, "kv_cache": kv_cache_config, "chunk_blocks": chunk_blocks,
    }  # fmt: skip
    return configured.digest("vllm", whole, HARMLESS)
