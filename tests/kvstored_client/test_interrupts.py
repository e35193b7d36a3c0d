"""A client interrupted between any two instructions gives no wrong answer afterwards, does not hang and loses nothing.

`KVSTORED_INTERRUPTS=10000` has so many interrupts at random instead of a few hundred for each door.
"""

import ctypes
import gc
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import kvstored_client
from kvstore.errors import InvalidEntry
from kvstore.options import PutOptions
from kvstored_client import Client
from kvstored_client.interrupts import damage
from kvstored_client.shm.pool import CONNECTIONS_MAX
from tests.conftest import wait_until

CLIENT = str(Path(kvstored_client.__file__).parent)
KEYS = [b"interrupt%d" % i for i in range(8)]
INTERRUPTS = int(os.environ.get("KVSTORED_INTERRUPTS", "600"))
DOORS = ("lease", "unix", "tcp")


class Interrupt(BaseException):
    """What a handler of the test raises."""


def value_of(key):
    return np.frombuffer(key * 256, np.uint8)


def client_of(daemon, door, **options):
    options = {"framework": "numpy", "on_error": "raise", "timeout_s": 30, **options}
    address = daemon.address.split(",")[1 if door == "tcp" else 0]
    return Client(address, shared_memory=door == "lease", **options)


@pytest.fixture
def quiet(monkeypatch):
    """An interrupt inside a finalizer has nobody to go to."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


class At:
    """Raises at the n-th instruction of the client's own code."""

    def __init__(self, n):
        self.left = n

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(CLIENT):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.left -= 1
            if not self.left:
                raise Interrupt
        return self


def interrupted(n, call, client):
    """Make a call that is interrupted at its n-th instruction; False: it had fewer."""
    try:
        sys.settrace(At(n))
        call(client)
    except Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def instructions(call, client):
    counter = At(-1)
    try:
        sys.settrace(counter)
        call(client)
    finally:
        sys.settrace(None)
    return -1 - counter.left


def check(hit, key):
    """What a hit says is of the key that was asked for."""
    assert hit is not None
    assert hit.key == key
    assert np.array_equal(hit.tensors["x"], value_of(key))


def get(client):
    key = random.choice(KEYS)
    check(client.get(key), key)


def get_out(client):
    key = random.choice(KEYS)
    out = {"x": np.empty_like(value_of(key))}
    check(client.get(key, out=out), key)


def get_many(client):
    for hit, key in zip(client.get_many(KEYS), KEYS, strict=True):
        check(hit, key)


def put(client):
    key = random.choice(KEYS)
    assert client.put(key, {"x": value_of(key)})


def put_many(client):
    assert client.put_many([(key, {"x": value_of(key)}) for key in KEYS]) == len(KEYS)


def lease(client):
    key = random.choice(KEYS)
    with client.lease(key) as hit:
        check(hit, key)
        del hit


def empty_and_put(client):
    key = random.choice(KEYS)
    x = client.empty(value_of(key).shape, "uint8")
    x[:] = value_of(key)
    assert client.put(key, {"x": x})


def match_and_delete(client):
    assert client.match(KEYS) == len(KEYS)
    assert client.delete(b"never put") == 0


CALLS = (get, get_out, get_many, put, put_many, lease, empty_and_put, match_and_delete)


def descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all that is wanted


@contextmanager
def storm(daemon, door):
    """A client to be interrupted; afterwards it works as ever, and holds no more than before."""
    with client_of(daemon, door) as client, client_of(daemon, "tcp") as watcher:
        put_many(client)
        for call in CALLS:
            call(client)
        gc.collect()
        before, threads = descriptors(), threading.active_count()
        others = watcher.stats().values["lease_connections"] - (door == "lease")
        yield client
        gc.collect()
        for call in CALLS:
            call(client)
        if door == "lease":
            assert 1 <= len(client._pool.connections()) <= CONNECTIONS_MAX
            served = client._pool.connections()[0]._number
            get(client)
            assert max(c._number for c in client._pool.connections()) > served - 1, "over shared memory again"
        wait_until(lambda: watcher.stats().values["leases"] == 0)
        wait_until(lambda: watcher.stats().values["lease_connections"] <= others + CONNECTIONS_MAX)
        wait_until(lambda: descriptors() <= before + 3 * CONNECTIONS_MAX)
        assert threading.active_count() <= threads + 8


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("door", DOORS)
def test_an_interrupt_at_each_instruction_of_a_call_leaves_the_client_whole(shared_daemon, door, call, quiet):
    with storm(shared_daemon, door) as client:
        step = 1 if "KVSTORED_INTERRUPTS" in os.environ else 29
        done = 0
        for n in range(random.randrange(step) + 1, 100_000, step):
            if not interrupted(n, call, client):
                break
            done += 1
            get(client)
        assert done > 10


