"""vLLM's connector between its scheduler and its worker: what is looked up, loaded, kept, and under which keys."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.metadata.block_events import CLEARED, KeyRemoved, KeyStored
from kvstore.store import Store
from tests.e2e.adapters import flips
from tests.e2e.adapters.conftest import PAGE, VLLMTier, vllm_connector

PATIENT = {"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0}
some = types.SimpleNamespace
BLOCK = 8


def halves(store: Store, **settings: Any) -> tuple[Any, Any]:
    """The scheduler's half and the worker's, over one store."""
    found = [vllm_connector({**PATIENT, **settings}, worker=worker) for worker in (False, True)]
    for each in found:
        each._guard.cache = store
    return found[0], found[1]


def request(hashes: list[bytes], tokens: int, name: str = "r") -> Any:
    return some(request_id=name, num_tokens=tokens, block_hashes=hashes)


def step(scheduler: Any, worker: Any, asked: Any, blocks: list[int], computed: int, scheduled: int) -> None:
    """One step of the engine: a new request with its blocks, so many tokens of it computed before and in this step."""
    new = some(req_id=asked.request_id, block_ids=(blocks,), num_computed_tokens=computed)
    old = some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    output = some(
        scheduled_new_reqs=[new], scheduled_cached_reqs=old, num_scheduled_tokens={asked.request_id: scheduled}
    )
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.wait_for_save()
    worker.clear_connector_metadata()
    assert worker._guard.flush(20)


def prefilled(store: Store, hashes: list[bytes], **settings: Any) -> torch.Tensor:
    """A request of three blocks and a half, computed and kept. Returns the paged buffer."""
    scheduler, worker = halves(store, **settings)
    (memory,) = worker._layers.values()
    memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(0)))
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    step(scheduler, worker, asked, [5, 6, 7, 8], 0, 28)
    return memory


def test_full_blocks_are_kept_and_loaded_to_other_places_by_another_engine(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    memory = prefilled(store, hashes)
    assert len(list(store.entries())) == 3
    scheduler, worker = halves(store)
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, False)
    assert scheduler.get_num_new_matched_tokens(asked, BLOCK) == (16, False)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4],)), 16)
    step(scheduler, worker, asked, [1, 2, 3, 4], 24, 4)
    (loaded,) = worker._layers.values()
    assert not worker.get_block_ids_with_load_errors()
    assert torch.equal(loaded[2:4], memory[6:8])
    assert not loaded[1].any()  # vLLM had that one itself
    assert len(list(store.entries())) == 3


def test_the_last_token_is_always_left_to_compute(store: Store) -> None:
    prefilled(store, [b"a", b"b", b"c"])
    scheduler, _ = halves(store)
    assert scheduler.get_num_new_matched_tokens(request([b"a", b"b", b"c"], 24), 0) == (16, False)


def test_keys_are_the_engine_s_block_hashes_and_never_the_tokens(store: Store) -> None:
    """vLLM's hashes cover salt, LoRA and embeddings: the same tokens under other hashes are another tenant's."""
    prefilled(store, [b"a", b"b", b"c"])
    scheduler, _ = halves(store)
    assert scheduler.get_num_new_matched_tokens(request([b"x", b"y", b"z"], 28), 0) == (0, False)
    assert halves(store, namespace="other weights")[0].get_num_new_matched_tokens(
        request([b"a", b"b", b"c"], 28), 0
    ) == (0, False)


def test_a_block_gone_between_lookup_and_load_is_reported(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes)
    scheduler, worker = halves(store)
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, False)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4],)), 24)
    store.evict(worker._key(b"b", 0))
    step(scheduler, worker, asked, [1, 2, 3, 4], 24, 4)
    assert worker.get_block_ids_with_load_errors() == {2}
    assert not worker.get_block_ids_with_load_errors()


def test_lossy_blocks_are_coded_as_keys_and_values_side_by_side(store: Store) -> None:
    """As a plain tensor they would be NF4 with nine times the harm."""
    hashes = [b"a", b"b", b"c"]
    memory = prefilled(store, hashes, fidelity="auto")
    keys = [entry.key for entry in store.entries()]
    assert store.demote(*keys) == 3
    assert all(list(store.inspect(key).tensors) == ["kv.0"] for key in keys)
    scheduler, worker = halves(store, fidelity="auto")
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, False)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4],)), 24)
    step(scheduler, worker, asked, [1, 2, 3, 4], 24, 4)
    (loaded,) = worker._layers.values()
    cosine = torch.nn.functional.cosine_similarity(loaded[1:4].flatten(), memory[5:8].flatten(), dim=0)
    assert 0.99 < float(cosine) < 1


def test_no_request_is_computed_anew_for_a_put(store: Store) -> None:
    assert not halves(store)[0].requires_kv_delivery


def real_config() -> Any:
    """vLLM's own configuration classes, with a model that nobody has to load."""
    from transformers import LlamaConfig
    from vllm.config import ModelConfig, VllmConfig

    hf = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, rope_theta=10_000.0)
    config = VllmConfig()
    config.model_config = flips.of_defaults(
        ModelConfig, model="m", tokenizer="m", dtype=torch.bfloat16, hf_config=hf, hf_text_config=hf, max_model_len=4096
    )
    return config


