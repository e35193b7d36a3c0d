"""Whatever order a device does its work in, and whenever memory is used again: no wrong byte, nothing freed early.

A state machine over a store whose hot tier is on the deferred device. Kernels write to tensors before they are put,
read views and write to memory before it is filled, all as late as they may. A block that nobody refers to is poisoned
at once: a copy that is still to be done with it is counted, and what it gives is wrong.
"""

import random
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.config import MIB, HotConfig, StoreConfig, WarmConfig
from kvstore.device.deferred import Deferred
from kvstore.store import Store
from kvstore.tiers.device_memory import DeviceArena
from tests.kvstored_client.device.tensors import on_gpu

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
SHAPE = (2, 64, 4, 32)


def value(number):
    return torch.full(SHAPE, float(number)) + torch.arange(64).reshape(1, 64, 1, 1) / 64


@pytest.fixture
def poisoned(monkeypatch):
    """Blocks are poisoned when they are given back."""
    plain = DeviceArena.given_back

    def given_back(self, segment, start):
        self._driver.poison(segment.address + start, segment.free._taken[start])
        plain(self, segment, start)

    monkeypatch.setattr(DeviceArena, "given_back", given_back)


class Interleavings(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), kernels=st.booleans())
    def begin(self, seed, kernels):
        self.driver = Deferred(random.Random(seed).shuffle, kernels=kernels)
        # Room for five of the six, and warm for some.
        config = StoreConfig(hot=HotConfig(5 * 66_000 + 4_000, device="cuda:0"), warm=WarmConfig(MIB))
        self.store = Store.open(config, background=False, driver=self.driver)
        self.store._device_hot.arena.limit_nbytes = 6 * 66_000  # no slack: blocks are used again at once
        self.held, self.number, self.later = {}, 0, []

    def new(self):
        """A tensor on the device whose numbers a kernel is still to write."""
        self.number += 1
        x, number = on_gpu(torch.zeros(SHAPE)), self.number
        self.driver.compute(0, lambda: x.numbers.copy_(value(number)))
        return x, number

    @rule(key=KEYS, exact=st.booleans(), where=st.sampled_from(["device", "strided", "host"]))
    def put(self, key, exact, where):
        x, number = self.new()
        if where == "host":
            x = value(number)
        given = x.transpose(1, 2).contiguous().transpose(1, 2) if where == "strided" and exact else x
        if where == "strided" and exact:
            self.driver.compute(0, lambda: given.numbers.copy_(value(number)))
        assert self.store.put(key, {"x": given}, fidelity="exact" if exact else "auto")
        self.held[key] = number, exact
        if where == "host":
            x.zero_()  # it is the caller's again

    @rule(key=KEYS)
    def get(self, key):
        self.check(key, self.store.get(key))

    @rule(key=KEYS)
    def get_into(self, key):
        out = on_gpu(torch.zeros(SHAPE))
        self.driver.compute(0, lambda: out.numbers.fill_(-1.0))
        hit = self.store.get(key, out={"x": out})
        if hit is not None:
            self.later.append((out, self.held[key], hit.lossy))

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True), gone=KEYS)
    def view(self, keys, gone):
        read = []
        with self.store.lease_many(keys) as hits:
            for key, hit in zip(keys, hits, strict=True):
                if hit is not None:
                    view = hit.tensors["x"]
                    self.driver.compute(0, lambda key=key, hit=hit, view=view: read.append((key, hit, view.clone())))
                    del view
                del hit
            self.delete(gone)
        for key, hit, x in read:
            if key != gone:
                self.right(x, self.held[key], hit.lossy)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True))
    def demote(self, keys):
        self.store.demote(*keys)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=3, unique=True))
    def promote(self, keys):
        self.store.promote(*keys)

    @rule(key=KEYS)
    def delete(self, key):
        self.store.delete(key)
        self.held.pop(key, None)

    @rule()
    def kernels_run(self):
        self.driver.settle()
        for out, held, lossy in self.later:
            self.right(out.numbers, held, lossy)
        self.later.clear()

    def check(self, key, hit):
        if hit is not None:
            self.right(hit.tensors["x"], self.held[key], hit.lossy)

    def right(self, x, held, lossy):
        number, exact = held
        assert not (exact and lossy)
        wanted = value(number)
        if lossy:
            assert float((x - wanted).norm() / wanted.norm()) < 0.25
        else:
            assert torch.equal(x, wanted)

    @invariant()
    def nothing_is_under_way_and_nothing_ended_early(self):
        if hasattr(self, "driver"):
            assert self.driver.early == 0
            assert self.driver.pending == 0

    def teardown(self):
        if hasattr(self, "driver"):
            self.kernels_run()
            for key in self.held:
                self.check(key, self.store.get(key))
            assert self.store.stats().values["device_failures"] == 0
            self.store.close()


@pytest.mark.usefixtures("poisoned")
def test_no_order_of_the_devices_work_gives_a_wrong_byte():
    case = Interleavings.TestCase
    case.settings = settings(
        max_examples=60, stateful_step_count=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    case().runTest()


@pytest.mark.usefixtures("poisoned")
def test_many_threads_share_one_device():
    driver = Deferred(random.Random(3).shuffle)
    config = StoreConfig(hot=HotConfig(5 * 66_000 + 4_000, device="cuda:0"), warm=WarmConfig(2 * MIB))
    wrong: list[str] = []

    def work(store: Store, seed: int) -> None:
        chance = random.Random(seed)
        for number in range(150):
            key = b"%d" % chance.randrange(8)
            verb = chance.choice(["put", "get", "get", "view", "demote", "promote", "delete"])
            if verb == "put":
                x = torch.full(SHAPE, float(seed * 1000 + number))
                store.put(key, {"x": x, "n": x[0, 0, 0, :1].clone()}, fidelity="exact")
            elif verb == "get":
                note(store.get(key))
            elif verb == "view":
                with store.lease(key) as hit:
                    note(hit)
            else:
                getattr(store, verb)(key)

    def note(hit) -> None:
        if hit is not None and not torch.equal(hit.tensors["x"], hit.tensors["n"].expand(SHAPE)):
            wrong.append(hit.tier)

    with Store.open(config, driver=driver) as store:
        store._device_hot.arena.limit_nbytes = 8 * 66_000
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert driver.early == 0
    assert driver.pending == 0
