"""A daemon's memory on a GPU, mapped by a client on the same GPU: one copy within it, and none on the host.

Without a GPU. What stands for its memory is a memfd (`device.deferred`), which a second process really maps, by
descriptors that really travel.
"""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.device import DriverError
from kvstore.device.deferred import Deferred
from kvstored.access.tokens import digest, make_token
from kvstored_client import Client, aio
from tests.conftest import environment, wait_until
from tests.kvstored.inside import daemon_inside

from .tensors import COPIES, on_gpu

MIB = 1 << 20
GIB = 1 << 30
MODEL = {
    "model": "m", "revision": "r1", "dtype": "float32", "layers": 3, "kv_heads": 2, "head_dim": 8, "layout": "lthd",
    "fidelity": "exact",
}  # fmt: skip


@contextmanager
def hot_on_device(driver=None, **server):
    with daemon_inside(
        segment_nbytes=8 * MIB, outside={"driver": driver or Deferred(memory_nbytes=4 * GIB)}, **server
    ) as found:
        yield found


@pytest.fixture(scope="module")
def daemon():
    with hot_on_device() as found:
        yield found


@pytest.fixture
def driver():
    COPIES.clear()
    return Deferred()


@pytest.fixture
def client(daemon, driver):
    with daemon.client(framework="torch", driver=driver) as found:
        yield found


def staged(daemon):
    return daemon.arena.gauges()["arena_used_nbytes"]


def arena_of(daemon):
    return daemon.store._device_hot.arena


def within(driver, addresses, nbytes):
    return all(
        any(memory.address <= at and at + n <= memory.address + memory.nbytes for memory in driver.mapped)
        for at, n in zip(addresses, nbytes, strict=True)
    )


def descriptors_of_devices():
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            found += "kvstored-deferred" in str(link.readlink())
    return found


def test_a_get_is_one_copy_within_the_gpu_and_none_on_the_host(client, daemon, driver):
    tensors = {"k": torch.randn(3, 40, 8), "v": torch.randn(3, 40, 8), "none": torch.empty(0)}
    client.put(b"there", tensors)
    daemons, before = daemon.store._device_hot.driver.batches, staged(daemon)
    read = []
    plain = driver.copy

    def copy(to, of, nbytes, stream, *, store):
        read.append(within(driver, of, nbytes))
        plain(to, of, nbytes, stream, store=store)

    driver.copy = copy
    out = {name: on_gpu(torch.zeros_like(x)) for name, x in tensors.items()}
    hit = client.get(b"there", out=out)
    assert (hit.tier, hit.lossy, hit.encoding) == ("hot", False, "raw")
    assert all(hit.tensors[name] is out[name] and torch.equal(out[name].numbers, x) for name, x in tensors.items())
    assert (read, driver.batches, driver.runs, driver.pending) == ([True], 1, 2, 0)
    assert dict(COPIES) == {}
    assert (daemon.store._device_hot.driver.batches, staged(daemon)) == (daemons, before)
    assert driver.registered == {}
    assert client.failures == 0


def test_what_comes_again_is_read_where_it_was_mapped_and_nothing_is_mapped_twice(client, driver):
    x = torch.randn(3, 40, 8)
    client.put(b"again", {"x": x})
    for _ in range(3):
        out = on_gpu(torch.zeros(3, 100, 8))
        assert client.get(b"again", out={"x": out[:, 20:60]}) is not None
        assert torch.equal(out.numbers[:, 20:60], x)
        assert not out.numbers[:, :20].any()
    assert len(driver.mapped) == 1


@pytest.mark.parametrize("tail", [0, 5])
def test_a_prefix_is_one_copy_within_the_gpu_also_where_its_end_is_missing_or_below(client, daemon, driver, tail):
    ns = client.namespace(**{**MODEL, "revision": str(tail)}, chunk_tokens=16)
    k, v = torch.randn(3, 69, 2, 8), torch.randn(3, 69, 2, 8)
    assert ns.put_prefix(range(64 + tail), k[:, : 64 + tail], v[:, : 64 + tail]) == 4 + bool(tail)
    before = staged(daemon)
    for get in (ns.get_prefix, lambda tokens, out: ns.fill_prefix(tokens, *out)):
        out = on_gpu(torch.zeros(3, 120, 2, 8)), on_gpu(torch.zeros(3, 120, 2, 8))
        got = get(range(120), out=out)
        assert (got[0] if isinstance(got, tuple) else got) == 64 + tail
        assert torch.equal(out[0].numbers[:, : 64 + tail], k[:, : 64 + tail])
        assert torch.equal(out[1].numbers[:, : 64 + tail], v[:, : 64 + tail])
    assert dict(COPIES) == {}
    assert staged(daemon) == before
    assert client.demote(ns.keys(range(64))[3]) >= 1  # with what continues it
    out = on_gpu(torch.zeros(3, 64, 2, 8)), on_gpu(torch.zeros(3, 64, 2, 8))
    assert ns.get_prefix(range(64), out=out)[0] == 64
    assert torch.equal(out[0].numbers, k[:, :64])
    assert client.failures == 0


