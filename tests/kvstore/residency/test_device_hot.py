"""The hot tier in a device's memory: what goes there, what comes back, and what happens where it cannot.

The device is `kvstore.device.deferred`: it copies when it must, in the worst order, and counts what ended early.
"""

import gc

import pytest
import torch

from kvstore.config import MIB, ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.device import DriverError
from kvstore.device.deferred import Deferred
from kvstore.errors import ConfigError, InvalidEntry, OverQuota, TierUnavailable
from kvstore.keys import Key
from kvstore.metadata.owner import NOBODY
from kvstore.residency.device_hot import WORK_NBYTES, arena_nbytes
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store
from kvstore.tiers.device_memory import DeviceArena, DeviceTensors
from tests.kvstored_client.device.tensors import COPIES, on_gpu

GIB = 1 << 30


def config_of(hot_nbytes=4 * MIB, **more):
    return StoreConfig(hot=HotConfig(hot_nbytes, device="cuda:0"), **more)


@pytest.fixture
def driver():
    return Deferred()


@pytest.fixture
def store(driver):
    with Store.open(config_of(), background=False, driver=driver) as store:
        yield store


def kv(seed=0, shape=(2, 64, 2, 64)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hot_entries(store):
    return [store._r.hot.get(key) for key in store._r.hot.keys_now()]


def test_what_is_put_lies_in_the_devices_memory_in_every_byte(store, driver):
    x, empty, bits = kv(), torch.empty(0, 3), torch.arange(7, dtype=torch.uint8)
    assert store.put(b"k", {"x": x, "empty": empty, "bits": bits})
    (entry,) = hot_entries(store)
    assert isinstance(entry.tensors, DeviceTensors)
    assert driver.pending == 0
    assert driver.memory(0)[0] == driver.memory_nbytes - store.stats().values["device_nbytes"] < driver.memory_nbytes
    tensors = store.get(b"k").tensors
    assert all(torch.equal(tensors[name], wanted) for name, wanted in (("x", x), ("empty", empty), ("bits", bits)))


def test_a_kernel_that_has_not_run_yet_writes_what_is_kept(store, driver):
    """Bug 4: the copy was only begun when others could already see the entry, or encode it."""
    x = on_gpu(torch.zeros(2, 64, 2, 64))
    driver.compute(0, lambda: x.numbers.copy_(kv(1)))
    COPIES.clear()
    store.put(b"k", {"x": x}, fidelity="exact")
    x.numbers.fill_(-1.0)
    assert torch.equal(store.get(b"k").tensors["x"], kv(1))
    assert not COPIES, "torch copied between the host and the device"
    assert [kept.data_ptr() for kept in driver.kept] == [x.data_ptr()], "its memory is torch's to give to others"


def test_a_strided_tensor_of_the_device_is_copied_run_by_run(store, driver):
    x = kv(2)
    store.put(b"k", {"x": on_gpu(x)[:, 3:60]})
    assert driver.runs == 2
    assert torch.equal(store.get(b"k").tensors["x"], x[:, 3:60])


def test_a_tensor_of_another_device_comes_by_the_host(store):
    x = on_gpu(kv(3))
    x.index = 1
    assert store.put(b"k", {"x": x})
    assert torch.equal(store.get(b"k").tensors["x"], kv(3))


def test_out_is_filled_where_it_lies(store, driver):
    x = kv(4)
    store.put(b"k", {"x": x}, fidelity="exact")
    there, strided, flat = on_gpu(torch.zeros_like(x)), torch.zeros(2, 2, 64, 64), x.new_zeros(x.shape).numpy()
    driver.compute(0, lambda: there.numbers.fill_(-1.0))
    for out in (there, strided.transpose(1, 2), flat, torch.zeros_like(x)):
        assert store.get(b"k", out={"x": out}).tensors["x"] is out
        assert torch.equal(torch.as_tensor(getattr(out, "numbers", out)), x)
    with pytest.raises(InvalidEntry):
        store.get(b"k", out={"x": torch.zeros(3)})
    with pytest.raises(InvalidEntry):
        store.get(b"k", out={"x": torch.zeros_like(x).requires_grad_()})


def test_a_view_is_of_the_devices_memory_and_ends_when_kernels_have_read_it(store, driver):
    x = kv(5)
    store.put(b"k", {"x": x})
    read = []
    with store.lease(b"k") as hit:
        view = hit.tensors["x"]
        assert view.data_ptr() == hot_entries(store)[0].tensors.addresses["x"]
        driver.compute(0, lambda: read.append(view.clone()))
        assert not read
    assert torch.equal(read[0], x)


def test_a_block_that_somebody_views_is_not_used_again(store):
    """Bug 4: what left hot was freed under a reader."""
    store.put(b"k", {"x": kv(6)})
    with store.lease(b"k") as hit:
        view = hit.tensors["x"]
        store.delete(b"k")
        for n in range(8):
            store.put(b"%d" % n, {"x": kv(n + 10)})
        assert torch.equal(view, kv(6))
    used_nbytes = store.stats().values["device_used_nbytes"]
    del view, hit
    assert store.stats().values["device_used_nbytes"] == used_nbytes * 8 // 9


@pytest.mark.parametrize("kernels", [False, True])
def test_what_sinks_and_comes_back_has_the_bytes_of_a_store_in_memory(tmp_path, kernels):
    values = {b"%d" % n: {"k": kv(n), "v": kv(n + 50), "ids": torch.arange(n + 1)} for n in range(4)}
    found = []
    for device in ("cpu", "cuda:0"):
        driver = Deferred(kernels=kernels) if device != "cpu" else None
        config = StoreConfig(hot=HotConfig(4 * MIB, device=device), cold=ColdConfig(path=str(tmp_path / device)))
        with Store.open(config, background=False, driver=driver) as store:
            for key, tensors in values.items():
                store.put(key, tensors, fidelity="exact" if key == b"3" else "auto")
            assert store.demote(*values) == len(values)
            below = [store.get(key) for key in values]
            assert {hit.tier for hit in below} == {"warm", "cold"}
            assert store.promote(*values) == len(values)
            above = [store.get(key) for key in values]
            assert {hit.tier for hit in above} == {"hot"}
            with store.lease(b"0") as hit:
                leased = [x.clone() for x in hit.tensors.values()]
            found.append([*(x for hit in (*below, *above) for x in hit.tensors.values()), *leased])
            receipts = [hit.receipt for hit in above]
            assert max(receipts[0].values()) > 0
            if device != "cpu":
                assert all(isinstance(entry.tensors, DeviceTensors) for entry in hot_entries(store))
                assert store.stats().values["device_failures"] == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_below_hot_lies_in_the_devices_memory():
    driver = Deferred(kernels=True)
    with Store.open(config_of(), background=False, driver=driver) as store:
        store.put(b"mixed", {"k": kv(1, (2, 256, 4, 64)), "ids": torch.arange(100_000)})
        store.put(b"raw", {"ids": torch.arange(1000)})
        store.put(b"nan", {"k": torch.full((64, 64), torch.nan)})
        assert store.demote(b"mixed") == 1
        assert store.locate([b"mixed"])[0].tier == "warm"
        store.delete(b"raw", b"nan")
        assert store.stats().values["device_used_nbytes"] == 0
        assert torch.equal(store.get(b"mixed").tensors["ids"], torch.arange(100_000))


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), OSError(30, "read-only"), torch.OutOfMemoryError()])
def test_an_encoder_that_fails_on_the_device_loses_nothing(error, monkeypatch):
    """Bug 7: the victim was lost, and the put that displaced it failed."""

    def fail(*args, **how):
        raise error

    driver = Deferred(kernels=True)
    with Store.open(config_of(1 * MIB), background=False, driver=driver) as store:
        monkeypatch.setattr(store._transcoder._there, "encode", fail)
        for n in range(5):
            assert store.put(b"%d" % n, {"x": kv(n, (1, 256, 4, 64))})
        places = store.locate([b"%d" % n for n in range(5)])
        assert [place.tier for place in places].count("warm") >= 2
        assert store.stats().values["device_failures"] >= 2
        with Store.open(StoreConfig(), background=False) as plain:
            plain.put(b"0", {"x": kv(0, (1, 256, 4, 64))})
            plain.demote(b"0")
            assert torch.equal(store.get(b"0").tensors["x"], plain.get(b"0").tensors["x"])


