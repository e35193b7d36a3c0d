"""vLLM's connector between its scheduler and its worker: what is looked up, loaded, kept, and under which keys."""

import logging
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import PackedTensor
from kvstore.config import ColdConfig, StoreConfig
from kvstore.errors import InvalidEntry
from kvstore.metadata.block_events import CLEARED, KeyRemoved, KeyStored
from kvstore.store import Store
from tests.conftest import wait_until
from tests.e2e.adapters import flips
from tests.e2e.adapters.conftest import PAGE, VLLMTier, vllm_connector
from tests.kvstored.inside import daemon_inside
from tests.kvstored_client.device.tensors import COPIES, on_gpu
from tests.kvstored_client.device.test_landing import Counting

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
    memory = worker.layer
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
    loaded = worker.layer
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
    assert worker.get_block_ids_with_load_errors() == {2, 3}  # what continues it went with it
    assert not worker.get_block_ids_with_load_errors()


def test_lossy_blocks_are_coded_as_keys_and_values_side_by_side(store: Store) -> None:
    """As a plain tensor they would be NF4 with nine times the harm."""
    hashes = [b"a", b"b", b"c"]
    memory = prefilled(store, hashes, fidelity="auto")
    keys = [entry.key for entry in store.entries()]
    assert store.demote(*keys) == 3
    assert all(list(store.inspect(key).tensors) == ["kv"] for key in keys)
    scheduler, worker = halves(store, fidelity="auto")
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, False)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4],)), 24)
    step(scheduler, worker, asked, [1, 2, 3, 4], 24, 4)
    loaded = worker.layer
    cosine = torch.nn.functional.cosine_similarity(loaded[1:4].flatten(), memory[5:8].flatten(), dim=0)
    assert 0.99 < float(cosine) < 1


@pytest.mark.parametrize("budget", [1 << 40, 0], ids=["before the step", "beside the steps"])
def test_lossy_blocks_cross_the_bus_as_they_are_held_and_their_receipt_is_in_the_log(
    caplog: pytest.LogCaptureFixture, budget: int
) -> None:
    """The engine's tensors are on a GPU: a quarter of the bytes goes there, and is decoded there to the same bits."""
    hashes = [b"a", b"b", b"c"]
    with daemon_inside() as daemon:
        near = daemon.client(framework="torch")
        prefilled(near, hashes, fidelity="auto")
        near.demote(*[entry.key for entry in near.entries()])
        due = loaded_into(near, hashes, lambda layer: layer, budget)
        driver = Counting(kernels=True)
        on_device = daemon.client(framework="torch", driver=driver)
        assert "raw" not in {entry.encoding for entry in near.entries()}
        COPIES.clear()
        caplog.set_level(logging.INFO, "kvstored_client.integrations.vllm_filling")
        layer = loaded_into(on_device, hashes, on_gpu, budget)
        copied, receipt = COPIES.copy(), max(near.inspect(entry.key).receipt["kv"] for entry in near.entries())
    assert torch.equal(layer.numbers[1:4], due[1:4])
    assert driver.loaded_nbytes < 0.2 * due[1:4].nbytes, "float32: an eighth, and scales"
    assert (driver.batches, driver.pending, driver.early) == (1, 0, 0)
    assert not copied["h2d"] and not copied["d2h"]
    assert f"relative error {receipt:.3f} at most" in caplog.text


class Ordered(Counting):
    """Has the steps of one request be seen: what was waited for, and what crossed the bus, in order."""

    def __init__(self) -> None:
        super().__init__(kernels=True)
        self.seen: list[str] = []

    def synchronize(self, event: Any) -> None:
        self.seen.append("waited")
        super().synchronize(event)

    def copy(self, *runs: Any, store: bool, **how: Any) -> None:
        self.seen.append("stored" if store else "loaded")
        super().copy(*runs, store=store, **how)


def on_a_gpu(client: Any, layers: int, blocks: int) -> tuple[Any, Any]:
    """Both halves over paged buffers on a GPU, with two blocks in a chunk, and numbers in the buffers."""
    scheduler, worker = halves(client, chunk_tokens=2 * BLOCK)
    shape, generator = (blocks, 2, BLOCK, 2, 16), torch.Generator().manual_seed(3)
    made = {f"l{i}": on_gpu(torch.randn(shape, generator=generator)) for i in range(layers)}
    worker.register_kv_caches(made)
    worker.layers = made
    return scheduler, worker