@pytest.mark.parametrize("door", DOORS)
def test_interrupts_at_random_instructions_leave_the_client_whole(shared_daemon, door, quiet):
    count = INTERRUPTS // len(DOORS)
    with storm(shared_daemon, door) as client:
        lengths = {call: instructions(call, client) for call in CALLS}
        done = 0
        while done < count:
            call = random.choice(CALLS)
            done += interrupted(random.randrange(2 * lengths[call]) + 1, call, client)
            if done % 5 == 0:
                random.choice(CALLS)(client)


def test_the_answer_to_an_interrupted_call_is_never_read_as_another_one_s(shared_daemon):
    """Every later call of that client had the answer to the call before, for good."""
    with client_of(shared_daemon, "lease") as client:
        put_many(client)
        for door in range(3):  # each time with a connection of its own
            shared_daemon.signal(signal.SIGSTOP)
            try:
                with alarm(0.05), pytest.raises(Interrupt):
                    client.get(KEYS[door])
            finally:
                shared_daemon.signal(signal.SIGCONT)
            for key in KEYS:
                check(client.get(key), key)
            get_many(client)


@contextmanager
def handler(number, act):
    before = signal.signal(number, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(number, before)


def raise_it(kind=Interrupt):
    raise kind("from a signal handler")


@contextmanager
def ticking(act, after_s, every_s=0.0):
    """A timer's signal calls `act`; pytest's own timer goes on afterwards."""
    with handler(signal.SIGALRM, act):
        before = signal.setitimer(signal.ITIMER_REAL, after_s, every_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_REAL, *before)


def alarm(after_s, kind=Interrupt):
    return ticking(lambda: raise_it(kind), after_s)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, TimeoutError, BlockingIOError, ValueError])
def test_what_a_signal_handler_raises_reaches_the_caller_whatever_its_kind(shared_daemon, kind):
    """An OSError was taken for one of the socket's, and a timeout of the caller's own was answered as a miss."""
    with client_of(shared_daemon, "lease", on_error="miss") as client:
        put_many(client)
        shared_daemon.signal(signal.SIGSTOP)
        try:
            with alarm(0.05, kind), pytest.raises(kind, match="from a signal handler"):
                client.get(KEYS[0])
        finally:
            shared_daemon.signal(signal.SIGCONT)
        assert client.failures == 0
        check(client.get(KEYS[1]), KEYS[1])


@pytest.mark.parametrize("door", DOORS)
def test_interrupts_by_a_timer_leave_the_client_whole(shared_daemon, door, quiet):
    count = INTERRUPTS // 10
    with storm(shared_daemon, door) as client:
        done = rounds = 0
        while done < count and rounds < 40 * count:
            rounds += 1
            call = random.choice(CALLS)
            with suppress(Interrupt), alarm(random.uniform(0.00005, 0.003)):
                try:
                    call(client)
                except Interrupt:
                    done += 1
                    raise
            get(client)
        assert done


@pytest.mark.parametrize("door", DOORS)
def test_a_call_inside_a_signal_handler_during_a_call_is_answered(shared_daemon, door):
    """It hung without end where the outer one was making its connection: on a lock of their own thread's."""
    inner, inside = [], []

    def act():
        if not inside:  # on a busy machine the timer is faster than the call
            inside.append(1)
            inner.append(random.choice(CALLS)(client))
            inside.clear()

    with client_of(shared_daemon, door) as client:
        put_many(client)
        with ticking(act, 0.001, 0.01):
            while len(inner) < 50:
                random.choice(CALLS)(client)


class Inside:
    """Calls `act` at the n-th instruction of the client's own code, as a signal handler would."""

    def __init__(self, n, act):
        self.at = At(n)
        self.act = act

    def __call__(self, frame, event, arg):
        try:
            return self if self.at(frame, event, arg) else None
        except Interrupt:
            sys.settrace(None)
            self.act()
            return None


@pytest.mark.parametrize("first", [True, False])
def test_a_call_inside_another_one_at_each_of_its_instructions_is_answered(shared_daemon, first):
    with client_of(shared_daemon, "lease") as setup:
        put_many(setup)
        length = instructions(get, setup)
    for n in range(1, length, 37):
        with client_of(shared_daemon, "lease") as client:
            if not first:
                get(client)
            inner = []
            sys.settrace(Inside(n, lambda inner=inner, client=client: inner.append(get(client))))
            try:
                get(client)
            finally:
                sys.settrace(None)
            get(client)


