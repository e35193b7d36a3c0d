"""What is held encoded crosses the bus to a GPU as it is held, and is decoded there: a quarter of the bytes."""

import asyncio

import numpy as np
import pytest
import torch

from kvstore import PackedTensor, decode, encode
from kvstore.device.deferred import Deferred
from kvstored_client import aio

from .tensors import COPIES, FakeCuda, on_gpu

MODEL = {
    "model": "m", "revision": "r1", "dtype": "bfloat16", "layers": 3, "kv_heads": 2, "head_dim": 64, "layout": "lthd",
    "fidelity": "auto",
}  # fmt: skip
DOORS = ("shared memory", "stream")


class Counting(Deferred):
    """Also counts bytes, by direction."""

    loaded_nbytes = stored_nbytes = 0

    def copy(self, to, of, nbytes, stream, *, store):
        self.loaded_nbytes += 0 if store else sum(nbytes)
        self.stored_nbytes += sum(nbytes) if store else 0
        super().copy(to, of, nbytes, stream, store=store)


@pytest.fixture
def driver():
    return Counting(kernels=True)


@pytest.fixture(params=DOORS)
def client(request, daemon, driver):
    COPIES.clear()
    near = request.param == "shared memory"
    with daemon.client(framework="torch", driver=driver, shared_memory=near) as found:
        yield found


def values(seed=1, tokens=96):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, tokens, 2, 64, generator=generator).bfloat16() for name in ("k", "v")}


def held_encoded(client, key, tensors):
    """Put, and what a get by a client without a GPU gives."""
    client.put(key, tensors)
    assert client.demote(key) == 1
    hit = client.get(key, packed=True)
    return decode(hit.tensors)


def bits(x):
    return x.contiguous().view(torch.int16)


def test_a_get_brings_a_quarter_of_the_bytes_and_copies_nothing_on_the_host(client, driver):
    tensors = {**values(), "n": torch.arange(10)}
    due = held_encoded(client, b"nf4", tensors)
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in tensors.items()}
    hit = client.get(b"nf4", out=out)
    assert hit.lossy
    assert all(hit.tensors[name] is out[name] for name in tensors)
    assert all(torch.equal(bits(out[name].numbers), bits(due[name])) for name in ("k", "v"))
    assert torch.equal(out["n"].numbers, tensors["n"])
    assert driver.loaded_nbytes < 0.3 * sum(x.nbytes for x in tensors.values())
    assert (driver.batches, driver.pending, dict(COPIES)) == (1, 0, {})


def test_a_strided_target_is_filled_run_by_run_on_the_device(client, driver):
    due = held_encoded(client, b"nf4", values())
    whole = on_gpu(torch.zeros(3, 200, 2, 64, dtype=torch.bfloat16))
    out = {"k": whole[:, 50:146], "v": on_gpu(torch.zeros(3, 96, 2, 64, dtype=torch.bfloat16))}
    assert client.get(b"nf4", out=out) is not None
    assert torch.equal(bits(whole.numbers[:, 50:146]), bits(due["k"]))
    assert torch.equal(bits(out["v"].numbers), bits(due["v"]))
    assert not whole.numbers[:, :50].any()
    assert not whole.numbers[:, 146:].any()
    assert (driver.batches, dict(COPIES)) == (2, {})


def test_chunks_of_a_prefix_in_four_bits_take_one_batch_over_the_bus(client, driver, request):
    ns = client.namespace(**{**MODEL, "revision": request.node.name}, chunk_tokens=16)
    x = values(2, 72)
    tokens = range(72)
    assert ns.put_prefix(tokens, x["k"], x["v"]) == 5
    keys = ns.keys(tokens)
    client.demote(*keys)
    n, k, v = ns.get_prefix(tokens)
    assert n == 72
    driver.loaded_nbytes = 0
    into = tuple(on_gpu(torch.zeros(3, 100, 2, 64, dtype=torch.bfloat16)) for _ in "kv")
    # Asked for twice, they were promoted: put back.
    client.demote(*keys)
    n, got_k, got_v = ns.get_prefix(tokens, out=into)
    assert n == 72
    assert torch.equal(bits(got_k.numbers), bits(k))
    assert torch.equal(bits(got_v.numbers), bits(v))
    decoded_nbytes = k.nbytes + v.nbytes
    # The scatter's batches are within the device: what crossed the bus is the rest.
    assert driver.loaded_nbytes - decoded_nbytes < 0.4 * decoded_nbytes
    assert dict(COPIES) == {}
    again = tuple(on_gpu(torch.zeros(3, 100, 2, 64, dtype=torch.bfloat16)) for _ in "kv")
    assert ns.fill_prefix(tokens, *again) == 72
    assert torch.equal(bits(again[0].numbers[:, :72]), bits(k))


