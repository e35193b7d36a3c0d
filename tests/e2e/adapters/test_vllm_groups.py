"""vLLM's models of several cache groups: full attention beside sliding windows, kept and loaded whole or not at all."""

import types
from itertools import product
from typing import Any

import pytest
import torch

from kvstore.store import Store
from tests.e2e.adapters.conftest import vllm_connector

some = types.SimpleNamespace
BLOCK, PER, WINDOW = 8, 2, 16
SETTINGS = {"lookup_timeout_s": 20.0, "fetch_timeout_s": 20.0, "chunk_tokens": PER * BLOCK}
HASHES = [bytes([i]) * 32 for i in range(1, 8)]


def halves(store: Store) -> tuple[Any, Any]:
    found = [vllm_connector(SETTINGS, worker=worker, window=WINDOW) for worker in (False, True)]
    for each in found:
        each._guard.cache = store
    return found[0], found[1]


def request(tokens: int, name: str = "r") -> Any:
    return some(request_id=name, num_tokens=tokens, block_hashes=HASHES[: tokens // BLOCK])


def asked_again(asked: Any, blocks: tuple[list[int], ...], computed: int, scheduled: int) -> Any:
    """A step of a request that runs already, with its new blocks."""
    old = some(
        req_ids=[asked.request_id], new_block_ids=[blocks], num_computed_tokens=[computed], resumed_req_ids=set()
    )
    return some(scheduled_new_reqs=[], scheduled_cached_reqs=old, num_scheduled_tokens={asked.request_id: scheduled})


def first(asked: Any, blocks: tuple[list[int], ...], computed: int, scheduled: int) -> Any:
    new = some(req_id=asked.request_id, block_ids=blocks, num_computed_tokens=computed)
    old = some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    return some(scheduled_new_reqs=[new], scheduled_cached_reqs=old, num_scheduled_tokens={asked.request_id: scheduled})


def turn(scheduler: Any, worker: Any, output: Any) -> Any:
    """A step; what the worker says came of its loads."""
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.wait_for_save()
    worker._loading.close()  # what runs beside the steps has ended
    worker._loading._thread = None
    results = worker.get_transfer_results(set())
    worker.clear_connector_metadata()
    assert worker._guard.flush(20)
    assert worker.get_block_ids_with_load_errors() == set()  # a number is of one group no more
    return results


def prefilled(store: Store, steps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """48 tokens computed in some steps and kept; the layers' memory. Blocks 1 to 6 and 11 to 16, less one."""
    scheduler, worker = halves(store)
    generator = torch.Generator().manual_seed(0)
    for layer in (worker.layer, worker.near):
        layer.copy_(torch.randn(layer.shape, generator=generator))
    memory = worker.layer.clone(), worker.near.clone()
    asked, computed = request(52), 0
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    for tokens in steps:
        lo, hi = -(-computed // BLOCK), -(-(computed + tokens) // BLOCK)
        blocks = [1 + i for i in range(lo, hi)], [9 + i for i in range(lo, hi)]
        turn(scheduler, worker, (asked_again if computed else first)(asked, blocks, computed, tokens))
        computed += tokens
        # The engine gives a block that left the window to another request, which writes there.
        for gone in range(max(0, computed - WINDOW + 1) // BLOCK):
            worker.near[9 + gone] = 77.0
    return memory


@pytest.mark.parametrize("steps", [[48], [16, 32], [20, 28], [8] * 6, [5, 25, 18], [1] * 48])
def test_both_groups_come_back_as_far_as_they_are_needed(store: Store, steps: list[int]) -> None:
    layer, near = prefilled(store, steps)
    assert len(list(store.entries())) == 3
    for entry in store.entries():
        found = store.inspect(entry.key)
        assert found is not None
        assert set(found.tensors) == {"g0.kv", "g1.kv"}
    for tokens, whole, kept in ((52, 48, 2), (41, 32, 2), (48, 32, 2), (17, 16, 2)):
        scheduler, worker = halves(store)
        asked = request(tokens)
        assert scheduler.get_num_new_matched_tokens(asked, 0) == (whole, True), "never a part of a chunk"
        count = whole // BLOCK
        full, window = list(range(1, 1 + count)), [0] * (count - kept) + [5, 6]
        scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda f=full, w=window: (f, w)), whole)
        worker.near[0] = 5.0
        results = turn(scheduler, worker, some(
            scheduled_new_reqs=[], num_scheduled_tokens={},
            scheduled_cached_reqs=some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()),
        ))  # fmt: skip
        assert (results.finished_recving, results.failed_recving) == ({"r"}, set())
        assert torch.equal(worker.layer[1 : 1 + count], layer[1 : 1 + count])
        assert torch.equal(worker.near[5:7], near[9 + count - 2 : 9 + count])
        assert (worker.near[0] == 5.0).all(), "the engine's null block is nobody's"


def test_what_a_window_let_go_of_is_zeros_and_never_another_request_s(store: Store) -> None:
    prefilled(store, [31, 17])  # the first block of the second chunk has left by the second step
    for entry in store.entries():
        hit = store.get(entry.key)
        assert hit is not None
        assert not bool((hit.tensors["g1.kv"] == 77.0).any())


def test_a_load_that_fails_is_told_of_its_request_which_is_computed_and_kept_anew(store: Store) -> None:
    prefilled(store, [48])
    scheduler, worker = halves(store)
    asked = request(52)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (48, True)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 5, 6])), 48)
    store.evict(worker._key(HASHES[5], 0))
    nothing = some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    results = turn(
        scheduler, worker, some(scheduled_new_reqs=[], scheduled_cached_reqs=nothing, num_scheduled_tokens={})
    )
    assert (results.finished_recving, results.failed_recving) == ({"r"}, {"r"})
    scheduler.update_connector_output(results)
    # The store holds two chunks of it still. They are not offered again: they might fail again, without end.
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    turn(scheduler, worker, first(asked, ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), 0, 48))
    assert len(list(store.entries())) == 3


