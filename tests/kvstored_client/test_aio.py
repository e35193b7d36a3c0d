"""The asyncio client where it differs from the blocking one: cancellation, its thread, loops, a daemon in trouble.

What both share is in tests/contract, over both.
"""

import asyncio
import gc
import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from kvstore.errors import LeaseKept, OutMismatch, TierUnavailable
from kvstored_client.aio import Client, worker
from kvstored_client.aio.worker import INLINE_NBYTES, SLICE_NBYTES, Slices
from kvstored_client.shm.pool import CONNECTIONS_MAX
from tests.conftest import factory
from tests.kvstored.inside import daemon_inside

KEYS = [b"asyncio%d" % i for i in range(8)]
X = {"x": np.arange(1000, dtype=np.float32)}
DOORS = ("lease", "unix", "tcp")
WITHIN_S = 15.0


@pytest.fixture(scope="module")
def shared_daemon():
    """One whose leases and connections are all of these tests: they count them."""
    with factory() as make:
        yield make(tcp=True)


def value_of(key):
    return np.frombuffer(key * 256, np.uint8)


def client_of(daemon, door="lease", **options):
    options = {"framework": "numpy", "on_error": "raise", "timeout_s": 30, **options}
    return Client(daemon.address.split(",")[1 if door == "tcp" else 0], shared_memory=door == "lease", **options)


def check(hit, key):
    assert hit is not None
    assert hit.key == key
    assert np.array_equal(hit.tensors["x"], value_of(key))


async def fill(client):
    assert await client.put_many([(key, {"x": value_of(key)}) for key in KEYS]) == len(KEYS)


async def get(client):
    key = random.choice(KEYS)
    check(await client.get(key), key)


async def get_many(client):
    for hit, key in zip(await client.get_many(KEYS), KEYS, strict=True):
        check(hit, key)


async def put(client):
    key = random.choice(KEYS)
    assert await client.put(key, {"x": value_of(key)})


async def lease(client):
    key = random.choice(KEYS)
    async with client.lease(key) as hit:
        check(hit, key)
        del hit


async def empty_and_put(client):
    key = random.choice(KEYS)
    x = await client.empty(value_of(key).shape, "uint8")
    x[:] = value_of(key)
    assert await client.put(key, {"x": x})


async def match_and_delete(client):
    assert await client.match(KEYS) == len(KEYS)
    assert await client.delete(b"never put") == 0


CALLS = (get, get_many, put, lease, empty_and_put, match_and_delete)


async def cancelled_after(steps, work):
    """Cancel a task after so many turns of the loop. Whether it was still under way."""
    task = asyncio.ensure_future(work)
    for _ in range(steps):
        await asyncio.sleep(0)
    under_way = task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return under_way


async def eventually(condition, sentence):
    until = time.monotonic() + 120
    while not await condition():
        assert time.monotonic() < until, sentence
        await asyncio.sleep(0.01)


async def nothing_left(client):
    """No lease is held, and no more connections are open than a pool may have."""

    async def none_held():
        values = (await client.stats()).values
        return values["leases"] == 0 and values["lease_connections"] <= CONNECTIONS_MAX

    await eventually(none_held, "leases of cancelled calls are still held")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("door", DOORS)
def test_a_call_cancelled_at_any_turn_of_the_loop_leaves_the_client_whole(shared_daemon, door, call):
    async def run():
        async with client_of(shared_daemon, door) as client:
            await fill(client)
            done = sum([await cancelled_after(steps, call(client)) for steps in range(25)])
            assert done > 1
            await asyncio.gather(*(other(client) for other in CALLS))
            await nothing_left(client)

    asyncio.run(run())


def test_the_answer_to_a_cancelled_call_is_taken_and_never_read_as_another_one_s(shared_daemon):
    async def run():
        async with client_of(shared_daemon) as client:
            await fill(client)
            pool = client.asking._pool
            async with client.lease(KEYS[0]) as held:  # its connection must not end for a cancelled call
                shared_daemon.signal(signal.SIGSTOP)
                try:
                    tasks = [asyncio.ensure_future(client.get(key)) for key in KEYS[1:4]]
                    await asyncio.sleep(0.05)
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
                finally:
                    shared_daemon.signal(signal.SIGCONT)
                for key in KEYS:
                    check(await client.get(key), key)
                assert np.array_equal(held.tensors["x"], value_of(KEYS[0]))
                del held
            before = [connection for connection in pool.connections() if not connection.closed]
            await nothing_left(client)
            assert before, "the connections of cancelled calls serve on"

    asyncio.run(run())