def kept_from_a_gpu(client: Any, scheduler: Any, worker: Any, tokens: int, places: list[int]) -> list[Any]:
    """A step that fills a prompt; what is held of it then, from the root on."""
    asked = request([bytes([i]) for i in range(tokens // BLOCK)], tokens)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    step(scheduler, worker, asked, places, 0, tokens)
    keys = [worker._key(found, 0) for found in asked.block_hashes[1::2]]
    return [client.get(key) for key in keys]


def test_a_step_on_a_gpu_waits_for_no_copy_and_its_chunks_cross_the_bus_in_one_batch() -> None:
    driver = Ordered()
    with daemon_inside() as daemon, daemon.client(framework="torch", driver=driver) as client:
        scheduler, worker = on_a_gpu(client, 3, 12)
        waited, later = [], worker._guard.later
        worker._guard.later = lambda put, nbytes: waited.append(list(driver.seen)) or later(put, nbytes)
        COPIES.clear()
        places = [7, 2, 3, 9]
        hits = kept_from_a_gpu(client, scheduler, worker, 32, places)
        assert waited == [[]], "the forward's thread has waited for nothing"
        assert driver.seen[:2] == ["waited", "stored"], "the copies are there before they cross the bus"
        assert (driver.seen.count("stored"), driver.early, driver.pending) == (1, 0, 0)
        assert not COPIES["d2h"]
        for at, hit in enumerate(hits):
            for i, name in enumerate(("k", "v")):
                due = torch.stack([x.numbers[places[2 * at : 2 * at + 2], i] for x in worker.layers.values()])
                assert torch.equal(hit.tensors[name], due.flatten(1, 2))
        assert worker._saving._on_gpu == [2, 2]


@pytest.mark.parametrize(
    ("shape", "places"),
    [
        ((12, 2, 4, 3, 16), [9, 3, 7, 1, 5, 11]), ((12, 2, 4, 3, 16), [2, 3, 4, 8, 9, 10]),
        ((12, 3, 4, 32), [9, 3, 7, 1, 5, 11]), ((12, 4, 40), [2, 3, 8, 9]),
    ],
    ids=["apart, scattered", "apart, in runs", "packed", "mla"],
)  # fmt: skip
def test_blocks_on_a_gpu_are_gathered_there_as_on_the_host_and_lie_dense(
    shape: tuple[int, ...], places: list[int]
) -> None:
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_blocks import PagedBuffers

    layers = {f"l{i}": torch.randn(shape) for i in range(3)}
    here, there = PagedBuffers(layers, 16), PagedBuffers({name: on_gpu(x) for name, x in layers.items()}, 16)
    COPIES.clear()
    due, chunk = here.entry(here.gather(places)), there.entry(there.gather(places))
    assert not COPIES["d2h"]
    assert chunk.keys() == due.keys()
    for name, x in due.items():
        assert chunk[name].is_cuda
        assert chunk[name].is_contiguous()
        assert torch.equal(chunk[name].numbers, x)


def encoding_on_a_gpu(client: Any) -> tuple[list[Any], Any, torch.Tensor]:
    """Two chunks kept by a connector that encodes: the hits, its worker, and the keys of all layers of the first."""
    scheduler, worker = halves(client, chunk_tokens=2 * BLOCK, fidelity="auto", encode_on_gpu=True)
    generator = torch.Generator().manual_seed(3)
    worker.register_kv_caches(
        made := {f"l{i}": on_gpu(torch.randn((12, 2, BLOCK, 2, 16), generator=generator)) for i in range(2)}
    )
    COPIES.clear()
    hits = kept_from_a_gpu(client, scheduler, worker, 32, [7, 2, 3, 9])
    assert not COPIES["d2h"]
    due = torch.stack([x.numbers[[7, 2], 0] for x in made.values()]).flatten(1, 2)
    return hits, worker, due


def test_chunks_are_encoded_on_the_gpu_and_cross_the_bus_in_four_bits_where_that_is_asked_for() -> None:
    driver = Counting(kernels=True)
    with daemon_inside() as daemon, daemon.client(framework="torch", driver=driver) as client:
        hits, worker, due = encoding_on_a_gpu(client)
        assert [(hit.encoding, hit.lossy) for hit in hits] == [("nf4-kv2", True)] * 2
        k = hits[0].tensors["k"]
        assert 0.0 < float((k - due).norm() / due.norm()) < 0.2
        assert worker._saving._on_gpu == [2, 2]


@pytest.mark.parametrize("broken", ["encoder", "an older daemon", "no tier below"])
def test_an_encoder_that_fails_or_a_daemon_that_refuses_loses_nothing(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Counting(kernels=True)
    with daemon_inside() as daemon, daemon.client(framework="torch", driver=driver) as client:
        if broken == "encoder":

            def fails(*_: Any, **_how: Any) -> Any:
                raise RuntimeError("Failed to find C compiler")

            monkeypatch.setattr("kvstored_client.device.encoded_there", fails)
        plain, refused = client.put_many, []

        def put_many(entries: Any, **how: Any) -> int:
            if broken != "encoder" and any(isinstance(x, PackedTensor) for x in entries[0][1].values()):
                refused.append(len(entries))
                if broken == "an older daemon":
                    raise InvalidEntry("a tensor that is no tensor")
                return 0
            stored: int = plain(entries, **how)
            return stored

        monkeypatch.setattr(client, "put_many", put_many)
        hits, _, due = encoding_on_a_gpu(client)
        assert [(hit.encoding, hit.lossy) for hit in hits] == [("raw", False)] * 2
        assert torch.equal(hits[0].tensors["k"], due)
        assert refused == ([] if broken == "encoder" else [2])
        assert "put as they are" in caplog.text


def test_what_waits_on_the_gpu_is_bounded_and_the_rest_goes_to_the_host_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm_connector({}, worker=False)
    from kvstored_client.integrations import vllm_saving

    with daemon_inside() as daemon, daemon.client(framework="torch", driver=Ordered()) as client:
        scheduler, worker = on_a_gpu(client, 2, 12)
        chunk_nbytes = 2 * sum(x[0].nbytes for x in worker.layers.values())
        monkeypatch.setattr(vllm_saving, "ON_GPU_MAX_NBYTES", 2 * chunk_nbytes)
        COPIES.clear()
        hits = kept_from_a_gpu(client, scheduler, worker, 64, list(range(8)))
        assert COPIES["d2h"] == 2, "of four chunks two wait on the GPU, each other is one copy"
        assert [hit.tensors["k"].shape for hit in hits] == [(2, 16, 2, 16)] * 4
        due = torch.stack([x.numbers[6:8, 1] for x in worker.layers.values()]).flatten(1, 2)
        assert torch.equal(hits[3].tensors["v"], due)
        assert worker._saving._on_gpu == [2, 2]


def test_a_gpu_without_memory_for_a_copy_costs_the_chunk_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with daemon_inside() as daemon, daemon.client(framework="torch", driver=Ordered()) as client:
        scheduler, worker = on_a_gpu(client, 2, 12)

        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(type(worker._buffers), "gather", full)
        assert kept_from_a_gpu(client, scheduler, worker, 32, [0, 1, 2, 3]) == [None, None]
        monkeypatch.undo()
        asked = request([b"x", b"y"], 16, "another")
        scheduler.get_num_new_matched_tokens(asked, 0)
        step(scheduler, worker, asked, [0, 1], 0, 16)
        assert client.get(worker._key(b"y", 0)) is not None, "what comes later is kept"


def loaded_into(cache: Any, hashes: list[bytes], made: Any, budget: int) -> Any:
    """The paged buffer of another engine that has loaded three blocks to places 1 to 3."""
    scheduler, worker = halves(cache, fidelity="auto", sync_load_budget_bytes=budget)
    worker.layer = made(worker.layer)
    worker.register_kv_caches({"layer": worker.layer})
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, not budget)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3, 4],)), 24)
    output = some(scheduled_new_reqs=[], num_scheduled_tokens={}, scheduled_cached_reqs=some(req_ids=[]))
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    if not budget:
        wait_until(lambda: worker.get_finished(set())[1] == {"r"})
    assert worker.get_block_ids_with_load_errors() == set()
    return worker.layer