@pytest.mark.parametrize("door", DOORS)
def test_exceptions_from_another_thread_leave_the_client_whole(shared_daemon, door, quiet):
    """PyThreadState_SetAsyncExc, as a task that is cancelled by its framework."""
    wrong, interrupts, stop = [], [], threading.Event()

    def work(client):
        while not stop.is_set():
            try:
                random.choice(CALLS)(client)
            except Interrupt:
                interrupts.append(1)
            except BaseException as error:  # noqa: BLE001
                wrong.append(repr(error))
                return

    def run(client):
        while not stop.is_set():
            with suppress(Interrupt):
                work(client)

    with storm(shared_daemon, door) as client:
        thread = threading.Thread(target=run, args=(client,))
        thread.start()
        until = time.monotonic() + 60
        while len(interrupts) < INTERRUPTS // 20 and not wrong and time.monotonic() < until:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupt))
            time.sleep(random.uniform(0.0005, 0.003))
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        assert not wrong
        assert interrupts


def test_a_thread_that_an_exception_ended_is_replaced(shared_daemon, monkeypatch, quiet):
    """Releases were sent no more, and a copy waited for its other half for ever."""
    with client_of(shared_daemon, "lease") as client, client_of(shared_daemon, "tcp") as watcher:
        large = np.arange(10 << 20, dtype=np.uint8)
        put_many(client)
        client.put(b"large", {"x": large})
        assert np.array_equal(client.get(b"large").tensors["x"], large)
        aside, releases = client._pool.copier._aside, client._pool._releases
        for queue in (aside._queue, releases._queue):
            queue.put(None)  # ends its thread, as an exception in it would
        wait_until(lambda: aside._running() is None and releases._running() is None)
        assert np.array_equal(client.get(b"large").tensors["x"], large)
        get(client)
        wait_until(lambda: watcher.stats().values["leases"] == 0)
        client.delete(b"large")


def test_a_lease_outlives_the_interrupt_of_another_call(shared_daemon, quiet):
    """Its connection is used no more, but stays: what was leased would be used again while it is looked at."""
    with client_of(shared_daemon, "lease") as client, client_of(shared_daemon, "tcp") as watcher:
        put_many(client)
        lengths = instructions(get, client)
        with client.lease(KEYS[0]) as hit:
            x = hit.tensors["x"]
            for n in range(1, lengths, 50):
                interrupted(n, get, client)
            client.delete(KEYS[0])
            for i in range(50):
                watcher.put(b"over it%d" % i, {"x": np.zeros_like(value_of(KEYS[0]))})
            assert np.array_equal(x, value_of(KEYS[0]))
            del x, hit
        watcher.delete(*(b"over it%d" % i for i in range(50)))
        wait_until(lambda: watcher.stats().values["leases"] == 0)


def test_signals_that_interrupt_nothing_do_not_put_off_the_end_of_a_wait(shared_daemon):
    """A profiler's timer started the socket's own time limit anew each time: such a call never ended."""
    with client_of(shared_daemon, "lease", timeout_s=0.5, on_error="miss") as client:
        put_many(client)
        shared_daemon.signal(signal.SIGSTOP)
        try:
            with ticking(lambda: None, 0.05, 0.05):
                began = time.monotonic()
                assert client.get(KEYS[0]) is None
                assert time.monotonic() - began < 20
        finally:
            shared_daemon.signal(signal.SIGCONT)


def test_an_interrupted_copy_writes_to_the_caller_s_tensor_no_more(shared_daemon, monkeypatch):
    with client_of(shared_daemon, "lease") as client:
        large = np.ones(64 << 20, np.uint8)
        client.put(b"large", {"x": large})
        out = {"x": np.zeros_like(large)}
        client.get(b"large", out=out)
        aside = client._pool.copier._aside
        begun, go_on = threading.Event(), threading.Event()

        def slowly(target, source):
            begun.set()
            go_on.wait(60)
            np.copyto(target, source)

        start = aside.start
        monkeypatch.setattr(aside, "start", lambda jobs, _work, *args: start(jobs, slowly, *args))

        def interrupt():
            begun.wait(60)
            os.kill(os.getpid(), signal.SIGUSR1)
            go_on.set()

        thread = threading.Thread(target=interrupt)
        with handler(signal.SIGUSR1, raise_it):
            thread.start()
            with pytest.raises(Interrupt):
                client.get(b"large", out=out)
        out["x"][:] = 7
        thread.join()
        jobs = []
        monkeypatch.undo()
        aside.start(jobs, lambda: None)
        jobs[0].wait()  # whatever was before it has been done
        assert (out["x"] == 7).all()
        client.delete(b"large")


def test_what_a_handler_raises_while_an_answer_is_read_is_no_damage() -> None:
    """The innermost frame is this file's, as a signal handler's is."""
    with pytest.raises(ValueError, match="mine") as raised:
        raise ValueError("mine")
    assert damage(raised.value, "an answer") is raised.value
    with pytest.raises(InvalidEntry) as told:
        PutOptions(ttl_s=-1.0)
    assert damage(told.value, "an answer") is told.value