def test_an_asyncio_client_does_the_same(client, daemon, driver):
    async def run():
        async with aio.Client(f"unix:{daemon.socket_path}", on_error="raise", driver=driver) as cache:
            x = torch.randn(3, 40, 8)
            assert await cache.put(b"aio", {"x": x})
            before = staged(daemon)
            out = {"x": on_gpu(torch.zeros(3, 40, 8))}
            assert await cache.get(b"aio", out=out) is not None
            assert torch.equal(out["x"].numbers, x)
            ns = cache.namespace(**{**MODEL, "revision": "aio"}, chunk_tokens=16)
            k = torch.randn(3, 48, 2, 8)
            assert await ns.put_prefix(range(48), k, k) == 3
            into = on_gpu(torch.zeros(3, 48, 2, 8)), on_gpu(torch.zeros(3, 48, 2, 8))
            assert (await ns.get_prefix(range(48), out=into))[0] == 48
            assert torch.equal(into[0].numbers, k)
            assert torch.equal(into[1].numbers, k)
            assert staged(daemon) == before

    asyncio.run(run())
    assert len(driver.mapped) == 0  # the client is gone, and its mappings with it
    assert dict(COPIES) == {}


def test_leased_tensors_lie_in_the_gpu_s_memory_and_end_with_the_lease(client, daemon, driver):
    x = torch.randn(3, 40, 8)
    client.put_many([(b"a", {"x": x}), (b"b", {"x": -x, "none": torch.empty(0, 4)})])
    how = client.how_to_lease([{"x": on_gpu(torch.zeros(1))}])
    with client.lease_many([b"a", b"missing", b"b"], **how) as hits:
        assert hits[1] is None
        a = hits[0].tensors["x"]
        assert within(driver, [a.data_ptr()], [a.nbytes])
        assert torch.equal(a, x) and torch.equal(hits[2].tensors["x"], -x)
        assert hits[2].tensors["none"].shape == (0, 4)
        client.delete(b"a", b"b")
        for n in range(8):  # would lie where they lay
            client.put(b"%d" % n, {"x": torch.randn(3, 40, 8)})
        assert torch.equal(a, x)
    assert a.numel() == 0
    del a, hits
    wait_until(lambda: client.stats().values["leases"] == 0)


def test_the_lease_is_given_back_after_the_copy_and_not_before(client, daemon, driver):
    """And an entry that is evicted meanwhile is copied whole: its room is not used while it is leased."""
    x = torch.randn(3, 40, 8)
    client.put(b"evicted", {"x": x})
    leased = []

    def evict():
        leased.append(daemon.daemon._shared.gauges()["leased_entries"])
        daemon.store.delete(b"evicted")
        for n in range(8):
            daemon.store.put(b"other %d" % n, {"x": torch.zeros(3, 40, 8)})

    driver.before_copy = evict
    out = {"x": on_gpu(torch.zeros(3, 40, 8))}
    assert client.get(b"evicted", out=out) is not None
    assert torch.equal(out["x"].numbers, x)
    assert leased == [1]
    driver.before_copy = lambda: None
    assert client.get(b"evicted", out=out) is None
    wait_until(lambda: client.stats().values["leases"] == 0)