def chunked(store: Store, **settings: Any) -> tuple[Any, Any]:
    """As halves, with two blocks in a chunk."""
    return halves(store, **{"chunk_tokens": 2 * BLOCK, **settings})


def filled(worker: Any) -> torch.Tensor:
    """The worker's paged buffer, with noise in it."""
    worker.layer.copy_(torch.randn(worker.layer.shape, generator=torch.Generator().manual_seed(1)))
    return worker.layer


def test_a_chunk_of_several_blocks_is_one_entry_that_continues_the_one_before(store: Store) -> None:
    hashes = [b"a", b"b", b"c", b"d", b"e"]
    scheduler, worker = chunked(store)
    memory = filled(worker)
    asked = request(hashes, 44)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    step(scheduler, worker, asked, [1, 2, 3, 4, 5, 6], 0, 44)
    first, second = worker._key(b"b", 0), worker._key(b"d", 0)
    assert {entry.key for entry in store.entries()} == {first, second}
    assert store.inspect(first).namespace == "m"
    found = store.get(second).tensors["kv"]
    assert torch.equal(found, memory[3:5][None])
    assert store.delete(first) == 1
    assert store.get(second) is None, "a chunk does not outlive the one that it continues"


def test_of_a_chunk_that_is_held_partly_only_the_rest_is_loaded(store: Store) -> None:
    """By the engine's own cache at its start, and at its end where the last token must be run."""
    hashes = [b"a", b"b", b"c", b"d"]
    scheduler, worker = chunked(store)
    memory = filled(worker)
    asked = request(hashes, 32)
    scheduler.get_num_new_matched_tokens(asked, 0)
    step(scheduler, worker, asked, [1, 2, 3, 4], 0, 32)
    scheduler, worker = chunked(store)
    asked = request(hashes, 32)
    assert scheduler.get_num_new_matched_tokens(asked, BLOCK) == (2 * BLOCK, False)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([9, 10, 11, 12],)), 2 * BLOCK)
    step(scheduler, worker, asked, [9, 10, 11, 12], 3 * BLOCK, BLOCK)
    assert not worker.get_block_ids_with_load_errors()
    assert torch.equal(worker.layer[10:12], memory[2:4])
    assert not worker.layer[9].any()
    assert not worker.layer[12].any()


