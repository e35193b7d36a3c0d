"""A daemon in trouble is a miss, soon; it is noticed, counted, said once, and found again."""

import logging
import os
import signal
import socket
import threading
import time

import numpy as np
import pytest

from kvstore.errors import EntryTooLarge, InvalidEntry, OverQuota, TierUnavailable
from kvstored_client import Client
from tests.conftest import wait_until

X = {"x": np.arange(1000, dtype=np.float32)}
WITHIN_S = 15.0
"""A call with a deadline of half a second, on a machine that is busy with other things. Without one it would hang."""


def every_verb(client):
    return [
        client.get(b"k"),
        client.put(b"k", X),
        client.put_many([(b"a", X), (b"b", X)]),
        client.get_many([b"a", b"b"]),
        client.get_many([b"a"], leading=True),
        client.match([b"a"]),
        client.locate([b"a", b"b"]),
        client.touch([b"a"]),
        client.delete(b"a"),
        client.pin(b"a"),
        client.unpin(b"a"),
    ]


MISSES = [None, False, 0, [None, None], [], 0, [None, None], 0, 0, 0, 0]


def test_an_absent_daemon_is_a_miss_at_once(tmp_path):
    with Client(f"unix:{tmp_path}/none.sock", timeout_s=120) as client:
        started = time.monotonic()
        assert every_verb(client) == MISSES
        assert time.monotonic() - started < 60, "no verb waited for its deadline"
        assert client.failures == len(MISSES)


def test_an_absent_daemon_raises_for_those_who_asked_and_for_operators(tmp_path):
    with Client(f"unix:{tmp_path}/none.sock", on_error="raise") as client, pytest.raises(TierUnavailable):
        client.get(b"k")
    with Client(f"unix:{tmp_path}/none.sock") as client:
        for ask in (
            client.stats,
            lambda: client.inspect(b"k"),
            lambda: list(client.entries()),
            lambda: client.evict(b"k"),
        ):
            with pytest.raises(TierUnavailable, match=r"none\.sock"):
                ask()


def test_a_daemon_that_accepts_and_says_nothing_is_a_miss_within_the_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        with Client(f"unix:{tmp_path}/mute.sock", timeout_s=0.5) as client:
            for ask, miss in ((lambda: client.get(b"k"), None), (lambda: client.put(b"k", X), False)):
                started = time.monotonic()
                assert ask() == miss
                assert time.monotonic() - started < WITHIN_S


def test_a_stopped_daemon_is_a_miss_within_the_deadline_and_is_found_again(daemon):
    assert daemon.client(framework="numpy").put(b"k", X)
    client = daemon.client(on_error="miss", timeout_s=0.5, framework="numpy")
    wait_until(lambda: client.get(b"k") is not None)  # half a second may be too short on a busy machine
    daemon.signal(signal.SIGSTOP)
    for _ in range(3):
        started = time.monotonic()
        assert client.get(b"k") is None
        assert time.monotonic() - started < WITHIN_S
    started = time.monotonic()
    for _ in range(100):
        client.get(b"k")
    assert time.monotonic() - started < 25, "an open breaker costs no waiting, its probes aside: not 100 deadlines"
    daemon.signal(signal.SIGCONT)
    wait_until(lambda: client.get(b"k") is not None)


def test_the_log_has_one_line_for_each_change_of_state(daemon, caplog):
    caplog.set_level(logging.INFO, logger="kvstored_client")
    client = daemon.client(on_error="miss", timeout_s=30)
    client.put(b"k", X)
    daemon.stop()
    for _ in range(50):
        client.get(b"k")
    daemon.start()
    wait_until(lambda: client.match([b"k"]))
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ["cache down, answering misses until it is back", "cache up"]
    assert client.restarts == 1


