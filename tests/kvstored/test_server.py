"""A daemon's life: start, lock, health, drain, restart."""

import asyncio
import os
import signal
import socket
import stat
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.store import Store
from kvstored.server import Daemon
from kvstored.settings import ServerSettings
from kvstored_client import Client
from kvstored_client.wire.address import parse_address
from tests.conftest import START_S, free_port, wait_until

MIB = 1 << 20


def random_bytes(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def test_sigterm_drains_and_a_restart_loses_nothing(daemon):
    entries = {b"k%d" % i: random_bytes(100_000 + i, i) for i in range(50)}
    client = daemon.client(framework="numpy")
    for key, x in entries.items():
        client.put(key, {"x": x}, fidelity="exact")
    epoch = client.boot_epoch
    assert daemon.stop() == 0
    assert not daemon.socket_path.exists()
    daemon.start()
    for key, x in entries.items():
        hit = client.get(key)
        assert hit is not None
        assert np.array_equal(hit.tensors["x"], x)
        assert hit.tier == "cold"
    assert client.boot_epoch != epoch
    assert client.restarts == 1


def test_more_signals_during_the_drain_change_nothing(daemon):
    client = daemon.client(framework="numpy")
    entries = {b"k%d" % i: random_bytes(4 * MIB, i) for i in range(30)}
    for key, x in entries.items():
        client.put(key, {"x": x}, fidelity="exact")
    daemon.signal(signal.SIGTERM)
    for _ in range(10):
        time.sleep(0.01)
        if daemon.process.poll() is None:
            daemon.signal(signal.SIGTERM)
            daemon.signal(signal.SIGINT)
            daemon.signal(signal.SIGHUP)
    assert daemon.process.wait(START_S) == 0
    daemon.start()
    for key, x in entries.items():
        assert np.array_equal(client.get(key).tensors["x"], x)


def test_sighup_does_not_end_it(daemon):
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded tokens=0" in daemon.log)
    assert daemon.client().stats().values["uptime_s"] > 0
    assert daemon.stop() == 0


def test_sighup_does_not_end_it_while_it_reads_its_settings(daemon_factory):
    daemon = daemon_factory(start=False)
    text = daemon.config.read_text()
    daemon.config.unlink()
    os.mkfifo(daemon.config)
    daemon.start(wait=False)
    with daemon.config.open("w") as settings:  # opens when the daemon does
        daemon.signal(signal.SIGHUP)
        settings.write(text)
    daemon.wait_until_up()
    assert daemon.stop() == 0


def test_a_second_daemon_on_the_same_data_or_socket_is_refused_and_the_first_goes_on(daemon, daemon_factory):
    daemon.client().put(b"key", {"x": random_bytes(10)})
    same_socket = daemon_factory(start=False)
    same_socket.config.write_text(
        f'[server]\naddress = "{daemon.address}"\ndata_dir = "{same_socket.directory}/data"\n'
    )
    same_data = daemon_factory(start=False)
    same_data.config.write_text(f'[server]\naddress = "{same_data.address}"\ndata_dir = "{daemon.directory}/data"\n')
    for second in (same_socket, same_data):
        second.start(wait=False)
        assert second.process.wait(START_S) != 0
        assert f"another kvstored (process {daemon.pid}) already uses" in second.log
    assert daemon.client().get(b"key") is not None


def test_a_taken_tcp_port_is_refused(daemon_factory):
    first = daemon_factory(tcp=True)
    second = daemon_factory(start=False)
    port = first.address.rpartition(":")[2]
    second.config.write_text(
        f'[server]\naddress = "{second.address},tcp:127.0.0.1:{port}"\n'
        f'data_dir = "{second.directory}/data"\ninsecure_tcp = true\n'
    )
    second.start(wait=False)
    assert second.process.wait(START_S) != 0
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in second.log


def test_a_taken_metrics_port_is_refused(daemon_factory):
    port = free_port()
    daemon_factory(server=f'metrics_address = "127.0.0.1:{port}"')
    second = daemon_factory(server=f'metrics_address = "127.0.0.1:{port}"', start=False)
    second.start(wait=False)
    assert second.process.wait(START_S) == 2
    assert f"cannot serve metrics on 127.0.0.1:{port}: Address already in use; choose another" in second.log


def test_a_socket_left_by_a_killed_daemon_does_not_stop_the_next(daemon):
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.socket_path.exists()
    daemon.start()
    assert daemon.client().put(b"k", {"x": random_bytes(3)})


def test_the_socket_is_for_owner_and_group_only(daemon):
    mode = daemon.socket_path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660


def test_health_is_serving_for_the_whole_and_for_each_service(daemon):
    with grpc.insecure_channel(parse_address(daemon.address)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "kvstored.v1.Cache", "kvstored.v1.Admin"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=120)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        daemon.signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_reflection_is_off(daemon):
    with grpc.insecure_channel(parse_address(daemon.address)) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([b""]), timeout=60))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_service_manager_is_told(daemon_factory, tmp_path, monkeypatch):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(START_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        daemon = daemon_factory()
        assert listener.recv(100).startswith(b"EXTEND_TIMEOUT_USEC=")
        assert listener.recv(100).startswith(b"READY=1\n")
        assert listener.recv(100) == b"WATCHDOG=1"
        daemon.signal(signal.SIGTERM)
        while (said := listener.recv(100)) == b"WATCHDOG=1":
            pass
        assert said.startswith(b"STOPPING=1\n")
        assert daemon.process.wait(START_S) == 0


def test_a_running_put_may_end_while_the_daemon_drains(daemon):
    client = daemon.client(framework="numpy")
    x = random_bytes(200 * MIB)

    done = []
    thread = threading.Thread(target=lambda: done.append(client.put(b"late", {"x": x}, fidelity="exact")))
    thread.start()
    with daemon.client() as other:
        wait_until(lambda: done or other.stats().values["in_flight_nbytes"])
    assert daemon.stop() == 0
    thread.join()
    assert done == [True]
    daemon.start()
    assert np.array_equal(client.get(b"late").tensors["x"], x)


def test_clean_shutdown_leaves_no_thread_hanging_while_clients_are_busy(daemon):

    stop = threading.Event()
    client = daemon.client(on_error="miss", framework="numpy")
    x = random_bytes(MIB)

    def busy(n):
        while not stop.is_set():
            client.put(b"%d" % n, {"x": x})
            client.get(b"%d" % n)

    threads = [threading.Thread(target=busy, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    with daemon.client() as other:
        wait_until(lambda: other.stats().values["gets"] > 20)
    assert daemon.stop() == 0
    stop.set()
    for thread in threads:
        thread.join(START_S)
        assert not thread.is_alive()


def test_a_daemon_that_made_its_shared_memory_closes_it(tmp_path):
    """Each of a process that starts several left 68 MiB behind, and a descriptor."""
    address = f"unix:{tmp_path}/k.sock"

    def put():
        with Client(address, on_error="raise") as client:
            client.put(b"k", {"x": random_bytes(MIB)})
            assert client.get(b"k") is not None

    async def life(store):
        daemon = Daemon(store, ServerSettings(address=address, data_dir=str(tmp_path)))
        await daemon.start()
        await asyncio.to_thread(put)
        segments = daemon._arena._segments.copy()
        await daemon.stop()
        return segments

    with Store.open() as store:
        segments = asyncio.run(life(store))
    assert segments
    assert all(segment.closed for segment in segments)
