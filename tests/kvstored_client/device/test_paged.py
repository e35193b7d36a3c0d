"""Chunks in four bits go right into an engine's paged blocks: one batch of copies, decoded and scattered together."""

import random

import pytest
import torch

from kvstore import PackedTensor, decode, encode
from kvstore.device import DriverError
from kvstore.device.deferred import Deferred
from kvstore.errors import RecordCorrupt
from kvstored_client.device.paged import Paged, Scatter
from kvstored_client.integrations.guard import Guard
from kvstored_client.integrations.vllm_blocks import GroupedBuffers
from kvstored_client.integrations.vllm_filling import Filling
from kvstored_client.integrations.vllm_groups import Group, Groups

from .tensors import COPIES, FakeCuda, on_gpu

LAYERS, HEADS, DIM, BLOCK_TOKENS, BLOCKS = 3, 2, 64, 16, 4
TOKENS = BLOCKS * BLOCK_TOKENS
GROUPS = Groups((Group(tuple(f"l{n}" for n in range(LAYERS)), DIM, 0, None),))


def chunk(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.arange(TOKENS)[None, :, None, None] * 0.02 * (1 + torch.arange(DIM // 2))
    bias = 3 * torch.cat([torch.cos(turn), torch.sin(turn)], -1)
    k, v = (torch.randn(LAYERS, TOKENS, HEADS, DIM, generator=generator) for _ in "kv")
    return {"k": (k + bias).to(dtype), "v": v.to(dtype)}


def caches(count=20, dtype=torch.bfloat16):
    return {f"l{n}": on_gpu(torch.full((count, 2, BLOCK_TOKENS, HEADS, DIM), 7.0, dtype=dtype)) for n in range(LAYERS)}


def due_in(layers, chunks):
    """The layers with these (places, tensors) written by hand; a place below 0 is not written."""
    due = {name: layer.numbers.clone() for name, layer in layers.items()}
    for places, tensors in chunks:
        for at, place in enumerate(places):
            for n in range(LAYERS if place >= 0 else 0):
                for i, name in enumerate("kv"):
                    due[f"l{n}"][place, i] = tensors[name][n, at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
    return due


def same(layers, due):
    return all(
        torch.equal(layer.numbers.view(torch.int16), due[name].view(torch.int16)) for name, layer in layers.items()
    )


def test_chunks_of_a_request_are_one_batch_of_a_quarter_of_the_bytes_and_one_launch(guard, driver, monkeypatch):
    client, layers = guard.cache, caches()
    packed = {b"%d" % n: encode(chunk(n), codec="nf4-kv2") for n in range(3)}
    for key, tensors in packed.items():
        assert client.put(key, tensors)
    launches = []
    monkeypatch.setattr(
        "kvstored_client.device.paged.Scatter._launch",
        lambda self, where, rows, there, groups, real=Scatter._launch: (
            launches.append(len(there)), real(self, where, rows, there, groups)
        ),
    )  # fmt: skip
    places = [list(range(n, 20, 5))[:BLOCKS] for n in range(3)]
    wanted = [(key, 0, (own,)) for key, own in zip(packed, places, strict=True)]
    driver.batches = driver.loaded_nbytes = 0
    assert Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS).filled(wanted) == [True] * 3
    due = due_in(caches(), [(own, decode(tensors)) for own, tensors in zip(places, packed.values(), strict=True)])
    driver.settle()
    assert same(layers, due)
    assert launches == [2 * 3]
    assert driver.batches == 1
    assert driver.loaded_nbytes < 0.32 * 3 * sum(x.nbytes for x in chunk(0).values())
    assert "d2h" not in COPIES and "h2d" not in COPIES
    assert (driver.early, driver.pending) == (0, 0)


def test_a_part_of_a_chunk_fills_its_blocks_and_no_other(guard):
    packed, layers = encode(chunk(5), codec="nf4-kv2"), caches()
    guard.cache.put(b"part", packed)
    filling = Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS)
    assert filling.filled([(b"part", 1, ([9, 3],))]) == [True]
    assert same(layers, due_in(caches(), [([-1, 9, 3, -1], decode(packed))]))


def test_what_is_held_raw_or_gone_or_of_another_shape_is_told_apart(guard):
    raw, packed, layers = chunk(6), encode(chunk(7), codec="nf4-kv2"), caches()
    half = {name: x[:, : TOKENS // 2].contiguous() for name, x in chunk(8).items()}
    guard.cache.put_many([(b"raw", raw), (b"half", half)], fidelity="exact")
    guard.cache.put(b"packed", packed)
    filling = Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS)
    wanted = [(b"raw", 0, ([0, 1, 2, 3],)), (b"gone", 0, ([4, 5, 6, 7],)), (b"packed", 0, ([8, 9, 10, 11],)),
              (b"half", 0, ([12, 13, 14, 15],))]  # fmt: skip
    assert filling.filled(wanted) == [True, False, True, False]
    assert same(layers, due_in(caches(), [([0, 1, 2, 3], raw), ([8, 9, 10, 11], decode(packed))]))


def test_raw_chunks_of_a_large_load_lie_beside_the_engine_s_memory_a_few_at_a_time(guard, driver, monkeypatch):
    nbytes = sum(x.nbytes for x in chunk(0).values())
    monkeypatch.setattr("kvstored_client.integrations.vllm_filling.CALL_NBYTES", 2 * nbytes)
    chunks, layers = {b"r%d" % n: chunk(20 + n) for n in range(5)}, caches()
    guard.cache.put_many(list(chunks.items()), fidelity="exact")
    driver.batches = 0
    wanted = [(key, 0, (list(range(4 * n, 4 * n + 4)),)) for n, key in enumerate(chunks)]
    assert Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS).filled(wanted) == [True] * 5
    assert same(layers, due_in(caches(), [(own, x) for (_, _, (own,)), x in zip(wanted, chunks.values(), strict=True)]))
    assert driver.batches == 3


@pytest.mark.parametrize("broken", ["launch", "memory", "batch"])
def test_where_the_gpu_does_not_the_host_decodes_the_same_bits(guard, driver, monkeypatch, broken):
    packed, layers = encode(chunk(9), codec="nf4-kv2"), caches()
    guard.cache.put(b"broken", packed)

    def fails(*_args, **_how):
        raise RuntimeError("no compiler")

    if broken == "launch":
        monkeypatch.setattr("kvstored_client.device.paged.Scatter._launch", fails)
    elif broken == "memory":
        monkeypatch.setattr("kvstored_client.device.paged.Scatter._brought", fails)
    else:
        driver.copy = lambda *_args, **_how: (_ for _ in ()).throw(DriverError("refused"))
    filling = Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS)
    assert filling.filled([(b"broken", 0, ([3, 1, 2, 0],))]) == [True]
    assert same(layers, due_in(caches(), [([3, 1, 2, 0], decode(packed))]))


def test_damaged_parts_are_an_error_and_no_data(guard):
    packed, layers = encode(chunk(10), codec="nf4-kv2"), caches()
    short = {
        name: PackedTensor(x.spec, x.encoding, {**x.parts, "": x.parts[""][:-1]}, x.attrs) for name, x in packed.items()
    }
    places = GroupedBuffers(layers, GROUPS).paged(([0, 1, 2, 3],), BLOCKS)
    with pytest.raises(RecordCorrupt):
        guard.fill([(places[name], x) for name, x in short.items()])
    assert same(layers, due_in(caches(), []))


def test_places_of_layers_that_are_not_alike_are_filled_through_torch(guard):
    packed = encode(chunk(11), codec="nf4-kv2")
    wide = [torch.full((20, BLOCK_TOKENS, HEADS, DIM + n), 7.0, dtype=torch.bfloat16)[..., :DIM] for n in range(LAYERS)]
    layers = [x.as_subclass(FakeCuda) for x in wide]
    places = Paged(packed["v"].spec, layers, [2, 0, 1, 3])
    assert places.where() is None
    guard.fill([(places, packed["v"])])
    v = decode(packed)["v"]
    for n, layer in enumerate(wide):
        for at, place in enumerate([2, 0, 1, 3]):
            assert torch.equal(layer[place], v[n, at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS])


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_the_copies_scatters_a_wrong_byte(daemon, seed):
    driver = Deferred(random.Random(seed).shuffle, kernels=True)
    guard = Guard(daemon.client(framework="torch", driver=driver))
    layers, packed = caches(), encode(chunk(seed), codec="nf4-kv2", prefix_start=bool(seed % 2))
    guard.cache.put(b"%d" % seed, packed)
    driver.compute(0, lambda: layers["l0"].numbers.fill_(7.0))  # whoever had the memory before
    assert Filling(guard, GroupedBuffers(layers, GROUPS), BLOCKS).filled([(b"%d" % seed, 0, ([5, 6, 7, 8],))]) == [True]
    driver.settle()
    assert same(layers, due_in(caches(), [([5, 6, 7, 8], decode(packed))]))
    assert (driver.early, driver.pending) == (0, 0)
    guard.cache.close()