@pytest.mark.parametrize("kind", ["get", "get_prefix", "fill_prefix"])
def test_a_block_that_is_used_again_during_the_copy_is_a_miss(client, daemon, driver, kind):
    """The lease ended by age, and what was copied is another entry's."""
    ns = client.namespace(**{**MODEL, "revision": kind}, chunk_tokens=16)
    k = torch.randn(3, 16, 2, 8)
    ns.put_prefix(range(16), k, k)
    (key,) = ns.keys(range(16))
    used = arena_of(daemon).gauges()["device_used_nbytes"]

    def use_again():
        driver.before_copy = lambda: None
        for connection in list(daemon.daemon._shared.connections):
            connection.expire(float("inf"))
        daemon.store.delete(key)
        daemon.store.put(b"thief", {"k": torch.full_like(k, 9.0), "v": torch.full_like(k, 9.0)})
        assert arena_of(daemon).gauges()["device_used_nbytes"] == used

    driver.before_copy = use_again
    out = {"k": on_gpu(torch.zeros_like(k)), "v": on_gpu(torch.zeros_like(k))}
    if kind == "get":
        assert client.get(key, out=out) is None
        assert client.failures == 1
    elif kind == "get_prefix":
        assert ns.get_prefix(range(16), out=tuple(out.values())) == (0, None, None)
    else:
        assert ns.fill_prefix(range(16), *out.values()) == 0
    assert any(x.numbers.eq(9.0).any() for x in out.values()), "nothing was used again: this test shows nothing"
    daemon.store.delete(b"thief")


def test_a_client_on_another_gpu_is_answered_through_ram(daemon):
    other = Deferred(host="another")
    x = torch.randn(3, 40, 8)
    with daemon.client(framework="torch", driver=other) as client:
        client.put(b"elsewhere", {"x": x})
        before = daemon.store._device_hot.driver.batches
        out = {"x": on_gpu(torch.zeros(3, 40, 8))}
        assert client.get(b"elsewhere", out=out) is not None
        assert torch.equal(out["x"].numbers, x)
        assert client.failures == 0
        handed = {segment for connection in daemon.daemon._shared.connections for segment in connection._handed}
        assert handed and not any(segment.device for segment in handed)
    assert other.mapped == set()
    assert daemon.store._device_hot.driver.batches == before + 1


def test_tensors_of_two_gpus_or_of_the_host_too_are_answered_through_ram(client, driver):
    x = torch.randn(3, 40)
    client.put(b"both", {"x": x, "y": -x})
    far = on_gpu(torch.zeros(3, 40))
    far.index = 1
    for y in (torch.zeros(3, 40), far):
        out = {"x": on_gpu(torch.zeros(3, 40)), "y": y}
        assert client.get(b"both", out=out) is not None
        assert torch.equal(out["x"].numbers, x)
        assert torch.equal(getattr(y, "numbers", y), -x)
    assert driver.mapped == set()


def test_a_device_that_exports_nothing_is_answered_through_ram(driver):
    daemons = Deferred(memory_nbytes=4 * GIB)
    daemons.exports = False
    x = torch.randn(3, 40, 8)
    with hot_on_device(daemons) as daemon, daemon.client(framework="torch", driver=driver) as client:
        client.put(b"k", {"x": x})
        out = {"x": on_gpu(torch.zeros(3, 40, 8))}
        assert client.get(b"k", out=out) is not None
        assert torch.equal(out["x"].numbers, x)
        assert client.failures == 0
        assert driver.mapped == set()


def test_a_descriptor_that_cannot_be_mapped_costs_one_call_the_stream_and_no_data(daemon, driver, caplog):
    driver.maps = False
    x = torch.randn(3, 40, 8)
    with daemon.client(framework="torch", driver=driver) as client:
        client.put(b"refused", {"x": x})
        memory = descriptors_of_devices()
        for _ in range(3):
            out = {"x": on_gpu(torch.zeros(3, 40, 8))}
            assert client.get(b"refused", out=out) is not None
            assert torch.equal(out["x"].numbers, x)
        assert client.failures == 0
        assert client.how_to_lease([{"x": on_gpu(torch.zeros(1))}]) == {}
        assert descriptors_of_devices() == memory
    assert caplog.text.count("is not mapped") == 1


def test_a_copy_that_the_gpu_refuses_is_answered_over_the_stream(client, daemon, driver):
    x = torch.randn(3, 40, 8)
    client.put(b"broken", {"x": x})
    plain = driver.copy

    def copy(to, of, nbytes, stream, *, store):
        if within(driver, of, nbytes):
            raise DriverError("an illegal address, as it was asked to")
        plain(to, of, nbytes, stream, store=store)

    driver.copy = copy
    ns = client.namespace(**{**MODEL, "revision": "broken"}, chunk_tokens=16)
    k = torch.randn(3, 16, 2, 8)
    ns.put_prefix(range(16), k, k)
    into = on_gpu(torch.zeros_like(k)), on_gpu(torch.zeros_like(k))
    assert ns.get_prefix(range(16), out=into)[0] == 16  # by torch, out of the memory that is mapped
    assert torch.equal(into[0].numbers, k)
    out = {"x": on_gpu(torch.zeros(3, 40, 8))}
    assert client.get(b"broken", out=out) is not None
    assert torch.equal(out["x"].numbers, x)
    wait_until(lambda: client.stats().values["leases"] == 0)