def test_an_asyncio_client_does_the_same(client, daemon, driver):
    due = held_encoded(client, b"nf4 aio", values())
    near = client._pool is not None

    async def run():
        address = f"unix:{daemon.socket_path}"
        async with aio.Client(address, on_error="raise", driver=driver, shared_memory=near) as cache:
            out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}
            assert await cache.get(b"nf4 aio", out=out) is not None
            assert all(torch.equal(bits(out[name].numbers), bits(x)) for name, x in due.items())
            ns = cache.namespace(**{**MODEL, "revision": f"aio {near}"}, chunk_tokens=16)
            x = values(3, 40)
            assert await ns.put_prefix(range(40), x["k"], x["v"]) == 3
            client.demote(*ns.keys(range(40)))
            n, k, _ = await ns.get_prefix(range(40))
            client.demote(*ns.keys(range(40)))
            into = tuple(on_gpu(torch.zeros(3, 40, 2, 64, dtype=torch.bfloat16)) for _ in "kv")
            assert (await ns.get_prefix(range(40), out=into))[0] == n == 40
            assert torch.equal(bits(into[0].numbers), bits(k))

    asyncio.run(run())
    assert dict(COPIES) == {}


def test_a_get_waits_for_what_still_uses_the_memory_of_its_tensor(client, driver):
    due = held_encoded(client, b"nf4", values())
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}
    for x in out.values():
        driver.compute(0, lambda x=x: x.numbers.fill_(7))
    assert client.get(b"nf4", out=out) is not None
    driver.settle()
    assert all(torch.equal(bits(out[name].numbers), bits(x)) for name, x in due.items())


@pytest.mark.parametrize("failing", ["kernels", "memory"])
def test_where_the_gpu_fails_the_host_decodes_the_same_bits(client, driver, monkeypatch, failing):
    due = held_encoded(client, b"nf4", values())
    real = driver.tensor if failing == "kernels" else driver.where
    monkeypatch.setattr(driver, "tensor" if failing == "kernels" else "where", _refuse)
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}
    assert client.get(b"nf4", out=out) is not None
    assert all(torch.equal(bits(out[name].numbers), bits(x)) for name, x in due.items())
    assert real is not None
    assert client.failures == 0


def _refuse(*args, **how):
    raise RuntimeError("no compiler, or no memory")


def test_a_driver_that_refuses_the_copy_leaves_all_of_it_to_the_host(client, driver, monkeypatch):
    from kvstore.device import DriverError

    def refuse(*args, **how):
        raise DriverError("refused")

    due = held_encoded(client, b"nf4", values())
    monkeypatch.setattr(driver, "copy", refuse)
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}
    assert client.get(b"nf4", out=out) is not None
    assert all(torch.equal(bits(out[name].numbers), bits(x)) for name, x in due.items())


def test_damaged_parts_are_a_miss_and_never_other_values(daemon, driver, client):
    """Damaged in the daemon's memory, past what a checksum of the transport sees: by the codec's own rules."""
    packed = encode(values(), codec="nf4")
    client.put(b"damaged", packed)
    client.on_error = "miss"

    def damage():
        entry = daemon.store._r.warm.get(b"damaged")
        entry.tensors["k"].parts["nested_absmax"].fill_(float("nan"))

    daemon.on_loop(damage)
    client._on_error = "miss"
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in values().items()}
    assert client.get(b"damaged", out=out) is None
    assert client.get(b"damaged", packed=True) is None
    assert client.failures == 2


def test_a_block_that_is_used_again_during_the_copy_is_a_miss(daemon, driver):
    with daemon.client(framework="torch", driver=driver) as client:
        due = held_encoded(client, b"gone", values())
        out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}

        def use_again():
            for block in client._pool.segments.blocks.values():
                for segment in daemon.arena._segments:
                    words = segment.bytes.view(np.uint64)
                    at = block.start >> 3
                    if at < words.size and int(words[at]) == block.generation:
                        words[at] += 1 << 40

        driver.before_copy = use_again
        assert client.get(b"gone", out=out) is None
        assert client.failures == 1
        driver.before_copy = lambda: None


def test_parts_that_lie_on_a_gpu_are_put_in_one_batch(client, driver):
    packed = encode(values())
    there = {
        name: PackedTensor(x.spec, x.encoding, {s: on_gpu(part) for s, part in x.parts.items()}, x.attrs)
        for name, x in packed.items()
    }
    assert client.put(b"from gpu", there)
    got = client.get(b"from gpu", packed=True).tensors
    assert all(torch.equal(got[name].parts[s], part) for name, x in packed.items() for s, part in x.parts.items())
    if client._pool is not None:
        assert (driver.batches, dict(COPIES)) == (1, {})
        assert driver.stored_nbytes == sum(x.nbytes for x in packed.values())


def test_a_client_that_lets_the_daemon_decode_gets_numbers(daemon, driver):
    with daemon.client(framework="torch", driver=driver, decode="daemon") as client:
        due = held_encoded(client, b"nf4", values())
        out = {name: on_gpu(torch.zeros_like(x)) for name, x in due.items()}
        assert client.get(b"nf4", out=out) is not None
        assert driver.loaded_nbytes == sum(x.nbytes for x in due.values())
        assert all(torch.equal(bits(out[name].numbers), bits(x)) for name, x in due.items())


def test_tensors_on_the_host_beside_those_on_a_gpu_are_decoded_on_the_host(client, driver):
    due = held_encoded(client, b"nf4", values())
    out = {"k": on_gpu(torch.zeros_like(due["k"])), "v": torch.zeros_like(due["v"])}
    assert client.get(b"nf4", out=out) is not None
    assert isinstance(out["k"], FakeCuda)
    assert torch.equal(bits(out["k"].numbers), bits(due["k"]))
    assert torch.equal(bits(out["v"]), bits(due["v"]))