def test_no_chunk_is_kept_after_one_that_was_dropped(store: Store) -> None:
    """With holes, 40 of 76 blocks that were kept could be found."""
    hashes = [bytes([i]) for i in range(8)]
    scheduler, worker = chunked(store)
    filled(worker)
    asked, taken = request(hashes, 64), iter([True, False, True])
    later = worker._guard.later
    worker._guard.later = lambda work, nbytes: next(taken) and later(work, nbytes)
    scheduler.get_num_new_matched_tokens(asked, 0)
    step(scheduler, worker, asked, list(range(8)), 0, 16)
    for done in (16, 32, 48):
        cached(scheduler, worker, asked, done, 16)
    assert [entry.key for entry in store.entries()] == [worker._key(hashes[1], 0)]
    scheduler.request_finished(asked, [])
    again = request(hashes, 64)
    scheduler.get_num_new_matched_tokens(again, 0)
    step(scheduler, worker, again, list(range(8)), 0, 64)
    assert len(list(store.entries())) == 4, "the next request goes on where the chain was broken"


def cached(scheduler: Any, worker: Any, asked: Any, computed: int, scheduled: int) -> None:
    """A further step of a request that runs."""
    old = some(req_ids=[asked.request_id], new_block_ids=[None], num_computed_tokens=[computed], resumed_req_ids=set())
    output = some(scheduled_new_reqs=[], scheduled_cached_reqs=old, num_scheduled_tokens={asked.request_id: scheduled})
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.wait_for_save()
    worker.clear_connector_metadata()
    assert worker._guard.flush(20)


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Any]:
    """A store with a disk, and three chunks of a prompt that lie on it alone."""
    with Store.open(StoreConfig(cold=ColdConfig(path=str(tmp_path / "cold"))), background=False) as store:
        prefilled(store, [b"a", b"b", b"c"])
        store.drain()
        assert store.demote(*[entry.key for entry in store.entries()]) == 3
        assert [entry.tiers for entry in store.entries()] == [("cold",)] * 3
        yield store


def test_what_a_waiting_request_has_on_disk_is_fetched_before_its_turn(on_disk: Any) -> None:
    scheduler, _ = halves(on_disk, prefetch_after_s=0.001)
    lookups = on_disk.stats().values["hits"]
    scheduler.on_new_request(request([b"a", b"b", b"c", b"d"], 28))
    wait_until(lambda: on_disk.maintain() or all(entry.tiers[0] == "hot" for entry in on_disk.entries()))
    assert on_disk.stats().values["hits"] == lookups, "nobody has looked anything up"
    scheduler.shutdown()


@pytest.mark.parametrize("settings", [{}, {"prefetch_after_s": 0}])
def test_nothing_is_fetched_for_who_has_his_turn_at_once_or_does_not_want_it(
    on_disk: Any, settings: dict[str, Any]
) -> None:
    scheduler, _ = halves(on_disk, **settings)
    asked = request([b"a", b"b", b"c"], 28)
    scheduler.on_new_request(asked)
    scheduler.get_num_new_matched_tokens(asked, 0)
    scheduler.shutdown()
    assert (scheduler._ahead._thread is None) == bool(settings)
    if scheduler._ahead._thread is not None:
        scheduler._ahead._thread.join(20)
    assert not on_disk._maintainer.waiting
    assert not scheduler._ahead._waiting


def test_a_failure_while_chunks_are_fetched_ahead_ends_nothing(on_disk: Any, caplog: pytest.LogCaptureFixture) -> None:
    scheduler, _ = halves(on_disk, prefetch_after_s=0.001)

    def broken() -> list[bytes]:
        raise OSError("gone")

    scheduler._ahead.arrived("first", broken)
    wait_until(lambda: "nothing was fetched ahead" in caplog.text)
    scheduler.on_new_request(request([b"a", b"b", b"c"], 28, "second"))
    wait_until(lambda: on_disk.maintain() or all(entry.tiers[0] == "hot" for entry in on_disk.entries()))
    scheduler.shutdown()


@pytest.mark.parametrize(("settings", "count"), [({}, 1), ({"offload_prompt_only": False}, 2)])
def test_blocks_that_are_generated_are_kept_where_that_is_asked_for(
    store: Store, settings: dict[str, Any], count: int
) -> None:
    scheduler, worker = chunked(store, **settings)
    filled(worker)
    asked = request([b"a", b"b"], 20)
    asked.num_prompt_tokens = 20
    scheduler.get_num_new_matched_tokens(asked, 0)
    step(scheduler, worker, asked, [1, 2, 3, 4], 0, 20)
    asked.block_hashes, asked.num_tokens = [b"a", b"b", b"c", b"d"], 32
    cached(scheduler, worker, asked, 20, 12)
    assert len(list(store.entries())) == count


