"""A daemon whose hot tier is in a device's memory: both doors serve it, by shared memory and off the event loop."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from kvstore.config import MIB, HotConfig, StoreConfig, WarmConfig
from kvstore.device.deferred import Deferred
from kvstore.residency.device_hot import WORK_NBYTES
from kvstore.store import Store
from kvstored.cli import doctor
from kvstored.host.pressure import PressureValve
from kvstored.host.shared_memory import STAGING_NBYTES, arena_limit_nbytes
from kvstored.settings import ServerSettings, Settings
from kvstored.telemetry.metrics import StoreCollector
from tests.conftest import environment
from tests.kvstored.inside import daemon_inside

GIB = 1 << 30


def bytes_of(seed, nbytes=MIB):
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.fixture
def driver():
    return Deferred(memory_nbytes=4 * GIB)


@pytest.fixture
def daemon(driver):
    outside = {"driver": driver}
    with daemon_inside(tcp=True, segment_nbytes=8 * MIB, outside=outside, in_flight_nbytes=32 * MIB) as found:
        yield found


def clients(daemon):
    """One of the lease socket, one of the stream."""
    from kvstored_client import Client

    over_tcp = Client(f"tcp:127.0.0.1:{daemon.port}", on_error="raise", framework="numpy", timeout_s=60)
    daemon.clients.append(over_tcp)
    return daemon.client(), over_tcp


def test_both_doors_serve_it_and_no_copy_runs_on_the_event_loop(daemon, driver):
    """Bugs 10 and 11: the lease socket was shut, and each get was a copy on the event loop."""
    loop = daemon.on_loop(threading.current_thread)
    copied_by = []
    driver.before_copy = lambda: copied_by.append(threading.current_thread())
    values = {b"%d" % n: bytes_of(n) for n in range(6)}
    for client in clients(daemon):
        for key, x in values.items():
            assert client.put(key, {"x": x}, fidelity="exact")
        hits = client.get_many(list(values))
        assert all((hit.tensors["x"] == x).all() for hit, x in zip(hits, values.values(), strict=True))
        assert {hit.tier for hit in hits} == {"hot"}
        assert (client.get(b"3").tensors["x"] == values[b"3"]).all()
    assert daemon.daemon._shared.gauges()["lease_connections"] == 1
    assert len(copied_by) == 2 * 13
    assert loop not in copied_by


def test_an_answer_out_of_a_device_lies_in_memory_that_is_registered_with_it(daemon, driver):
    client, over_tcp = clients(daemon)
    client.put(b"k", {"x": bytes_of(1)})
    seen = []
    plain = driver.copy

    def copy(to, of, nbytes, stream, *, store):
        seen.append([any(at <= x < at + n for at, n in driver.registered.items()) for x in (*to, *of)])
        plain(to, of, nbytes, stream, store=store)

    with client.lease(b"k"):  # makes the memory that answers lie in, and has it registered in the background
        pass
    assert over_tcp.get(b"k") is not None
    daemon.arena._ahead.submit(int).result()  # what was to be registered is
    driver.copy = copy
    with client.lease(b"k") as hit:
        assert (hit.tensors["x"] == bytes_of(1)).all()
    assert over_tcp.get(b"k") is not None
    assert client.put(b"l", {"x": bytes_of(2), "none": np.empty(0, np.int64)})
    assert seen == [[True, False], [True, False], [False, True]]
    assert client.get(b"l").tensors["none"].shape == (0,)
    assert driver.bounds == {0: WORK_NBYTES}


def test_a_put_is_copied_from_the_clients_memory_to_the_device_and_nowhere_else(daemon, driver):
    client = daemon.client()
    x = np.random.default_rng(1).standard_normal((4, 64, 2, 64), dtype=np.float32)
    used_nbytes = daemon.arena.gauges()["arena_used_nbytes"]
    assert client.put(b"k", {"x": x, "y": bytes_of(1, 3)})
    assert client.put_many([(b"l", {"x": -x, "y": bytes_of(2, 5)}), (b"m", {"x": x + 1, "y": bytes_of(3, 7)})]) == 2
    assert daemon.arena.gauges()["arena_used_nbytes"] == used_nbytes
    for key, wanted, seed, n in ((b"k", x, 1, 3), (b"l", -x, 2, 5), (b"m", x + 1, 3, 7)):
        hit = client.get(key)
        assert (hit.tensors["x"] == wanted).all() and (hit.tensors["y"] == bytes_of(seed, n)).all()


def test_all_that_was_registered_is_unregistered_at_the_end(driver):
    with daemon_inside(segment_nbytes=MIB, outside={"driver": driver}) as daemon:
        client = daemon.client()
        for n in range(3):
            client.put(b"%d" % n, {"x": bytes_of(n, 2 * MIB)})
        daemon.arena._ahead.submit(int).result()
        assert driver.registered
    assert driver.registered == {}
    assert driver.early == 0


def test_a_segment_that_is_closed_before_it_could_be_registered_never_is(driver):
    from kvstore.shm.arena import Segment

    segment = Segment(1, 0, MIB)
    segment.close_empty()
    segment.register(lambda *_: pytest.fail("it is unmapped"))


def test_a_get_of_more_than_the_bytes_in_flight_comes_in_lots(daemon):
    client, over_tcp = clients(daemon)
    values = {b"%d" % n: bytes_of(n) for n in range(48)}
    for key, x in values.items():
        client.put(key, {"x": x}, fidelity="exact")
    for each in (client, over_tcp):
        hits = each.get_many(list(values))
        assert all((hit.tensors["x"] == x).all() for hit, x in zip(hits, values.values(), strict=True))
    assert daemon.daemon.watch.budget.used_nbytes == 0


def test_an_entry_larger_than_the_shared_memory_comes_over_the_stream(driver):
    with daemon_inside(segment_nbytes=MIB, outside={"driver": driver}) as daemon:
        daemon.arena.limit_nbytes = 4 * MIB
        client = daemon.client()
        x = bytes_of(1, 6 * MIB)
        assert client.put(b"k", {"x": x})
        assert (client.get(b"k").tensors["x"] == x).all()


def test_what_a_client_leased_stays_as_it_is_when_the_entry_leaves(daemon):
    client = daemon.client()
    client.put(b"k", {"x": bytes_of(1)})
    with client.lease(b"k") as hit:
        client.delete(b"k")
        for n in range(8):
            client.put(b"%d" % n, {"x": bytes_of(n + 10)})
            client.get(b"%d" % n)
        assert (hit.tensors["x"] == bytes_of(1)).all()


def test_what_is_encoded_below_is_sent_and_promoted_to_the_device(daemon, driver):
    """Bug 6: a promotion decoded into host memory, or failed each time."""
    client = daemon.client(framework="torch")
    x = np.random.default_rng(1).standard_normal((2, 64, 2, 64), dtype=np.float32)
    client.put(b"k", {"x": x})
    client.demote(b"k")
    below = client.get(b"k")
    assert below.tier == "warm" and below.lossy
    assert client.promote(b"k") == 1
    above = client.get(b"k")
    assert above.tier == "hot" and above.lossy
    assert (np.asarray(above.tensors["x"]) == np.asarray(below.tensors["x"])).all()
    stats = daemon.store.stats().values
    assert stats["maintainer_errors"] == 0
    assert stats["device_used_nbytes"] >= x.nbytes


def test_its_shared_memory_is_what_is_on_its_way_not_the_whole_tier():
    def limit(device, nbytes):
        return arena_limit_nbytes(StoreConfig(hot=HotConfig(nbytes, device=device)))

    assert limit("cuda:0", 40 * GIB) == STAGING_NBYTES
    assert limit("cuda:0", 64 * MIB) == 128 * MIB
    assert limit("cpu", 40 * GIB) == 45 * GIB


def test_memory_pressure_takes_from_warm_and_moves_nothing_off_the_device(driver):
    """Bug 14: entries of the GPU came into the memory that was short."""

    class Stalled:
        stall = 25.0

        def stall_percent(self):
            return self.stall

        def limit_ratio(self):
            return 0.0

    config = StoreConfig(hot=HotConfig(8 * MIB, device="cuda:0"), warm=WarmConfig(8 * MIB))
    now = [0.0]
    with Store.open(config, background=False, driver=driver) as store:
        for n in range(7):
            store.put(b"%d" % n, {"x": np.random.default_rng(n).standard_normal(MIB // 4, dtype=np.float32)})
        sensor = Stalled()
        valve = PressureValve(store, 10.0, sensor, lambda: now[0])
        valve.turn()
        assert store.hot_capacity_nbytes == 8 * MIB
        assert store.warm_capacity_nbytes == 6 * MIB
        assert {place.tier for place in store.locate([b"%d" % n for n in range(7)])} == {"hot"}
        sensor.stall = 0.0
        for _ in range(10):
            now[0] += 100.0
            valve.turn()
        assert store.warm_capacity_nbytes == 8 * MIB


def test_a_smaller_warm_tier_lets_go_of_what_no_longer_fits(driver):
    config = StoreConfig(hot=HotConfig(8 * MIB, device="cuda:0"), warm=WarmConfig(8 * MIB))
    with Store.open(config, background=False, driver=driver) as store:
        for n in range(7):
            store.put(b"%d" % n, {"x": np.random.default_rng(n).standard_normal(MIB // 4, dtype=np.float32)})
            store.demote(b"%d" % n)
        held = store.stats().tiers["warm"].used_nbytes
        assert store.set_warm_capacity(held // 2) >= 3
        assert store.stats().tiers["warm"].used_nbytes <= held // 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_the_device_it_does_not_start_and_says_why(tmp_path):
    """Bug 9: it said READY, and every put failed."""
    config = tmp_path / "kvstored.toml"
    config.write_text(
        f'[server]\naddress = "unix:{tmp_path}/k.sock"\ndata_dir = "{tmp_path}/data"\n'
        '[store.hot]\ndevice = "cuda:0"\ncapacity_nbytes = "64MiB"\n'
    )
    command = [sys.executable, "-m", "kvstored", "serve", "--config", str(config)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert 'hot.device = "cuda:0" cannot be used' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("device", "count", "installed", "compiler", "wanted"),
    [
        ("cpu", 0, (), "", [("good", "0 GPUs")]),
        ("cuda:0", 0, (), "", [("bad", "torch sees no GPU")]),
        ("cuda:1", 1, ("cuda.bindings",), "cc", [("bad", "torch sees 1 GPU")]),
        ("cuda:0", 1, (), "cc", [("bad", "without cuda-bindings")]),
        ("cuda:0", 1, ("cuda.bindings",), "", [("good", "1 GPUs"), ("note", "need Triton and a C compiler")]),
        ("cuda", 1, ("cuda.bindings", "triton"), "cc", [("good", "1 GPUs"), ("good", "Triton and a C compiler")]),
    ],
)
def test_doctor_says_what_a_hot_tier_on_a_gpu_lacks(device, count, installed, compiler, wanted, monkeypatch):
    """Bug 8: nobody said that the codecs need a compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(doctor, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: compiler or None)
    settings = Settings(ServerSettings(), StoreConfig(hot=HotConfig(MIB, device=device)))
    found = list(doctor._gpu(settings))
    assert [finding.verdict for finding in found] == [state for state, _ in wanted]
    for finding, (_, text) in zip(found, wanted, strict=True):
        assert text in finding.what


def test_what_the_device_holds_is_in_the_metrics(daemon):
    daemon.client().put(b"k", {"x": bytes_of(1)})
    found = {metric.name: metric for metric in StoreCollector(daemon.daemon.watch.snapshot).collect()}
    value = {name: metric.samples[0].value for name, metric in found.items() if name.startswith("kvstored_device_")}
    assert value.pop("kvstored_device_failures") == 0
    assert MIB <= value.pop("kvstored_device_used_bytes") < 2 * MIB <= value.pop("kvstored_device_bytes")
    assert value == {}
    assert found["kvstored_other"].samples == []