def test_a_segment_that_the_daemon_gives_back_is_let_go_of(driver):
    with hot_on_device() as daemon, daemon.client(framework="torch", driver=driver) as client:
        out = {"x": on_gpu(torch.zeros(3, 40, 8))}
        client.put(b"k", {"x": torch.randn(3, 40, 8)})
        assert client.get(b"k", out=out) is not None
        assert len(driver.mapped) == 1
        client.delete(b"k")
        arena_of(daemon).limit_nbytes = 0
        assert arena_of(daemon).gauges()["device_nbytes"] == 0
        assert client.get(b"k", out=out) is None
        assert len(driver.mapped) == 0
        assert driver.early == 0


def test_all_segments_are_handed_over_however_many_there_are(driver):
    """Two descriptors each: a packet brings 32 of them."""
    with hot_on_device() as daemon:
        arena_of(daemon)._segment_nbytes = 1 << 14
        values = {b"%d" % n: torch.full((1 << 12,), float(n)) for n in range(80)}
        with daemon.client(framework="torch", driver=driver) as client:
            for key, x in values.items():
                client.put(key, {"x": x}, fidelity="exact")
            assert len(arena_of(daemon)._segments) == 80
            how = client.how_to_lease([{"x": on_gpu(torch.zeros(1))}])
            for wanted in ([*values], [*values, b"missing"]):
                with client.lease_many(wanted, **how) as hits:
                    pairs = [(on_gpu(torch.zeros(1 << 12)), hit.tensors["x"]) for hit in hits if hit is not None]
                    client.fill(pairs)
                    assert all(torch.equal(x.numbers, y) for (x, _), y in zip(pairs, values.values(), strict=True))
                    del hits, pairs
            assert len(driver.mapped) == 80
            assert client.failures == 0