def test_a_step_reads_only_the_hashes_of_what_it_fills() -> None:
    class Counted(list[bytes]):
        reads = 0

        def __getitem__(self, at: Any) -> Any:
            self.reads += 1
            return super().__getitem__(at)

        def __iter__(self) -> Any:
            raise AssertionError("all hashes are read")

    with Store.open() as store:
        scheduler, _ = chunked(store)
        asked = request(Counted(bytes([i % 251]) for i in range(2000)), 16_000)
        tracked = scheduler._tracked[asked.request_id] = tracked_of(asked)
        tracked.blocks = (list(range(2000)),)
        for done in range(1, 8):
            (save,) = scheduler._filled(asked.request_id, done * 16, 0)
            assert len(save.chunks) == 1
            assert scheduler._filled(asked.request_id, done * 16, 5) == []
        assert asked.block_hashes.reads == 13


def tracked_of(asked: Any) -> Any:
    from kvstored_client.integrations.vllm import _Tracked
    from kvstored_client.integrations.wishes import Wishes

    return _Tracked(asked, b"", Wishes())


def test_all_shards_are_asked_for_at_once(store: Store) -> None:
    from kvstored_client.integrations.vllm_identity import Shards

    hashes = [b"a", b"b", b"c"]
    scheduler, worker = halves(store)
    scheduler._shards = Shards(2, 0, writes=True)
    for found, shards in ((b"a", (0, 1)), (b"b", (0, 1)), (b"c", (0,))):
        for shard in shards:
            store.put(worker._key(found, shard), {"kv": torch.zeros(1)})
    asked: list[int] = []
    match = scheduler._guard.match
    scheduler._guard.match = lambda keys, **how: asked.append(len(keys)) or match(keys, **how)
    assert scheduler.get_num_new_matched_tokens(request(hashes, 28), 0) == (16, False)
    assert asked == [6]
    values = store.stats().values
    assert (values["lookup_keys"], values["lookup_tokens"], values["lookup_hit_tokens"]) == (6, 24, 20)


def test_a_request_says_how_long_its_blocks_are_kept_or_that_they_are_not(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler, worker = halves(store, allow_pin=True)
    filled(worker)
    for i, wish in enumerate(({"ttl_s": 50.0}, {"no_store": True}, {"priority": "highest"}, {"x": 1}, {"pin": True})):
        asked = request([b"%d" % i], 12, name=str(i))
        asked.kv_transfer_params = {"kvstored": wish}
        scheduler.get_num_new_matched_tokens(asked, 0)
        step(scheduler, worker, asked, [1, 2], 0, 12)
    found = [store.inspect(worker._key(b"%d" % i, 0)) for i in range(5)]
    assert found[0].ttl_left_s <= 50
    assert found[1] is None
    assert [each.ttl_left_s > 50 and not each.pinned for each in found[2:4]] == [True, True]
    assert found[4].pinned
    assert "priority must be one of low, normal" in caplog.text
    assert "no wish is called 'x'" in caplog.text


@pytest.mark.parametrize(
    "given", [None, 5, "ttl_s", {"ttl_s": True}, {"ttl_s": "1"}, {"ttl_s": float("nan")}, {1: 2}, {"pin": True}, [{}]]
)
def test_wishes_that_cannot_be_are_told_and_left_out(given: Any) -> None:
    from kvstored_client.integrations.wishes import Wishes, wishes_of

    found = wishes_of(some(kv_transfer_params={"kvstored": given}), allow_pin=False)
    assert found == Wishes(complaint=found.complaint)
    assert found.complaint


def test_wishes_come_from_an_orchestrator_s_hints_as_well() -> None:
    from kvstored_client.integrations.wishes import Wishes, wishes_of

    actions = [some(action_type="other", payload={"a": 1}), some(action_type="kvstored", payload={"ttl_s": 5})]
    asked = some(kv_transfer_params={"kvstored": {"no_store": True}}, kv_hints=some(actions=actions))
    assert wishes_of(asked, allow_pin=False) == Wishes(store=False, options={"ttl_s": 5})
    for nothing in (some(), some(kv_transfer_params=None), some(kv_transfer_params={"other": 1}, kv_hints=None)):
        assert wishes_of(nothing, allow_pin=False) == Wishes()


def test_a_large_load_runs_beside_the_steps_and_the_request_waits_for_it(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    memory = prefilled(store, hashes)
    scheduler, worker = halves(store, sync_load_budget_bytes=2 * 4096 - 1)
    asked = request(hashes, 28)
    assert scheduler.get_num_new_matched_tokens(asked, 2 * BLOCK) == (BLOCK, False)
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, True)
    scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3],)), 24)
    gate, lease_many = threading.Event(), worker._guard.lease_many

    def held_up(keys: Any, **how: Any) -> Any:
        assert gate.wait(20)
        return lease_many(keys, **how)

    worker._guard.lease_many = held_up
    store.evict(worker._key(b"b", 0))
    nothing(scheduler, worker)
    assert worker.get_finished(set()) == (None, None)
    assert not worker.get_block_ids_with_load_errors()
    gate.set()
    worker._loading.close()
    assert worker.get_finished(set()) == (None, {"r"})
    assert worker.get_block_ids_with_load_errors() == {2, 3}
    assert torch.equal(worker.layer[1], memory[5])
    assert worker.get_finished(set()) == (None, None)


