"""vLLM's connector between its scheduler and its worker: what is looked up, loaded, kept, and under which keys."""

import types
from typing import Any

import torch

from kvstore.store import Store
from tests.e2e.adapters.conftest import vllm_connector

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