def test_each_field_of_vllm_s_configuration_is_in_the_identity_unless_the_list_names_it() -> None:
    vllm_connector({}, worker=False)
    from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig

    from kvstored_client.integrations import vllm as mine

    config = real_config()
    config.kv_transfer_config = flips.of_defaults(KVTransferConfig, kv_connector_extra_config={"namespace": "w"})
    count = flips.check(config, mine._HARMLESS, lambda: mine._identity(config, None))
    assert count > 300
    kinds = {each.__name__: each for each in (CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig)}
    assert not flips.on_the_list_and_gone(mine._HARMLESS, kinds)
    assert all(mine._HARMLESS.values())


def test_settings_of_the_connector_are_in_the_identity_but_not_where_the_daemon_is() -> None:
    from kvstored_client.integrations import vllm as mine

    def identity(**extra: Any) -> bytes:
        return mine._identity(some(kv_transfer_config=some(kv_connector_extra_config=extra)), None)

    assert identity(address="a", lookup_timeout_s=1) == identity(address="b", fetch_timeout_s=2)
    assert len({identity(), identity(namespace="w"), identity(fidelity="auto"), identity(invented=1)}) == 4


def test_who_demands_exact_blocks_is_not_given_what_another_let_become_lossy(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes, fidelity="auto")
    assert halves(store)[0].get_num_new_matched_tokens(request(hashes, 28), 0) == (0, False)


def test_ranks_of_prefill_context_have_blocks_of_their_own() -> None:
    """With tp=1 and pcp=2 both wrote rank 0."""
    from kvstored_client.integrations.vllm import _ranks

    def ranks(**sizes: int) -> tuple[int, int]:
        return _ranks(some(**{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **sizes}))

    assert ranks(prefill_context_parallel_size=2, rank=1) == (2, 1)
    assert ranks(tensor_parallel_size=2, prefill_context_parallel_size=2, rank=3) == (4, 3)
    assert ranks(tensor_parallel_size=2, rank=5) == (2, 1)  # a second replica


def test_a_block_of_decode_context_ranks_holds_the_tokens_of_all_and_other_hashes_turn_the_store_off() -> None:
    from kvstored_client.integrations.vllm import _tokens_per_block

    def tokens(dcp: int, hashed: int | None = None, *, sharded: bool = True) -> int:
        spec = some(block_size=8, dcp_sharded=sharded)
        cache = some(kv_cache_groups=[some(kv_cache_spec=spec)], hash_block_size=hashed)
        return _tokens_per_block(some(parallel_config=some(decode_context_parallel_size=dcp)), cache)

    assert [tokens(1), tokens(2), tokens(2, 16), tokens(2, sharded=False)] == [8, 16, 16, 8]
    with pytest.raises(ValueError, match="a block has 8 tokens and a hash covers 4"):
        tokens(1, 4)