def test_what_is_held_and_cannot_be_loaded_beside_the_steps_is_not_offered_again(store: Store) -> None:
    """vLLM asks anew for a request that lost all it waited for, and had waited for the same chunks without end."""
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes)
    scheduler, worker = halves(store, sync_load_budget_bytes=0)
    asked, other = request(hashes, 28), request(hashes, 28, "other")
    for each, ids in ((asked, [1, 2, 3]), (other, [4, 5, 6])):
        assert scheduler.get_num_new_matched_tokens(each, 0) == (24, True)
        scheduler.update_state_after_alloc(each, some(get_block_ids=lambda ids=ids: (ids,)), 24)
    lease_many, lost = worker._guard.lease_many, [b"a", b"b", b"c"]

    @contextmanager
    def gone(keys: Any, **how: Any) -> Iterator[Any]:
        with lease_many(keys, **how) as hits:
            yield [None if lost and lost.pop() else hit for hit in hits]

    worker._guard.lease_many = gone
    nothing(scheduler, worker)
    done: set[str] = set()
    wait_until(lambda: done.update(worker.get_finished(set())[1] or ()) or done == {"r", "other"})
    failed = worker.get_block_ids_with_load_errors()
    assert failed == {1, 2, 3}
    scheduler.update_connector_output(some(finished_recving=done, invalid_block_ids=failed))
    assert scheduler.get_num_new_matched_tokens(asked, 0) == (0, False)
    # The blocks are another request's by now: what fails there is nothing of this one.
    scheduler.update_connector_output(some(finished_recving=set(), invalid_block_ids={4}))
    assert scheduler.get_num_new_matched_tokens(other, 0) == (24, True)


