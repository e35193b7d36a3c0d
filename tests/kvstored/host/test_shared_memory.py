"""Shared memory beyond the hot tier's budget of now goes back to the kernel, by whatever the budget shrank."""

from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.config import MIB, HotConfig, StoreConfig, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.shm.arena import Arena
from kvstore.store import Store
from kvstored.host import shared_memory
from kvstored.host.pressure import PressureValve
from kvstored.host.shared_memory import IN_VAIN_S, SharedMemory, arena_limit_nbytes
from tests.conftest import wait_until
from tests.kvstored.host.test_pressure import Fake
from tests.kvstored.inside import daemon_inside

CONFIG = StoreConfig(hot=HotConfig(128 * MIB), warm=WarmConfig(0))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(arena_limit_nbytes(CONFIG), segment_nbytes=16 * MIB)
    yield arena
    arena.close()


def test_what_pressure_frees_goes_back_as_soon_as_nobody_holds_it(arena: Arena) -> None:
    """What left hot may still be on its way to the disk when the valve shrinks it."""
    clock, sensor = Clock(), Fake()
    with Store.open(CONFIG, background=False, framework="numpy", room=arena.empty) as store:
        watched, valve = (
            SharedMemory(store, arena, lambda: store.hot_capacity_nbytes, clock),
            PressureValve(store, 10.0, sensor, clock),
        )
        on_its_way = [arena.empty({"x": TensorSpec("uint8", (15 * MIB,))}) for _ in range(10)]
        assert arena.nbytes == 160 * MIB
        watched.turn()
        assert arena.nbytes == 160 * MIB, "within the budget and its slack"
        sensor.stall = 25.0
        for _ in range(4):
            valve.turn()
        watched.turn()
        assert arena.nbytes == 160 * MIB
        del on_its_way[:4]
        watched.turn()
        assert arena.nbytes == 160 * MIB, "it was in vain a moment ago"
        clock.now += IN_VAIN_S
        watched.turn()
        assert arena.nbytes == 96 * MIB


def test_a_daemon_does_so_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "SLACK_MIN_NBYTES", MIB)
    monkeypatch.setattr(shared_memory, "IN_VAIN_S", 0.0)
    with daemon_inside(segment_nbytes=2 * MIB) as inside:
        client = inside.client()
        value = np.arange(MIB // 4, dtype=np.float32)
        for i in range(12):
            assert client.put(b"%d" % i, {"x": value + i}, fidelity="exact")
            assert client.get(b"%d" % i) is not None
        assert inside.arena.nbytes == 24 * MIB
        client.close()  # with its leases
        inside.daemon.live.change({"store.hot.capacity_nbytes": "4MiB"})
        inside.store.drain()
        wait_until(lambda: inside.arena.nbytes <= 6 * MIB)
        for i in range(12):
            hit = inside.client().get(b"%d" % i)
            assert hit is not None
            assert np.array_equal(hit.tensors["x"], value + i)
