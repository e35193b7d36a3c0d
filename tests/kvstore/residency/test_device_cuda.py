"""The hot tier on a real GPU, where there is one: the same store as `test_device_hot`, with CUDA for its driver."""

import gc

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kvstore.config import MIB, HotConfig, StoreConfig, WarmConfig
from kvstore.device.cuda import Cuda
from kvstore.store import Store


def kv(seed):
    return torch.randn((2, 256, 4, 64), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_memory_is_taken_viewed_and_given_back():
    driver = Cuda()
    free = driver.memory(0)[0]
    memory = driver.allocate(0, 64 * MIB)
    assert driver.memory(0)[0] <= free - 64 * MIB
    driver.tensor(0, memory.address, 1024, memory).fill_(7)
    assert int(driver.tensor(0, memory.address, 1024, memory).sum()) == 7 * 1024
    driver.free(memory)
    assert driver.memory(0)[0] > free - 64 * MIB


def test_what_is_put_comes_back_in_every_way_and_sinks_with_the_bytes_of_the_cpu():
    values = {b"%d" % n: kv(n) for n in range(4)}
    side = torch.cuda.Stream()
    with Store.open(StoreConfig(hot=HotConfig(16 * MIB, device="cuda:0")), background=False) as store:
        for key, x in values.items():
            with torch.cuda.stream(side):
                assert store.put(key, {"x": x.cuda(non_blocking=True) * 1})
        for key, x in values.items():
            hit = store.get(key)
            assert hit.tensors["x"].is_cuda and torch.equal(hit.tensors["x"].cpu(), x)
            out, strided = torch.empty_like(x).cuda(), torch.empty(2, 4, 256, 64, dtype=x.dtype, device="cuda")
            store.get(key, out={"x": out})
            store.get(key, out={"x": strided.transpose(1, 2)})
            assert torch.equal(out.cpu(), x) and torch.equal(strided.transpose(1, 2).cpu(), x)
            with store.lease(key) as hit:
                doubled = hit.tensors["x"] * 2
            assert torch.equal(doubled.cpu(), x * 2)
        assert store.demote(*values) == 4
        below = {key: store.get(key).tensors["x"].cpu() for key in values}
        assert store.promote(*values) == 4
        assert all(torch.equal(store.get(key).tensors["x"].cpu(), below[key]) for key in values)
        with Store.open(StoreConfig(warm=WarmConfig(64 * MIB)), background=False) as plain:
            for key, x in values.items():
                plain.put(key, {"x": x})
            plain.demote(*values)
            assert all(torch.equal(plain.get(key).tensors["x"], below[key]) for key in values)


def test_a_full_tier_turns_over_without_a_wrong_byte():
    with Store.open(StoreConfig(hot=HotConfig(4 * MIB, device="cuda:0")), background=False) as store:
        for n in range(64):
            store.put(b"%d" % n, {"x": kv(n).cuda()}, fidelity="exact" if n % 2 else "auto")
            assert torch.equal(store.get(b"%d" % n).tensors["x"].cpu(), kv(n))
        gc.collect()
        assert store.stats().values["device_used_nbytes"] <= 5 * MIB