def test_a_decoder_that_fails_on_the_device_is_no_damage(monkeypatch):
    """A missing compiler is blamed on the entry by `decode_all`: the host's verdict counts."""
    driver = Deferred(kernels=True)
    with Store.open(config_of(), background=False, driver=driver) as store:
        store.put(b"k", {"x": kv(7)})
        store.demote(b"k")
        wanted = store.get(b"k").tensors["x"]

        def fail(*args, **how):
            raise RuntimeError("no C compiler")

        monkeypatch.setattr(store._transcoder._there, "decode", fail)
        assert torch.equal(store.get(b"k").tensors["x"], wanted)
        assert store.promote(b"k") == 1
        hit = store.get(b"k")
        assert hit.tier == "hot" and torch.equal(hit.tensors["x"], wanted)
        assert store.stats().values["device_failures"] == 2


def test_where_others_took_the_memory_less_is_held_and_then_a_put_is_over_quota():
    def of(mib):
        return {"x": torch.zeros(mib * MIB, dtype=torch.uint8)}

    driver = Deferred(memory_nbytes=GIB)
    with Store.open(config_of(256 * MIB, warm=WarmConfig(0)), background=False, driver=driver) as store:
        assert store.put(b"before", of(10), fidelity="exact")
        assert store.put(b"pinned", of(120), fidelity="exact", pin=True)
        driver.others_nbytes += driver.memory(0)[0]
        assert store.put(b"a", of(100), fidelity="exact")
        assert store.put(b"b", of(120), fidelity="exact"), "room is made of what hot holds"
        assert [place is not None for place in store.locate([b"pinned", b"a", b"b"])] == [True, False, True]
        with pytest.raises(OverQuota, match="cuda:0 has no room for an entry of .* only pinned entries are left"):
            store.put(b"c", of(130), fidelity="exact")
        assert store.get(b"pinned") is not None
        store.unpin(b"pinned")
        assert store.put(b"c", of(130), fidelity="exact")