def nothing(scheduler: Any, worker: Any) -> None:
    """A step that runs no request: loads begin in it."""
    old = some(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    output = some(scheduled_new_reqs=[], scheduled_cached_reqs=old, num_scheduled_tokens={})
    worker.bind_connector_metadata(scheduler.build_connector_meta(output))
    worker.start_load_kv(None)
    worker.clear_connector_metadata()


def test_a_load_that_raises_is_a_miss_and_the_request_goes_on(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes)
    for budget, alone in ((1 << 20, False), (0, True)):
        scheduler, worker = halves(store, sync_load_budget_bytes=budget)
        asked = request(hashes, 28)
        assert scheduler.get_num_new_matched_tokens(asked, 0) == (24, alone)
        scheduler.update_state_after_alloc(asked, some(get_block_ids=lambda: ([1, 2, 3],)), 24)
        worker._buffers.fill = None  # as a device would that has an error
        nothing(scheduler, worker)
        worker._loading.close()
        assert worker.get_block_ids_with_load_errors() == {1, 2, 3}
        assert worker.get_finished(set()) == (None, {"r"} if alone else None)


@pytest.mark.parametrize(
    ("shape", "dtype", "names"),
    [
        ((6, 2, 4, 3, 16), torch.bfloat16, {"k": (2, 8, 3, 16), "v": (2, 8, 3, 16)}),
        ((6, 3, 4, 32), torch.float32, {"kv": (2, 2, 3, 4, 32)}),
        ((6, 4, 40), torch.float16, {"latent": (2, 8, 40)}),
        ((6, 4, 40), torch.float8_e4m3fn, {"latent": (2, 8, 40)}),
    ],
    ids=["apart", "packed", "mla", "float8"],
)
def test_blocks_of_each_layout_come_back_bit_for_bit_at_other_places(shape: Any, dtype: Any, names: Any) -> None:
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_blocks import PagedBuffers

    layers = {f"l{i}": torch.randint(0, 100, shape, dtype=torch.uint8).to(dtype) for i in (1, 0)}
    theirs = {name: torch.zeros_like(layer) for name, layer in layers.items()}
    mine_all = PagedBuffers(layers, 16)
    chunk = mine_all.entry(mine_all.gather([4, 1]))
    assert {name: tuple(x.shape) for name, x in chunk.items()} == names
    other = PagedBuffers(theirs, 16)
    assert other.block_nbytes() == sum(layer[0].numel() * layer.element_size() for layer in layers.values())
    assert other.fill([0], chunk, 2, 1)
    assert other.fill([5, 3], chunk, 2)
    for name, layer in layers.items():
        for mine, place in ((4, 5), (1, 3), (1, 0)):
            assert torch.equal(theirs[name][place].view(torch.uint8), layer[mine].view(torch.uint8))
        assert not theirs[name][[1, 2, 4]].view(torch.uint8).any()
    assert not other.fill([0, 1, 2], chunk, 3)
    assert not other.fill([0, 1], {name: x.to(torch.float64) for name, x in chunk.items()}, 2)
    assert not other.fill([0, 1], {}, 2)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("places", [[9, 3, 7, 1, 5, 11], [2, 3, 4, 8, 9, 10]], ids=["scattered", "in runs"])
def test_blocks_come_to_their_places_however_these_lie(places: list[int], contiguous: bool) -> None:
    """By numbers and by slices; and buffers whose dimensions lie in another order, as with HND."""
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_blocks import PagedBuffers

    def buffer() -> torch.Tensor:
        if contiguous:
            return torch.zeros(12, 2, 4, 3, 16)
        return torch.zeros(12, 2, 3, 4, 16).transpose(2, 3)

    layers, theirs = {"a": buffer()}, {"a": buffer()}
    layers["a"].copy_(torch.randn(12, 2, 4, 3, 16))
    buffers, other = PagedBuffers(layers, 16), PagedBuffers(theirs, 16)
    assert other.fill(places, buffers.entry(buffers.gather(list(range(6)))), 6)
    assert torch.equal(theirs["a"][places], layers["a"][:6])
    rest = [at for at in range(12) if at not in places]
    assert not theirs["a"][rest].any()


@pytest.mark.parametrize("places", [[9, 3, 7, 1, 5, 11], [2, 3, 4, 8, 9, 10]], ids=["scattered", "in runs"])
@pytest.mark.parametrize("shape", [(2, 4, 3, 16), (3, 4, 32)], ids=["apart", "packed"])
def test_layers_at_equal_distances_are_moved_as_one_array(shape: tuple[int, ...], places: list[int]) -> None:
    """Names sort 10 and 11 before 2: what is moved as one array is of three runs of layers."""
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_blocks import PagedBuffers

    def buffers(whole: torch.Tensor) -> PagedBuffers:
        found = PagedBuffers({f"layer.{i}": whole[i] for i in range(whole.shape[0])}, 16)
        assert len(found._kinds[0]._stripes) == 3
        return found

    whole = torch.randn(12, 14, *shape).to(torch.bfloat16)
    theirs = torch.zeros_like(whole)
    mine, other = buffers(whole), buffers(theirs)
    scattered = PagedBuffers({f"layer.{i}": whole[i].clone() for i in range(12)}, 16)
    chunk = mine.entry(mine.gather([0, 1, 4, 5, 6, 12]))
    for name, x in scattered.entry(scattered.gather([0, 1, 4, 5, 6, 12])).items():
        assert torch.equal(chunk[name], x)
    assert other.fill(places, chunk, 6)
    assert torch.equal(theirs[:, places], whole[:, [0, 1, 4, 5, 6, 12]])
    assert not theirs[:, [at for at in range(14) if at not in places]].any()
    assert other.fill([13], chunk, 6, 2)
    assert torch.equal(theirs[:, 13], whole[:, 4])


def test_layers_of_several_shapes_are_tensors_of_their_own() -> None:
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_blocks import PagedBuffers

    layers = {"a": torch.randn(3, 2, 4, 1, 16), "b": torch.randn(3, 2, 4, 3, 16), "c": torch.randn(3, 2, 4, 1, 16)}
    buffers = PagedBuffers(layers, 16)
    chunk = buffers.entry(buffers.gather([2]))
    assert {name: tuple(x.shape) for name, x in chunk.items()} == {
        "k.0": (2, 4, 1, 16), "v.0": (2, 4, 1, 16), "k.1": (1, 4, 3, 16), "v.1": (1, 4, 3, 16)
    }  # fmt: skip
    assert torch.equal(chunk["v.1"][0], layers["b"][2, 1])


def test_no_request_is_computed_anew_for_a_put(store: Store) -> None:
    assert not halves(store)[0].requires_kv_delivery


def real_config() -> Any:
    """vLLM's own configuration classes, with a model that nobody has to load."""
    from transformers import LlamaConfig
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig

    hf = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, rope_theta=10_000.0)
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu")
    )  # else vLLM looks for one: its GPU wheel finds none here
    config.model_config = flips.of_defaults(
        ModelConfig, model="m", tokenizer="m", dtype=torch.bfloat16, hf_config=hf, hf_text_config=hf, max_model_len=4096
    )
    return config


def test_each_field_of_vllm_s_configuration_is_in_the_identity_unless_the_list_names_it() -> None:
    vllm_connector({}, worker=False)
    from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig

    from kvstored_client.integrations import vllm_identity as mine

    config = real_config()
    config.kv_transfer_config = flips.of_defaults(KVTransferConfig, kv_connector_extra_config={"namespace": "w"})
    count = flips.check(config, mine.HARMLESS, lambda: mine.identity(config, None, 1))
    assert count > 300
    kinds = {each.__name__: each for each in (CacheConfig, KVTransferConfig, ModelConfig, ParallelConfig, VllmConfig)}
    assert not flips.on_the_list_and_gone(mine.HARMLESS, kinds)
    assert all(mine.HARMLESS.values())


def test_settings_of_the_connector_are_in_the_identity_but_not_where_the_daemon_is() -> None:
    from kvstored_client.integrations import vllm_identity as mine

    def identity(**extra: Any) -> bytes:
        return mine.identity(some(kv_transfer_config=some(kv_connector_extra_config=extra)), None, 1)

    assert identity(address="a", lookup_timeout_s=1) == identity(address="b", fetch_timeout_s=2)
    assert len({identity(), identity(namespace="w"), identity(fidelity="auto"), identity(invented=1)}) == 4