def test_the_workers_take_the_scheduler_s_identity(store: Store) -> None:
    scheduler, worker = halves(store)
    worker._root = b"a worker changed its own copy of the configuration"
    asked = request([b"a", b"b", b"c"], 28)
    scheduler.get_num_new_matched_tokens(asked, 0)
    step(scheduler, worker, asked, [5, 6, 7, 8], 0, 28)
    assert halves(store)[0].get_num_new_matched_tokens(request([b"a", b"b", b"c"], 28), 0) == (24, False)


def test_after_a_reset_nothing_of_before_is_found(store: Store) -> None:
    """vLLM resets the cache when its weights were changed in place."""
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes)
    scheduler, _ = halves(store)
    assert scheduler.reset_cache()
    assert scheduler.get_num_new_matched_tokens(request(hashes, 28), 0) == (0, False)


def test_a_configuration_without_a_stable_form_runs_without_the_store(caplog: pytest.LogCaptureFixture) -> None:
    connector = vllm_connector({"hook": lambda: 1}, worker=False)
    assert connector.get_num_new_matched_tokens(request([b"a", b"b", b"c"], 28), 0) == (0, False)
    assert "running without the store" in caplog.text
    assert "kv_connector_extra_config.hook" in caplog.text


def test_another_adapter_under_the_same_name_and_path_is_another_prefix(store: Store, tmp_path: Path) -> None:
    hashes = [b"a", b"b", b"c"]
    scheduler, worker = halves(store)

    def adapted(folder: Path) -> Any:
        return some(**vars(request(hashes, 28)), lora_request=some(lora_name="l", lora_path=str(folder)))

    for name in ("one", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").write_bytes(b"other" if name == "other" else b"one")
    asked = adapted(tmp_path / "one")
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    step(scheduler, worker, asked, [5, 6, 7, 8], 0, 28)
    assert len(list(store.entries())) == 3
    assert scheduler.get_num_new_matched_tokens(adapted(tmp_path / "same"), 0) == (24, False)
    assert scheduler.get_num_new_matched_tokens(adapted(tmp_path / "other"), 0) == (0, False)
    assert scheduler.get_num_new_matched_tokens(request(hashes, 28), 0) == (0, False)
    for _ in range(2):
        assert scheduler.get_num_new_matched_tokens(adapted(tmp_path / "hub-id"), 0) == (0, False)
    assert len(scheduler._said) == 1


def test_a_prompt_of_over_4096_blocks_hits_and_opens_no_breaker(store: Store) -> None:
    hashes = [b"%d" % i for i in range(5_000)]
    scheduler, worker = halves(store)
    entries = [(worker._key(found, 0), {"kv.0": torch.zeros(1)}) for found in hashes]
    assert worker._guard.put_many(entries) == 5_000
    for _ in range(4):
        assert scheduler.get_num_new_matched_tokens(request(hashes, 40_001), 0) == (40_000, False)
    assert scheduler._guard.failures == 0


@pytest.mark.parametrize("name", ["canonical_layout", "replicated_layout"])
def test_layouts_of_the_tier_are_other_chunks(name: str) -> None:
    """vLLM's own FileMapper tells them apart."""
    tier, spec = offloading()
    before = tier._identity(spec, {})
    with flips.changed(spec.config, name, value=True):
        assert tier._identity(spec, {}) != before


def offloading() -> tuple[Any, Any]:
    """The tier's module and a spec with vLLM's own offloading configuration."""
    vllm_connector({}, worker=False)
    from vllm.v1.kv_offload import config as theirs

    from kvstored_client.integrations import vllm_tier

    parallel = theirs.OffloadingParallelConfig(
        rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
        data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
    )  # fmt: skip
    config = theirs.OffloadingConfig(
        groups=(theirs.OffloadingGroupConfig(16, ("l0",), 0),), worker_kv_bytes_per_block=1, engine_id="e",
        enable_kv_cache_events=False, extra_config={}, model=theirs.OffloadingModelConfig("m", "fp8_e4m3"),
        cache=theirs.OffloadingCacheConfig(16, 1), parallel=parallel, kv_cache_layout="LBNHC",
    )  # fmt: skip
    return vllm_tier, some(config=config, replicated_layout=False)


def test_each_field_of_the_offloading_configuration_is_in_the_identity_unless_the_list_names_it() -> None:
    tier, spec = offloading()
    count = flips.check(spec.config, tier._HARMLESS, lambda: tier._identity(spec, {}))
    assert count >= 25
    assert tier._identity(spec, {"address": "a"}) == tier._identity(spec, {"address": "b"})
    assert tier._identity(spec, {"namespace": "a"}) != tier._identity(spec, {"namespace": "b"})


class Events:
    """vLLM's event classes where its clients of ZeroMQ are not installed: what the connector makes of them."""

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib.machinery
        import sys

        if "zmq" not in sys.modules:
            try:
                import zmq
            except ImportError:
                zmq = types.ModuleType("zmq")
                zmq.__spec__ = importlib.machinery.ModuleSpec("zmq", None)
                zmq.Socket = zmq.Context = object  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, "zmq", zmq)