def test_of_windows_alone_a_failed_load_is_its_request_s_too(store: Store) -> None:
    """vLLM would compute from the first lost block on: what that needs before it is not there."""
    prefilled(store, [48])
    scheduler, worker = halves(store)
    for each in (scheduler, worker):
        object.__setattr__(each._groups, "all", each._groups.all[1:])
    worker.register_kv_caches({"near": worker.near})
    asked = request(52)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (48, True)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([0, 0, 0, 0, 5, 6],)), 48)
    nothing = some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    step = some(scheduled_new_reqs=[], scheduled_cached_reqs=nothing, num_scheduled_tokens={})
    assert turn(scheduler, worker, step).failed_recving == {"r"}  # entries of two groups are none of this model's


def test_a_chunk_that_was_found_computed_and_has_left_its_window_ends_the_chain(store: Store) -> None:
    """The engine's own cache had 32 tokens: of the window's blocks only the last two are there."""
    scheduler, worker = halves(store)
    asked = request(52)
    assert scheduler.get_num_new_matched_tokens(asked, 32) == (0, False)
    turn(scheduler, worker, first(asked, ([1, 2, 3, 4, 5, 6], [0, 0, 3, 4, 5, 6]), 32, 16))
    assert list(store.entries()) == []


def test_a_window_s_blocks_are_those_that_the_engine_keeps() -> None:
    vllm_connector({}, worker=False)
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    from kvstored_client.integrations.vllm_groups import Group, Groups

    found = 0
    for window, extra, per in product((1, 7, 8, 9, 16, 33), (0, 3), (1, 2, 3)):
        engine: Any = some(sliding_window=window, extra_retained_tokens=extra)

        def let_go_of(tokens: int, engine: Any = engine) -> int:
            return int(SlidingWindowManager.get_num_skipped_tokens(engine, tokens)) // BLOCK

        groups = Groups((Group(("a",), 64, 1, None), Group(("b",), 64, 1, window - 1 + extra)))
        for computed, at in product(range(0, 120, 3), range(5)):
            first, end = at * per, at * per + per
            ids = list(range(1, 1 + end))
            places = groups.places((ids, ids), first, end, computed, BLOCK)
            there = [i >= let_go_of(computed) for i in range(first, end)]
            needed = [i >= let_go_of(end * BLOCK) for i in range(first, end)]
            whole = all(t or not n for t, n in zip(there, needed, strict=True))
            kept = [1 + i if t else 0 for i, t in zip(range(first, end), there, strict=True)]
            assert places == ((ids[first:], kept) if whole else None)
            found += whole
    assert found > 1000
