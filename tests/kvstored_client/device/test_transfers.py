"""Tensors on a GPU: one batch a request, no copy through the host, nothing given back or believed too early.

Without a GPU: tensors that say they are on one, and a driver that copies as late as CUDA may. What the client does is
what it does for every tensor with `is_cuda`.
"""

import asyncio
import gc

import numpy as np
import pytest
import torch

from kvstore.device.copies import Runs
from kvstore.device.deferred import Deferred
from kvstore.errors import InvalidEntry
from kvstored_client import aio
from kvstored_client.device import Transfers
from kvstored_client.shm.connection import Connection
from tests.conftest import wait_until

from .tensors import COPIES, FakeCuda, on_gpu

MODEL = {
    "model": "m", "revision": "r1", "dtype": "float32", "layers": 3, "kv_heads": 2, "head_dim": 8, "layout": "lthd",
    "fidelity": "exact",
}  # fmt: skip


@pytest.fixture
def driver():
    return Deferred()


@pytest.fixture
def client(daemon, driver):
    COPIES.clear()
    with daemon.client(framework="torch", driver=driver) as found:
        yield found


def same(on_device, x):
    return torch.equal(on_device.numbers, x)


def test_a_get_into_tensors_on_a_gpu_is_one_batch_and_no_copy_through_the_host(client, driver):
    tensors = {"k": torch.randn(3, 40, 8), "v": torch.randn(3, 40, 8)}
    client.put(b"gpu", tensors)
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in tensors.items()}
    hit = client.get(b"gpu", out=out)
    assert all(hit.tensors[name] is out[name] for name in tensors)
    assert all(same(out[name], x) for name, x in tensors.items())
    assert not COPIES
    assert (driver.batches, driver.runs, driver.pending) == (1, 2, 0)


def test_a_get_into_a_part_of_a_larger_tensor_copies_its_dense_runs(client, driver):
    x = torch.randn(3, 40, 8)
    client.put(b"gpu", {"k": x})
    whole = on_gpu(torch.zeros(3, 100, 8))
    assert client.get(b"gpu", out={"k": whole[:, 20:60]}) is not None
    assert torch.equal(whole.numbers[:, 20:60], x)
    assert not whole.numbers[:, :20].any() and not whole.numbers[:, 60:].any()
    assert (driver.batches, driver.runs, dict(COPIES)) == (1, 3, {})


def test_a_put_from_a_gpu_is_one_batch_into_the_ingest_segment(client, driver):
    tensors = {"k": torch.randn(3, 40, 8), "v": torch.randn(5)}
    assert client.put(b"gpu", {name: on_gpu(x) for name, x in tensors.items()})
    assert (driver.batches, driver.runs, dict(COPIES)) == (1, 2, {})
    hit = client.get(b"gpu")
    assert all(torch.equal(hit.tensors[name], x) for name, x in tensors.items())


def test_a_batch_of_puts_is_one_batch_of_copies_and_may_be_mixed(client, driver):
    entries = [(b"gpu%d" % i, {"k": torch.randn(2, 9), "n": torch.arange(i + 1)}) for i in range(20)]
    sent = [(key, {"k": on_gpu(tensors["k"]), "n": tensors["n"]}) for key, tensors in entries]
    assert client.put_many(sent) == 20
    assert (driver.batches, driver.runs, dict(COPIES)) == (1, 20, {})
    for key, tensors in entries:
        out = {"k": on_gpu(torch.zeros(2, 9)), "n": torch.zeros_like(tensors["n"])}
        client.get(key, out=out)
        assert same(out["k"], tensors["k"])
        assert torch.equal(out["n"], tensors["n"])
    assert not COPIES


def test_a_prefix_goes_to_the_gpu_in_one_batch_and_comes_from_it_in_one(client, driver):
    ns = client.namespace(**MODEL, chunk_tokens=16)
    k, v = torch.randn(3, 72, 2, 8), torch.randn(3, 72, 2, 8)
    assert ns.put_prefix(range(72), on_gpu(k), on_gpu(v)) == 5
    assert (driver.batches, driver.runs, dict(COPIES)) == (1, 2 * 3 * 5, {})
    out = on_gpu(torch.zeros(3, 100, 2, 8)), on_gpu(torch.zeros(3, 100, 2, 8))
    n, got_k, got_v = ns.get_prefix(range(100), out=out)
    assert n == 72
    assert same(got_k, k) and same(got_v, v)
    assert (driver.batches, dict(COPIES)) == (2, {})
    assert client.failures == 0


