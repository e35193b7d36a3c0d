"""The hot tier gives way to memory pressure, and comes back."""

import subprocess
import sys

import numpy as np
import pytest

from kvstore import Store
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstored.host.pressure import CALM_S, PressureValve, Sensor, stall_percent
from tests.conftest import environment

MIB = 1 << 20


class Fake:
    stall, ratio = 0.0, 0.0

    def stall_percent(self):
        return self.stall

    def limit_ratio(self):
        return self.ratio


@pytest.fixture
def made():
    config = StoreConfig(hot=HotConfig(capacity_nbytes=8 * MIB), warm=WarmConfig(capacity_nbytes=8 * MIB))
    with Store.open(config, background=False, framework="numpy") as store:
        for i in range(7):
            store.put(b"%d" % i, {"x": np.random.default_rng(i).standard_normal(MIB // 4, dtype=np.float32)})
        now = [0.0]
        sensor = Fake()
        yield store, PressureValve(store, 10.0, sensor, lambda: now[0]), sensor, now


def test_under_pressure_the_oldest_entries_sink_and_all_are_still_held(made):
    store, valve, sensor, _ = made
    sensor.stall = 25.0
    valve.turn()
    stats = store.stats()
    assert store.hot_capacity_nbytes == 6 * MIB
    assert stats.tiers["hot"].used_nbytes <= 6 * MIB
    assert store.locate([b"0"])[0].tier == "warm"
    assert store.locate([b"6"])[0].tier == "hot"
    assert all(store.get(b"%d" % i) is not None for i in range(7))
    assert valve.shrinks == 1


def test_it_never_shrinks_below_an_eighth_and_puts_go_on(made):
    store, valve, sensor, _ = made
    sensor.ratio = 0.95
    for _ in range(20):
        valve.turn()
    assert store.hot_capacity_nbytes == MIB
    assert store.put(b"new", {"x": np.zeros(100, np.uint8)})
    assert store.get(b"new") is not None


def test_it_grows_back_slowly_and_to_what_was_configured(made):
    store, valve, sensor, now = made
    sensor.stall = 25.0
    valve.turn()
    sensor.stall = 0.0
    valve.turn()
    assert store.hot_capacity_nbytes == 6 * MIB
    for _ in range(10):
        now[0] += CALM_S
        valve.turn()
    assert store.hot_capacity_nbytes == 8 * MIB


def test_the_kernels_files_are_read_as_they_are(tmp_path):
    text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=1\nfull avg10=3.00 avg60=0 avg300=0 total=0\n"
    assert stall_percent(text) == 12.34
    assert stall_percent("") == 0.0
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "pressure").mkdir()
    group = groups / "system.slice/kvstored.service"
    group.mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/system.slice/kvstored.service\n")
    (proc / "pressure/memory").write_text(text.replace("12.34", "1.00"))
    sensor = Sensor(proc, groups)
    assert sensor.stall_percent() == 1.0  # the group tells no pressure of its own
    assert sensor.limit_ratio() == 0.0
    (group / "memory.max").write_text("1000\n")
    (group / "memory.high").write_text("max\n")
    (group / "memory.stat").write_text("anon 650\nfile 5000\nshmem 300\nshmem_thp 7\n")
    (group / "memory.pressure").write_text(text)
    sensor = Sensor(proc, groups)
    assert sensor.limit_ratio() == 0.95
    assert sensor.stall_percent() == 12.34


def test_a_machine_without_these_files_presses_nobody(tmp_path):
    sensor = Sensor(tmp_path, tmp_path)
    assert sensor.stall_percent() == sensor.limit_ratio() == 0.0


_BURST = """
import sys, torch
from kvstored.host.heap import Heap
from kvstored.host.process import tune
tune()
heap = Heap(32 << 20)
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(300)]
keep = blocks[::30]                      # the heap's end stays in use: only trimming reaches the holes
high = heap.resident_nbytes()
heap.turn()
assert heap.trims == 0, "all in use"
del blocks
assert heap.idle_nbytes() > 200 << 20
heap.turn()
assert heap.trims == 1
assert heap.resident_nbytes() < high - (200 << 20)
assert heap.idle_nbytes() < 32 << 20
heap.turn()
assert heap.trims == 1
assert all(int(block[0]) == 1 for block in keep)
"""


_QUIET = """
import torch
from kvstored.host import heap as module
from kvstored.host.heap import Heap, QUIET_TURNS
from kvstored.host.process import tune
tune()
heap = Heap(1 << 40)                     # no burst is over this
blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(300)]
keep = blocks[::30]
del blocks
for turn in range(2 * QUIET_TURNS):      # something comes and goes each time
    held = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(4 * (turn % 2))]
    heap.turn()
assert heap.trims == 0, "under load pages stay warm"
del held
assert heap.idle_nbytes() > 200 << 20
for _ in range(QUIET_TURNS + 1):
    heap.turn()
assert heap.trims == 1
assert heap.idle_nbytes() < 64 << 20
for _ in range(3 * QUIET_TURNS):
    heap.turn()
assert heap.trims == 1
assert all(int(block[0]) == 1 for block in keep)
"""


def test_memory_that_was_freed_does_not_stay_when_nothing_happens_any_more():
    subprocess.run([sys.executable, "-c", _QUIET], env=environment(), check=True, timeout=120)


def test_memory_freed_after_a_burst_goes_back_and_what_is_in_use_does_not():
    subprocess.run([sys.executable, "-c", _BURST], env=environment(), check=True, timeout=120)


_NO_DESCRIPTORS = """
import resource, sys, torch
from pathlib import Path
from kvstore.config import ColdConfig, StoreConfig
from kvstore.store import Store
from kvstored.host.heap import Heap
heap = Heap(32 << 20)
store = Store.open(StoreConfig(cold=ColdConfig(sys.argv[1])), background=False)
store.put(b"k", {"x": torch.randn(100_000)}, fidelity="exact")
store.drain()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
try:
    open("/dev/null")
except OSError:
    heap.turn()
    assert heap.resident_nbytes() > 10 << 20
    assert store.stats().values["cold_disk_nbytes"] > 300_000
else:
    raise SystemExit("there were descriptors")
"""


def test_a_daemon_without_descriptors_still_tells_its_figures_and_minds_its_memory(tmp_path):
    """The thread that watches failed four times a second, with a traceback each, and `stats` was an internal error."""
    subprocess.run([sys.executable, "-c", _NO_DESCRIPTORS, str(tmp_path)], env=environment(), check=True, timeout=120)