def test_a_device_with_no_memory_at_all_refuses_a_put_and_keeps_serving():
    driver = Deferred()
    with Store.open(config_of(), background=False, driver=driver) as store:
        driver.others_nbytes = driver.memory_nbytes
        with pytest.raises(OverQuota, match="cuda:0 has no room"):
            store.put(b"k", {"x": kv()})
        driver.others_nbytes = 0
        assert store.put(b"k", {"x": kv()})


def test_a_promotion_without_room_on_the_device_is_none_and_the_entry_stays():
    driver = Deferred()
    with Store.open(config_of(), background=False, driver=driver) as store:
        store.put(b"k", {"x": kv()})
        store.demote(b"k")
        assert store.stats().values["device_used_nbytes"] == 0
        store._device_hot.arena._drop_empty(0)
        driver.others_nbytes = driver.memory_nbytes
        assert store.promote(b"k") == 0
        assert store.get(b"k").tier == "warm"
        assert store.stats().values["maintainer_errors"] == 0


def test_what_hot_can_never_hold_goes_below_and_never_to_the_device(driver):
    config = config_of(1 * MIB, warm=WarmConfig(4 * MIB))
    with Store.open(config, background=False, driver=driver) as store:
        x = kv(8, (1, 512, 8, 64))
        assert x.nbytes == 1 * MIB
        assert store.put(b"k", {"x": x})
        assert driver.batches == 0
        assert store.get(b"k").tier == "warm"
        mine = raw_entry(Key(b"l"), {"x": x})
        kept = store._device_hot.place(mine, NOBODY).tensors["x"].parts[""]
        x.zero_()  # it is the caller's again
        assert kept.abs().sum() > 0


def test_a_driver_that_refuses_copies_is_a_failed_put_and_a_miss(store, driver, monkeypatch):
    store.put(b"held", {"x": kv()})

    def refuse(*args, **how):
        raise DriverError("the device is gone")

    monkeypatch.setattr(driver, "copy", refuse)
    with pytest.raises(TierUnavailable, match="the device is gone"):
        store.put(b"k", {"x": kv()})
    assert store.get(b"held") is None


def test_inspecting_an_entry_copies_nothing(store, driver):
    store.put(b"k", {"x": kv(), "n": torch.arange(3)})
    batches = driver.batches
    assert store.inspect(b"k").tensors["x"].shape == (2, 64, 2, 64)
    assert store.explain(b"k")[0].tier == "hot"
    assert list(store.entries())
    assert driver.batches == batches


def test_with_numpy_a_hit_is_on_the_host(driver):
    with Store.open(config_of(), background=False, driver=driver, framework="numpy") as store:
        store.put(b"k", {"x": kv().numpy()})
        assert (store.get(b"k").tensors["x"] == kv().numpy()).all()


def test_the_memory_goes_back_to_the_device_when_it_is_closed_and_no_view_is_left(driver):
    store = Store.open(config_of(), background=False, driver=driver)
    store.put(b"k", {"x": kv()})
    with store.lease(b"k") as hit:
        view = hit.tensors["x"]
    del hit
    store.close()
    gc.collect()
    assert driver.memory(0)[0] < driver.memory_nbytes
    assert torch.equal(view, kv())
    del view, store
    gc.collect()
    assert driver.memory(0)[0] == driver.memory_nbytes
    assert driver.early == 0