def test_an_asyncio_client_does_the_same_beside_its_loop(client, daemon, driver):
    async def run():
        async with aio.Client(f"unix:{daemon.socket_path}", on_error="raise", driver=driver) as cache:
            x = torch.randn(3, 40, 8)
            assert await cache.put(b"gpu aio", {"k": on_gpu(x)})
            out = {"k": on_gpu(torch.zeros(3, 40, 8))}
            assert await cache.get(b"gpu aio", out=out) is not None
            assert same(out["k"], x)
            ns = cache.namespace(**MODEL, chunk_tokens=16)
            k = torch.randn(3, 40, 2, 8)
            assert await ns.put_prefix(range(1000, 1040), on_gpu(k), on_gpu(k)) == 3
            into = on_gpu(torch.zeros(3, 40, 2, 8)), on_gpu(torch.zeros(3, 40, 2, 8))
            assert (await ns.get_prefix(range(1000, 1040), out=into))[0] == 40
            assert same(into[0], k) and same(into[1], k)

    asyncio.run(run())
    assert (driver.batches, dict(COPIES)) == (4, {})


def test_a_put_waits_for_what_computes_its_tensor(client, driver):
    """Copied before its kernel ran, the store would keep what was there before, under a right checksum."""
    x = on_gpu(torch.zeros(64))
    driver.compute(0, lambda: x.numbers.fill_(7))
    assert client.put(b"computed", {"x": x})
    assert client.get(b"computed").tensors["x"].eq(7).all()


def test_a_put_over_the_stream_waits_for_what_computes_its_tensor(daemon, driver):
    """The stream's thread read the tensor on a stream of its own, in no order with the kernel."""
    x = on_gpu(torch.zeros(64))
    with daemon.client(framework="torch", driver=driver, shared_memory=False) as client:
        driver.compute(0, lambda: x.numbers.fill_(7))
        assert client.put(b"computed", {"x": x})
        assert client.get(b"computed").tensors["x"].eq(7).all()

    async def run():
        address = f"unix:{daemon.socket_path}"
        async with aio.Client(address, on_error="raise", driver=driver, shared_memory=False) as cache:
            driver.compute(0, lambda: x.numbers.fill_(8))
            assert await cache.put(b"computed", {"x": x})
            assert (await cache.get(b"computed")).tensors["x"].eq(8).all()

    asyncio.run(run())


def test_a_get_waits_for_what_still_uses_the_memory_of_its_tensor(client, driver):
    """torch hands memory on to the next tensor of a stream while kernels that use it are still to run."""
    client.put(b"gpu", {"x": torch.full((64,), 5.0)})
    x = on_gpu(torch.zeros(64))
    driver.compute(0, lambda: x.numbers.fill_(7))
    assert client.get(b"gpu", out={"x": x}) is not None
    driver.settle()
    assert x.numbers.eq(5).all()


def test_a_tensor_cut_too_fine_is_made_dense_on_the_gpu_after_its_kernel(client, driver, monkeypatch):
    monkeypatch.setattr("kvstore.device.copies.RUNS_MAX", 8)
    x = on_gpu(torch.zeros(10, 12))
    values = torch.randn(10, 12)
    driver.compute(0, lambda: x.numbers.copy_(values))
    real = driver.wait
    monkeypatch.setattr(driver, "wait", lambda stream, event: (real(stream, event), driver.synchronize(event)))
    assert client.put(b"fine", {"x": x.t()})
    assert torch.equal(client.get(b"fine").tensors["x"], values.t())
    assert dict(COPIES) == {"d2d": 1}