def telling(store: Store, monkeypatch: pytest.MonkeyPatch, ranks: int = 1) -> tuple[Any, Any]:
    """Both halves of an engine that publishes events."""
    Events.install(monkeypatch)
    scheduler, worker = halves(store)
    events = pytest.importorskip("kvstored_client.integrations.vllm_events")
    for each in (scheduler, worker):
        each._announced, each._reported = events.Announced(ranks), events.Reported()
    return scheduler, worker


def test_routers_are_told_of_blocks_once_they_are_stored_and_when_they_are_found_gone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, worker = telling(store, monkeypatch)
    asked = request([b"a", b"b", b"c"], 28)
    asked.all_token_ids = list(range(28))
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    step(scheduler, worker, asked, [5, 6, 7, 8], 0, 28)
    assert list(scheduler.take_events()) == []
    scheduler.update_connector_output(some(kv_cache_events=worker.get_kv_connector_kv_cache_events()))
    found = list(scheduler.take_events())
    assert [(e.block_hashes, e.parent_block_hash, e.token_ids, e.block_size, e.medium) for e in found] == [
        ([b"a"], None, list(range(8)), 8, "STORAGE"), ([b"b"], b"a", list(range(8, 16)), 8, "STORAGE"),
        ([b"c"], b"b", list(range(16, 24)), 8, "STORAGE"),
    ]  # fmt: skip
    assert worker.get_kv_connector_kv_cache_events() is None
    store.delete(worker._key(b"b", 0))
    again = request([b"a", b"b", b"c"], 28, "again")
    assert scheduler.get_num_new_matched_tokens(again, 0) == (8, False)
    assert [(type(e).__name__, e.block_hashes, e.medium) for e in scheduler.take_events()] == [
        ("BlockRemoved", [b"b", b"c"], "STORAGE")
    ]
    scheduler.reset_cache()
    assert [e.block_hashes for e in scheduler.take_events()] == [[b"a"]]