def test_the_budget_changes_while_it_is_open_and_not_beyond_what_is_free(store, driver):
    x = torch.zeros(MIB, dtype=torch.uint8)
    for n in range(3):
        store.put(b"%d" % n, {"x": x}, fidelity="exact")
    store.reconfigure(config_of(2 * MIB))
    assert len(hot_entries(store)) == 1
    assert store.stats().values["device_nbytes"] == arena_nbytes(4 * MIB)
    store.delete(b"2")
    assert store.stats().values["device_nbytes"] == 0, "what is over the limit goes back once it is empty"
    store.put(b"2", {"x": x}, fidelity="exact")
    assert store.stats().values["device_nbytes"] == arena_nbytes(2 * MIB)
    with pytest.raises(ConfigError, match="needs .* more bytes of"):
        store.reconfigure(config_of(2 * GIB))
    assert store.config.hot.capacity_nbytes == 2 * MIB
    store.reconfigure(config_of(200 * MIB))
    assert store._device_hot.arena.limit_nbytes == arena_nbytes(200 * MIB)


def test_no_such_device_and_too_little_memory_are_said_before_anything_is_opened(tmp_path):
    """Bugs 9 and 15: it started, and every put failed."""
    cold = ColdConfig(path=str(tmp_path / "cold"))
    with pytest.raises(ConfigError, match=r'hot.device = "cuda:7" cannot be used: there are 2 devices'):
        Store.open(StoreConfig(hot=HotConfig(MIB, device="cuda:7"), cold=cold), driver=Deferred())
    just = arena_nbytes(MIB) + WORK_NBYTES
    with pytest.raises(ConfigError, match=f"hot.capacity_nbytes = {MIB} needs {just} more bytes"):
        Store.open(config_of(MIB, cold=cold), driver=Deferred(memory_nbytes=just - 1))
    assert not (tmp_path / "cold").exists()
    Store.open(config_of(MIB), driver=Deferred(memory_nbytes=just), background=False).close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r'hot.device = "cuda:0" cannot be used: .*set it to "cpu"'):
        Store.open(config_of())


def test_a_moving_border_between_hot_and_warm_is_refused_with_a_device():
    """Bug 13: it gave bytes of RAM to the GPU."""
    with pytest.raises(ConfigError, match="contradict each other"):
        config_of(split="auto")


def test_a_stop_writes_what_is_on_the_device_to_disk(tmp_path):
    config = config_of(cold=ColdConfig(path=str(tmp_path / "cold")))
    values = {b"exact": kv(1), b"auto": kv(2)}
    with Store.open(config, background=False, driver=Deferred()) as store:
        for key, x in values.items():
            store.put(key, {"x": x}, fidelity=key.decode())
    with Store.open(config, background=False, driver=Deferred()) as store:
        assert torch.equal(store.get(b"exact").tensors["x"], values[b"exact"])
        hit = store.get(b"auto")
        assert hit.tier == "cold" and hit.lossy and hit.receipt["x"] < 0.25


def test_a_block_s_generation_is_gone_before_its_room_is_used_again_however_that_is_cut():
    """A larger block that begins before it says nothing of it."""
    arena = DeviceArena(Deferred(), 0, 4 * MIB, segment_nbytes=MIB)
    arena.shares = True
    first, second = arena.take(64 << 10), arena.take(64 << 10)
    places = [first.place, second.place]
    table = places[1].segment._table.words
    assert [int(table[place.start >> 6]) for place in places] == [place.generation for place in places]
    del first, second
    whole = arena.take(128 << 10)
    assert whole.place.start == places[0].start
    assert int(table[places[1].start >> 6]) == 0
    assert int(table[whole.place.start >> 6]) == whole.place.generation > places[1].generation


def test_who_gives_all_of_its_memory_back_says_so_and_keeps_no_descriptor():
    import os

    driver = Deferred()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    arena = DeviceArena(driver, 0, 4 * MIB, segment_nbytes=MIB)
    arena.shares = True
    block = arena.take(100)
    shared = block.place.segment
    table = os.dup(shared.descriptors[1])
    arena.close()
    del block
    assert shared.closed
    assert os.pread(table, 8, 0) == b"\xff" * 8
    os.close(table)
    assert driver.memory(0)[0] == driver.memory_nbytes
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