def test_a_block_that_is_used_again_during_the_copy_is_a_miss_and_its_lease_is_given_back(client, daemon, driver):
    client.put(b"gone", {"x": torch.ones(4096)})
    out = {"x": on_gpu(torch.zeros(4096))}
    block = next(iter(daemon.on_loop(lambda: daemon.store._r.hot.get(b"gone")).tensors.values()))
    client.get(b"gone", out=out)
    known = next(b for b in client._pool.segments.blocks.values() if b.tensors["x"][2] == 4 * 4096)

    def use_again():
        for segment in daemon.arena._segments:
            words = segment.bytes.view(np.uint64)
            at = known.start >> 3
            if int(words[at]) == known.generation:
                words[at] = known.generation + 1_000_000

    driver.before_copy = use_again
    assert client.get(b"gone", out=out) is None
    assert client.failures == 1
    driver.before_copy = lambda: None
    del block
    wait_until(lambda: client.stats().values["leases"] == 0)


def test_a_chunk_of_a_prefix_that_is_used_again_during_the_copy_is_a_miss(client, daemon, driver):
    ns = client.namespace(**{**MODEL, "revision": "r2"}, chunk_tokens=16)
    k = torch.randn(3, 48, 2, 8)
    ns.put_prefix(range(48), k, k)
    out = on_gpu(torch.zeros(3, 48, 2, 8)), on_gpu(torch.zeros(3, 48, 2, 8))
    assert ns.get_prefix(range(48), out=out)[0] == 48
    generations = {block.generation: block.start for block in client._pool.segments.blocks.values()}

    def use_again():
        for segment in daemon.arena._segments:
            words = segment.bytes.view(np.uint64)
            for generation, start in generations.items():
                if int(words[start >> 3]) == generation:
                    words[start >> 3] = generation + 1_000_000

    driver.before_copy = use_again
    assert ns.get_prefix(range(48), out=out) == (0, None, None)
    wait_until(lambda: client.stats().values["leases"] == 0)


def test_segments_are_registered_once_beside_the_calls_and_let_go_of_before_they_are_unmapped(daemon, driver):
    with daemon.client(framework="torch", driver=driver) as client:
        client.put(b"gpu", {"x": on_gpu(torch.randn(100))})
        out = {"x": on_gpu(torch.zeros(100))}
        for _ in range(3):
            client.get(b"gpu", out=out)
        client.transfers.settled()
        assert sorted(driver.read_only) == [False, True], "the ingest segment, and the one that is read"
        assert len(driver.registered) == 2
    del client
    daemon.clients.clear()

    def let_go() -> bool:
        gc.collect()  # a thread of the client's that is just ending may be the last to hold one
        return not driver.registered

    wait_until(let_go)


@pytest.mark.parametrize("limit_nbytes", [0, 64 << 30])
def test_memory_that_cannot_be_registered_is_copied_all_the_same(daemon, limit_nbytes):
    driver = Deferred(refuse=bool(limit_nbytes))
    with daemon.client(framework="torch", driver=driver) as client:
        client.transfers._left_nbytes[0] = limit_nbytes
        x = torch.randn(100)
        client.put(b"gpu", {"x": on_gpu(x)})
        out = {"x": on_gpu(torch.zeros(100))}
        client.get(b"gpu", out=out)
        client.transfers.settled()
        assert same(out["x"], x)
        assert driver.registered == {}
        assert driver.batches == 2


def test_a_driver_that_refuses_the_copy_leaves_it_to_torch(client, driver, monkeypatch):
    from kvstore.device import DriverError

    def refuse(*args, **how):
        raise DriverError("refused")

    monkeypatch.setattr(driver, "copy", refuse)
    x = torch.randn(3, 40)
    assert client.put(b"gpu", {"x": on_gpu(x)})
    out = {"x": on_gpu(torch.zeros(3, 40))}
    assert client.get(b"gpu", out=out) is not None
    assert same(out["x"], x)
    ns = client.namespace(**{**MODEL, "revision": "r3"}, chunk_tokens=16)
    k = torch.randn(3, 48, 2, 8)
    assert ns.put_prefix(range(48), on_gpu(k), on_gpu(k)) == 3
    into = on_gpu(torch.zeros(3, 48, 2, 8)), on_gpu(torch.zeros(3, 48, 2, 8))
    assert ns.get_prefix(range(48), out=into)[0] == 48
    assert same(into[0], k) and same(into[1], k)