def test_a_put_cancelled_while_the_daemon_reads_it_keeps_its_memory_until_the_answer(shared_daemon):
    """Given to the next put before, its bytes would have been stored under the first one's key."""

    async def run():
        async with client_of(shared_daemon) as client:
            await fill(client)
            shared_daemon.signal(signal.SIGSTOP)
            try:
                task = asyncio.ensure_future(client.put(b"first", {"x": np.full(4096, 1, np.uint8)}))
                await asyncio.sleep(0.05)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                later = [
                    asyncio.ensure_future(client.put(b"later%d" % i, {"x": np.full(4096, 2, np.uint8)}))
                    for i in range(8)
                ]
                await asyncio.sleep(0.05)
            finally:
                shared_daemon.signal(signal.SIGCONT)
            assert all(await asyncio.gather(*later))
            first = await client.get(b"first")
            assert first is None or (first.tensors["x"] == 1).all()
            await client.delete(b"first", *(b"later%d" % i for i in range(8)))

    asyncio.run(run())


def test_a_cancelled_get_writes_to_the_caller_s_tensor_no_more(shared_daemon, monkeypatch):
    begun, go_on, slices = threading.Event(), threading.Event(), []

    class Slow(Slices):
        def copy(self, target, source):
            def copyto(part, of):
                slices.append(part.size)
                begun.set()
                go_on.wait(60)
                part[:] = of

            with monkeypatch.context() as patch:
                patch.setattr(worker.np, "copyto", copyto)
                super().copy(target, source)

    async def run():
        async with client_of(shared_daemon) as client:
            large = np.ones(4 * SLICE_NBYTES, np.uint8)
            await client.put(b"large", {"x": large})
            out = {"x": np.zeros_like(large)}
            monkeypatch.setattr(worker, "Slices", Slow)
            task = asyncio.ensure_future(client.get(b"large", out=out))
            await asyncio.to_thread(begun.wait, 60)
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done(), "it ends once nothing writes any more"
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            monkeypatch.undo()
            out["x"][:] = 7
            await client.asking.worker.run(lambda: None)
            assert (out["x"] == 7).all()
            assert slices == [SLICE_NBYTES], "not the rest of it"
            await client.delete(b"large")
            await nothing_left(client)

    asyncio.run(run())


@pytest.mark.parametrize("door", DOORS)
def test_large_copies_are_made_beside_the_loop_and_by_one_thread(shared_daemon, door, monkeypatch):
    """On the loop a get of 16 MiB stopped everything else for 50 ms; a thread for each call is what this replaces."""
    copied_by = []
    copyto = np.copyto

    def noting(target, source, **how):
        if target.nbytes > INLINE_NBYTES:
            copied_by.append(threading.current_thread().name)
        copyto(target, source, **how)

    async def run():
        async with client_of(shared_daemon, door) as client:
            large = np.random.default_rng(1).integers(0, 256, 6 << 20, np.uint8)
            await client.put(b"large", {"x": large})
            before = threading.active_count()
            monkeypatch.setattr(np, "copyto", noting)
            hits = await asyncio.gather(*(client.get(b"large") for _ in range(8)))
            assert threading.active_count() <= before + 1
            assert all(np.array_equal(hit.tensors["x"], large) for hit in hits)
            await client.delete(b"large")

    asyncio.run(run())
    assert len(copied_by) >= 8
    assert all(name.startswith("kvstored-aio") for name in copied_by)


def test_more_calls_than_connections_wait_their_turn(shared_daemon):
    async def run():
        async with client_of(shared_daemon) as client:
            await fill(client)
            await asyncio.gather(*(random.choice(CALLS)(client) for _ in range(64)))
            assert len(client.asking._pool.connections()) <= CONNECTIONS_MAX
            await nothing_left(client)

    asyncio.run(run())


MISSES = [None, False, 0, [None, None], [], 0, [None, None], 0, 0, 0, 0]


async def every_verb(client):
    return [
        await client.get(b"k"),
        await client.put(b"k", X),
        await client.put_many([(b"a", X), (b"b", X)]),
        await client.get_many([b"a", b"b"]),
        await client.get_many([b"a"], leading=True),
        await client.match([b"a"]),
        await client.locate([b"a", b"b"]),
        await client.touch([b"a"]),
        await client.delete(b"a"),
        await client.pin(b"a"),
        await client.unpin(b"a"),
    ]