def test_an_engine_on_a_cpu_has_chunks_of_one_block_and_keys_of_its_own(store: Store) -> None:
    """What is behind the last whole chunk is computed anew: 232 of 1,512 tokens, 0.7 s on two cores."""
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes, chunk_tokens=None)
    assert not list(store.entries())  # 28 tokens are no chunk of 256
    for device, held in (("cuda", 0), ("cpu", 24)):
        scheduler, worker = (vllm_connector({**PATIENT, "chunk_tokens": None}, worker=w, device=device) for w in (0, 1))
        scheduler._guard.cache = worker._guard.cache = store
        asked = request(hashes, 28)
        scheduler.get_num_new_matched_tokens(asked, 0)
        step(scheduler, worker, asked, [5, 6, 7, 8], 0, 28)
        assert scheduler.get_num_new_matched_tokens(request(hashes, 28, "again"), 0) == (held, False)
    roots = {vllm_connector({"chunk_tokens": n}, worker=False, device="cpu")._root for n in (None, 8, 16)}
    assert len(roots) == 3


def test_who_demands_exact_blocks_is_not_given_what_another_let_become_lossy(store: Store) -> None:
    hashes = [b"a", b"b", b"c"]
    prefilled(store, hashes, fidelity="auto")
    assert halves(store)[0].get_num_new_matched_tokens(request(hashes, 28), 0) == (0, False)


def test_ranks_of_prefill_context_have_blocks_of_their_own() -> None:
    """With tp=1 and pcp=2 both wrote rank 0."""
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_identity import Shards, shards_of

    def shards(**sizes: int) -> Shards:
        return shards_of(some(**{"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **sizes}), None)

    assert shards(prefill_context_parallel_size=2, rank=1) == Shards(2, 1, writes=True)
    assert shards(tensor_parallel_size=2, prefill_context_parallel_size=2, rank=3) == Shards(4, 3, writes=True)
    assert shards(tensor_parallel_size=2, rank=5) == Shards(2, 1, writes=True)  # a second replica


def test_what_all_tensor_ranks_have_of_mla_is_kept_once() -> None:
    vllm_connector({}, worker=False)
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    from kvstored_client.integrations.vllm_identity import Shards, shards_of

    spec = MLAAttentionSpec(block_size=8, num_kv_heads=1, head_size=64, dtype=torch.float32)

    def shards(**sizes: int) -> Shards:
        return shards_of(some(**{"tensor_parallel_size": 4, "pipeline_parallel_size": 2, **sizes}), spec)

    assert [shards(rank=rank) for rank in (0, 3, 4, 6)] == [
        Shards(2, 0, writes=True), Shards(2, 0, writes=False), Shards(2, 1, writes=True), Shards(2, 1, writes=False),
    ]  # fmt: skip
    assert shards(rank=3, decode_context_parallel_size=2) == Shards(8, 3, writes=True)  # each has tokens of its own


def test_a_block_of_decode_context_ranks_holds_the_tokens_of_all_and_other_hashes_turn_the_store_off() -> None:
    vllm_connector({}, worker=False)
    from kvstored_client.integrations.vllm_identity import tokens_per_block

    def tokens(dcp: int, hashed: int | None = None, *, sharded: bool = True) -> int:
        spec = some(block_size=8, dcp_sharded=sharded)
        cache = some(kv_cache_groups=[some(kv_cache_spec=spec)], hash_block_size=hashed)
        return tokens_per_block(some(parallel_config=some(decode_context_parallel_size=dcp)), cache)

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
    assert len(scheduler._warned) == 1


def test_a_prompt_of_over_4096_blocks_hits_and_opens_no_breaker(store: Store) -> None:
    hashes = [b"%d" % i for i in range(5_000)]
    scheduler, worker = halves(store)
    entries = [(worker._key(found, 0), {"kv": torch.zeros(1)}) for found in hashes]
    assert worker._guard.put_many(entries) == 5_000
    for _ in range(4):
        assert scheduler.get_num_new_matched_tokens(request(hashes, 40_001), 0) == (40_000, True)
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
        each._saving._reported = each._reported
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
    theirs = msgpack.encode(kv_events.KVEventBatch(1.5, [
        kv_events.AllBlocksCleared(),
        kv_events.BlockStored(block_hashes=[b"a"], parent_block_hash=None, block_size=256, **stored),
        kv_events.BlockStored(block_hashes=[b"b"], parent_block_hash=b"a", block_size=7, **stored),
        kv_events.BlockRemoved(block_hashes=[b"b", b"a"], medium=kv_events.MEDIUM_STORAGE),
    ], 0))  # fmt: skip
    # By what they say: of a class with over 15 fields msgspec writes a longer head of the map, whatever is left out.
    assert msgpack.decode(ours) == msgpack.decode(theirs)
    assert [list(event) for event in msgpack.decode(ours)[1]] == [list(event) for event in msgpack.decode(theirs)[1]]
    assert msgpack.decode(ours, type=kv_events.KVEventBatch).data_parallel_rank == 0