def test_a_block_is_announced_when_every_rank_has_stored_its_shard(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    telling(store, monkeypatch)
    from kvstored_client.integrations import vllm_events

    announced, block = vllm_events.Announced(2), vllm_events.Block(None, (1, 2), None)
    for rank in (0, 1):
        reported = vllm_events.Reported()
        reported.stored(b"a", block)
        announced.reported(reported.take().get_all_events())
        assert len(announced.take()) == rank


def test_an_engine_without_routers_keeps_nothing_for_them(store: Store) -> None:
    scheduler, worker = halves(store)
    assert tuple(scheduler.take_events()) == ()
    assert worker.get_kv_connector_kv_cache_events() is None


def told(tier: Any) -> list[tuple[list[bytes], str, bool]]:
    return [(list(e.keys), e.medium.name, e.removed) for e in tier.take_events()]


def test_the_tier_tells_what_it_stored_and_what_a_lookup_or_a_load_finds_gone(store: Store) -> None:
    handle = VLLMTier({}, events=True)
    handle.guard.cache = store
    pages = {name: torch.full((PAGE,), i, dtype=torch.uint8) for i, name in enumerate("abc")}
    assert handle.keep(pages)
    assert told(handle.tier) == [([b"a", b"b", b"c"], "STORAGE", False)]
    assert handle.keep(pages)
    assert told(handle.tier) == [], "told once"
    store.delete(handle.tier._key(b"a"))
    assert handle.restore(["a"]) == [None]
    assert told(handle.tier) == [([b"a"], "STORAGE", True)]
    store.delete(handle.tier._key(b"b"))
    handle.tier._known.clear()  # what was known has aged
    assert handle.held(["b", "c", "never"]) == [False, True, False]
    assert told(handle.tier) == [([b"b"], "STORAGE", True)]
    handle.close()


def test_a_tier_of_an_engine_without_routers_keeps_nothing_for_them(store: Store) -> None:
    handle = VLLMTier({})
    handle.guard.cache = store
    assert handle.keep({"a": torch.zeros(PAGE, dtype=torch.uint8)})
    assert told(handle.tier) == []
    handle.close()


def test_what_routers_are_not_told_of_is_counted_and_no_removal_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    telling(store, monkeypatch)
    from kvstored_client.integrations import vllm_events, vllm_tier

    for module in (vllm_events, vllm_tier):
        monkeypatch.setattr(module, "PENDING_MAX", 2)
    block = vllm_events.Block(None, (1, 2), None)
    reported, announced = vllm_events.Reported(), vllm_events.Announced(1)
    for name in (b"a", b"b", b"c"):
        reported.stored(name, block)
    assert reported.dropped.count == 1
    events = reported.take().get_all_events()
    announced.reported(events)
    announced.reported([vllm_events._stored(name, block) for name in (b"d", b"e")])
    announced.missing([b"a", b"d"])
    assert [(type(e).__name__, e.block_hashes) for e in announced.take()] == [
        ("BlockStored", [b"a"]), ("BlockStored", [b"b"]), ("BlockRemoved", [b"a"]),
    ]  # fmt: skip
    assert announced.dropped.count == 2
    handle = VLLMTier({}, events=True)
    handle.guard.cache = store
    for name in "abcd":
        assert handle.keep({name: torch.zeros(PAGE, dtype=torch.uint8)})
    for name in "ad":
        store.delete(handle.tier._key(name.encode()))
        handle.restore([name])
    assert told(handle.tier) == [
        ([b"a"], "STORAGE", False), ([b"b"], "STORAGE", False), ([b"a"], "STORAGE", True),
    ]  # fmt: skip
    assert handle.tier.dropped.count == 2
    handle.close()


def test_what_the_daemon_publishes_is_read_by_vllms_own_classes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    msgpack = pytest.importorskip("msgspec.msgpack")
    telling(store, monkeypatch)
    from vllm.distributed import kv_events

    from kvstored.telemetry.router_events import told as written

    events = [CLEARED, KeyStored(b"a", None, 256), KeyStored(b"b", b"a", 7), KeyRemoved(b"b"), KeyRemoved(b"a")]
    ours = msgpack.encode([1.5, written(events), 0])
    stored = {"token_ids": [], "lora_id": None, "medium": kv_events.MEDIUM_STORAGE, "lora_name": None}
    assert ours == msgpack.encode(kv_events.KVEventBatch(1.5, [
        kv_events.AllBlocksCleared(),
        kv_events.BlockStored(block_hashes=[b"a"], parent_block_hash=None, block_size=256, **stored),
        kv_events.BlockStored(block_hashes=[b"b"], parent_block_hash=b"a", block_size=7, **stored),
        kv_events.BlockRemoved(block_hashes=[b"b", b"a"], medium=kv_events.MEDIUM_STORAGE),
    ], 0))  # fmt: skip
    assert msgpack.decode(ours, type=kv_events.KVEventBatch).data_parallel_rank == 0