def test_a_chain_longer_than_the_bytes_in_flight_is_read_in_place(driver):
    with hot_on_device(in_flight_nbytes=32 * MIB) as daemon:
        with daemon.client(framework="torch", driver=driver) as client:
            keys = [b"%d" % n for n in range(48)]
            for n, key in enumerate(keys):
                client.put(key, {"x": torch.full((MIB // 4,), float(n))}, fidelity="exact")
            how = client.how_to_lease([{"x": on_gpu(torch.zeros(1))}])
            for wanted in (keys, [*keys, b"missing"]):
                with client.lease_many(wanted, leading=True, **how) as hits:
                    assert len(hits) == 48
                    assert [float(hit.tensors["x"][-1]) for hit in hits] == [float(n) for n in range(48)]
                    del hits
        assert daemon.daemon.watch.budget.used_nbytes == 0


TOKEN = make_token()
TENANTS = f"""
[[token]]
name = "worker"
sha256 = "{digest(TOKEN)}"
rights = ["read", "write"]
tenant = "a"
uid = {os.geteuid()}
"""


def test_a_tenant_is_handed_no_segment_but_its_own(driver, tmp_path, monkeypatch):
    """Whoever maps a segment reads all of it: what others streamed lies in the daemon's own."""
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("KVSTORED_TOKEN_FILE", str(tmp_path / "token"))
    with hot_on_device(tokens=TENANTS, token_on_unix=True) as daemon:
        daemon.store.put(b"nobody's", {"x": torch.full((3, 40, 8), 9.0)})
        with daemon.client(framework="torch", driver=driver) as client:
            x = torch.randn(3, 40, 8)
            client.put(b"k", {"x": x})
            out = {"x": on_gpu(torch.zeros(3, 40, 8))}
            assert client.get(b"k", out=out) is not None
            assert torch.equal(out["x"].numbers, x)
            assert len(driver.mapped) == 1
            owners = {segment.owner for segment in arena_of(daemon)._segments}
            assert len(owners) == 2 and os.geteuid() in owners
            assert not any(torch.equal(client_view(memory), client_view(memory) * 0 + 9) for memory in driver.mapped)
            with daemon.client(framework="torch", driver=Deferred(), shared_memory=False) as far:
                far.put(b"streamed", {"x": -x})
            assert client.get(b"streamed", out=out) is not None  # through RAM: it lies in the daemon's segment
            assert torch.equal(out["x"].numbers, -x)
            assert len(driver.mapped) == 1


def test_who_may_not_put_is_handed_no_memory_of_the_gpu(driver):
    """CUDA has no seal: what is mapped for reading here another program could map for writing."""
    reader = TENANTS.replace('rights = ["read", "write"]', 'rights = ["read"]').replace('tenant = "a"', "")
    with hot_on_device(tokens=reader) as daemon, daemon.client(framework="torch", driver=driver) as client:
        x = torch.randn(3, 40, 8)
        daemon.store.put(b"k", {"x": x})
        out = {"x": on_gpu(torch.zeros(3, 40, 8))}
        assert client.get(b"k", out=out) is not None
        assert torch.equal(out["x"].numbers, x)
        handed = {segment for connection in daemon.daemon._shared.connections for segment in connection._handed}
        assert handed and not any(segment.device for segment in handed)


def client_view(memory):
    return torch.from_numpy(memory._bytes[: 64 + 3 * 40 * 8 * 4][64:].view(np.float32).copy())


SERVING = """
import sys, threading
from kvstore.device.deferred import Deferred
from tests.kvstored.inside import daemon_inside
with daemon_inside(segment_nbytes=8 << 20, outside={"driver": Deferred(memory_nbytes=4 << 30)}) as daemon:
    print(daemon.socket_path, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process():
    """A daemon in a process of its own, whose hot tier is on a device."""
    command = [sys.executable, "-c", SERVING]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_another_process_s_memory_is_mapped_for_reading_and_outlives_it(driver):
    with another_process() as (process, path):
        with Client(f"unix:{path}", framework="torch", driver=driver, timeout_s=60) as client:
            x = torch.randn(3, 40, 8)
            assert client.put(b"k", {"x": x})
            out = {"x": on_gpu(torch.zeros(3, 40, 8))}
            assert client.get(b"k", out=out) is not None
            assert torch.equal(out["x"].numbers, x)
            (memory,) = driver.mapped
            maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
            lines = [line for line in maps if line.startswith(f"{memory.address:x}-")]
            assert [line.split()[1] for line in lines] == ["r--s"]
            how = client.how_to_lease([{"x": on_gpu(torch.zeros(1))}])
            with client.lease_many([b"k"], **how) as hits:
                leased = hits[0].tensors["x"]
                process.send_signal(signal.SIGKILL)
                process.wait()
                assert torch.equal(leased, x)
                del leased, hits
            assert client.get(b"k", out=out) is None
            assert client.failures == 1
    assert len(driver.mapped) <= 1


def test_a_daemon_that_dies_while_its_memory_is_copied_gives_its_bytes_or_a_miss(driver):
    with another_process() as (process, path):
        with Client(f"unix:{path}", framework="torch", driver=driver, timeout_s=60) as client:
            x = torch.randn(3, 40, 8)
            assert client.put(b"k", {"x": x})

            def kill():
                process.kill()
                process.wait()

            driver.before_copy = kill
            out = {"x": on_gpu(torch.zeros(3, 40, 8))}
            hit = client.get(b"k", out=out)
            assert hit is None or torch.equal(out["x"].numbers, x)
            driver.before_copy = lambda: None
            assert client.get(b"k", out=out) is None


def test_after_a_restart_the_new_daemon_s_memory_is_mapped_and_the_old_one_s_let_go_of(tmp_path, driver):
    x = torch.randn(3, 40, 8)
    link = tmp_path / "k.sock"
    lease = tmp_path / "k.sock.lease"
    with Client(f"unix:{link}", framework="torch", driver=driver, timeout_s=60) as client:
        out = {"x": on_gpu(torch.zeros(3, 40, 8))}
        for life in range(2):
            with another_process() as (_, path):
                link.symlink_to(path)
                lease.symlink_to(path + ".lease")
                wait_until(client.ping)
                assert client.put(b"k", {"x": x + life})
                wait_until(lambda: client.get(b"k", out=out) is not None and bool(driver.mapped))
                assert torch.equal(out["x"].numbers, x + life)
            link.unlink()
            lease.unlink()
        assert len(driver.mapped) == 1
        assert driver.early == 0