def test_an_absent_daemon_is_a_miss_and_raises_for_those_who_asked(tmp_path):
    async def run():
        async with Client(f"unix:{tmp_path}/none.sock", timeout_s=120) as client:
            assert await every_verb(client) == MISSES
            assert client.failures == len(MISSES)
            async with client.lease(b"k") as hit:
                assert hit is None
            with pytest.raises(TierUnavailable, match=r"none\.sock"):
                await client.stats()
        async with Client(f"unix:{tmp_path}/none.sock", on_error="raise") as client:
            with pytest.raises(TierUnavailable):
                await client.get(b"k")

    asyncio.run(run())


def test_a_daemon_that_accepts_and_says_nothing_is_a_miss_within_the_deadline(tmp_path):
    async def run():
        async with Client(f"unix:{tmp_path}/mute.sock", timeout_s=0.5) as client:
            started = time.monotonic()
            assert await client.get(b"k") is None
            assert await client.put(b"k", X) is False
            assert time.monotonic() - started < WITHIN_S

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "mute.sock"))
        listener.listen()
        asyncio.run(run())


def test_a_stopped_daemon_is_a_miss_within_the_deadline_and_is_found_again(daemon):
    async def run():
        async with client_of(daemon) as setup:
            assert await setup.put(b"k", X)
        async with client_of(daemon, on_error="miss", timeout_s=0.5) as client:

            async def found():
                return await client.get(b"k") is not None

            await eventually(found, "half a second is too short here")
            daemon.signal(signal.SIGSTOP)
            started = time.monotonic()
            for _ in range(100):
                assert await client.get(b"k") is None
            assert time.monotonic() - started < 25, "an open breaker costs no waiting, its probes aside"
            daemon.signal(signal.SIGCONT)
            await eventually(found, "was not found again")

    asyncio.run(run())


def test_a_closed_client_ends_its_calls_and_never_hangs(daemon):
    async def run(door):
        client = client_of(daemon, door, on_error="miss")
        assert await client.put(b"k", X)
        daemon.signal(signal.SIGSTOP)
        try:
            tasks = [asyncio.ensure_future(client.get(b"k")) for _ in range(CONNECTIONS_MAX + 4)]
            await asyncio.sleep(0.05)
            await client.close()
            await client.close()
            ended = time.monotonic()
            assert await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S) == [None] * len(tasks)
            assert time.monotonic() - ended < 5, "those that were connecting waited for half their deadline"
        finally:
            daemon.signal(signal.SIGCONT)
        for call in (client.get(b"k"), client.put(b"k", X), client.ping(), client.stats()):
            with pytest.raises(TierUnavailable, match="this client is closed"):
                await call

    for door in ("lease", "tcp" if "tcp" in daemon.address else "unix"):
        asyncio.run(run(door))


def test_one_client_serves_one_event_loop_after_another(shared_daemon):
    for door in DOORS:
        client = client_of(shared_daemon, door)
        for _ in range(3):
            asyncio.run(fill(client))
            asyncio.run(get_many(client))
        asyncio.run(client.close())
        del client
        gc.collect()


def test_a_forked_child_has_a_connection_of_its_own(shared_daemon):
    client = client_of(shared_daemon)

    async def parent():
        await fill(client)
        await client.put(b"large", {"x": np.ones(1 << 20, np.uint8)})

    async def child():
        check(await client.get(KEYS[1]), KEYS[1])
        hit = await client.get(b"large")
        assert (hit.tensors["x"] == 1).all()

    asyncio.run(parent())
    pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(child())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - nothing may escape into the parent's test run
            os._exit(4)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    asyncio.run(get_many(client))
    asyncio.run(client.delete(b"large"))
    asyncio.run(client.close())


def test_what_a_lease_holds_may_not_be_kept_and_another_shape_is_refused(shared_daemon):
    async def run():
        async with client_of(shared_daemon) as client:
            await fill(client)
            kept = []
            with pytest.raises(LeaseKept):
                async with client.lease(KEYS[0]) as hit:
                    kept.append(hit.tensors["x"])
            kept.clear()
            del hit
            with pytest.raises(OutMismatch):
                await client.get(KEYS[0], out={"x": np.zeros(3, np.uint8)})
            await nothing_left(client)

    asyncio.run(run())


def test_a_block_that_is_used_again_while_it_is_copied_is_a_miss(monkeypatch):
    async def run(address):
        async with Client(address, framework="numpy", on_error="raise") as client:
            large = np.ones(2 * SLICE_NBYTES, np.uint8)
            await client.put(b"large", {"x": large})
            monkeypatch.setattr("kvstored_client.shm.gets.Block.is_gone", lambda _: True)
            assert await client.get(b"large") is None
            assert client.failures == 1

    with daemon_inside(segment_nbytes=64 << 20) as daemon:
        asyncio.run(run(f"unix:{daemon.socket_path}"))