def test_what_is_held_as_nf4_is_decoded_here_and_copied_once(client, driver):
    k = torch.randn(2, 64, 2, 64)
    client.put(b"nf4", {"k": k})
    client.demote(b"nf4")
    out = {"k": on_gpu(torch.zeros_like(k))}
    hit = client.get(b"nf4", out=out)
    assert hit.lossy
    assert torch.equal(out["k"].numbers, client.get(b"nf4").tensors["k"])


def test_without_a_driver_tensors_on_a_gpu_go_through_torch(daemon, monkeypatch):
    monkeypatch.setattr("kvstored_client.device.open_driver", lambda: None)
    COPIES.clear()
    with daemon.client(framework="torch") as client:
        x = torch.randn(3, 40)
        assert client.put(b"gpu", {"x": on_gpu(x)})
        out = {"x": on_gpu(torch.zeros(3, 40))}
        assert client.get(b"gpu", out=out) is not None
        assert same(out["x"], x)
    assert dict(COPIES) == {"d2h": 1, "h2d": 1}


def test_out_of_another_shape_is_refused_and_nothing_is_copied(client, driver):
    client.put(b"gpu", {"x": torch.randn(3, 40)})
    for wrong in ({"x": on_gpu(torch.zeros(3, 41))}, {"y": on_gpu(torch.zeros(3, 40))}):
        with pytest.raises(InvalidEntry):
            client.get(b"gpu", out=wrong)
    assert driver.runs == 0


@pytest.mark.parametrize(
    ("x", "runs"),
    [
        (torch.zeros(4, 5), (1, 80)),
        (torch.zeros(4, 5)[:, :3], (4, 12)),
        (torch.zeros(4, 5).t(), (20, 4)),
        (torch.zeros(2, 7, 3, 5)[:, 2:4], (2, 120)),
        (torch.zeros(2, 1, 3)[:, :, 1:2], (2, 4)),
        (torch.zeros(()), (1, 4)),
        (torch.zeros(0, 3), (0, 12)),
    ],
    ids=str,
)
def test_a_tensor_s_dense_runs_are_found_in_the_order_of_its_elements(x, runs):
    found = Runs.of(x.as_subclass(FakeCuda))
    assert (found.count, found.nbytes if x.numel() else 12) == runs
    filled = x.clone(memory_format=torch.contiguous_format).copy_(torch.arange(x.numel()).reshape(x.shape))
    x.copy_(filled)
    import ctypes

    read = b"".join(ctypes.string_at(at, found.nbytes) for at in found.addresses())
    assert read == filled.contiguous().numpy().tobytes()


def test_an_expanded_tensor_has_none():
    assert Runs.of(torch.zeros(1, 3).expand(4, 3).as_subclass(FakeCuda)) is None


def test_the_client_has_no_driver_before_a_tensor_on_a_gpu_comes(monkeypatch):
    opened = []
    monkeypatch.setattr("kvstored_client.device.open_driver", lambda: opened.append(1))
    transfers = Transfers(None)
    assert transfers.batch_for([{"x": torch.zeros(3), "y": np.zeros(3)}, None]) is None
    assert not opened
    assert transfers.batch_for([{"x": on_gpu(torch.zeros(3))}]) is None
    assert opened == [1]


def test_no_release_is_sent_while_a_copy_needs_the_memory(client, driver, monkeypatch):
    """Given back at the answer, not after the copy: the daemon may put another entry there."""
    client.put_many([(b"held%d" % i, {"x": torch.full((64,), float(i))}) for i in range(8)])
    sent = []
    take = Connection._take_releases

    def noting(connection):
        numbers = take(connection)
        sent.append((len(numbers), driver.pending))
        return numbers

    monkeypatch.setattr(Connection, "_take_releases", noting)
    driver.before_copy = lambda: sent.append((len(client._pool.connections()[0]._given_back), driver.pending))
    for i in range(8):
        out = {"x": on_gpu(torch.zeros(64))}
        client.get(b"held%d" % i, out=out)
        assert out["x"].numbers.eq(i).all()
    driver.before_copy = lambda: None
    assert [released for released, pending in sent if pending and released] == []
    assert sum(pending for _, pending in sent) == 8