def test_the_callers_own_mistakes_always_raise(shared_daemon):
    client = shared_daemon.client(on_error="miss")
    for wrong in (
        lambda: client.put(b"", X),
        lambda: client.put(b"k", {}),
        lambda: client.put(b"k", {"x": "text"}),
        lambda: client.put(b"k", X, ttl_s=-1),
        lambda: client.put(b"k", X, fidelity="best"),
        lambda: client.get("text"),
        lambda: client.get_many(b"one key"),
        lambda: client.match([b"k"] * 5000),
        lambda: client.namespace(model="m"),
        lambda: client.put(b"k", X, ttl_s=1e12),
    ):
        with pytest.raises(InvalidEntry):
            wrong()
    assert client.failures == 0


def test_what_the_daemon_finds_too_large_raises_and_what_it_has_no_room_for_now_is_a_miss(daemon_factory):
    daemon = daemon_factory(server='in_flight_nbytes = "4MiB"', store='entry_max_nbytes = "8MiB"')
    client = daemon.client(on_error="miss", framework="numpy")
    with pytest.raises(EntryTooLarge, match="8388608"):
        client.put(b"k", {"x": np.zeros(9 << 20, dtype=np.uint8)})
    strict = daemon.client(on_error="raise")
    results = []

    def put(cache, n):
        try:
            results.append(cache.put(b"%d" % n, {"x": np.zeros(3 << 20, dtype=np.uint8)}))
        except OverQuota:
            results.append("over quota")

    threads = [threading.Thread(target=put, args=((client, strict)[n % 2], n)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) <= {True, False, "over quota"}
    assert True in results
    assert client.failures == results.count(False)
    assert client.put(b"after", X)


@pytest.mark.parametrize("on_error", ["miss", "raise"])
def test_every_verb_of_a_closed_client_says_that_it_is_closed(shared_daemon, on_error):
    """It answered misses: a worker that closed its client too early had a cache that never hit, and no error."""
    client = shared_daemon.client(on_error=on_error)
    client.close()
    client.close()
    for call in (
        lambda: client.get(b"k"), lambda: client.get_many([b"k"]), lambda: client.put(b"k", X),
        lambda: client.put_many([(b"k", X)]), lambda: client.match([b"k"]), lambda: client.locate([b"k"]),
        lambda: client.touch([b"k"]), lambda: client.delete(b"k"), lambda: client.pin(b"k"), lambda: client.unpin(b"k"),
        lambda: client.empty((1,)), lambda: client.lease(b"k").__enter__(), client.stats, client.ping, client.drain,
        lambda: client.inspect(b"k"), lambda: list(client.entries()), lambda: list(client.verify()),
        lambda: client.report(prefill_saved_s=1.0), client.settings,
    ):  # fmt: skip
        with pytest.raises(TierUnavailable, match="this client is closed"):
            call()


def test_a_forked_child_has_a_connection_of_its_own(shared_daemon):
    client = shared_daemon.client(framework="numpy")
    client.put(b"k", X)
    stop = threading.Event()
    calling = threading.Barrier(5)

    def busy():
        client.get(b"k")
        calling.wait(120)
        while not stop.is_set():
            client.get(b"k")

    threads = [threading.Thread(target=busy) for _ in range(4)]
    for thread in threads:
        thread.start()
    calling.wait(120)
    pid = os.fork()
    if pid == 0:
        try:
            hit = client.get(b"k")
            os._exit(0 if hit is not None and np.array_equal(hit.tensors["x"], X["x"]) else 3)
        except TierUnavailable:
            os._exit(0)  # a clear error is as good
        except BaseException:  # noqa: BLE001 - nothing may escape into the parent's test run
            os._exit(4)
    deadline = time.monotonic() + 120
    done, status = 0, -1
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert done, "the child hung"
    assert os.waitstatus_to_exitcode(status) == 0
    assert client.get(b"k") is not None


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"on_error": "ignore"}, {"framework": "jax"}])
def test_bad_options_are_refused(options):
    with pytest.raises((ValueError, InvalidEntry)):
        Client("unix:/x", **options)
