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
from kvstored_client import Client
from kvstored_client.near import CONNECTIONS_MAX
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
    key = random.choice(KEYS)  # noqa: S311 - no secret
    check(client.get(key), key)


def get_out(client):
    key = random.choice(KEYS)  # noqa: S311
    out = {"x": np.empty_like(value_of(key))}
    check(client.get(key, out=out), key)


def get_many(client):
    for hit, key in zip(client.get_many(KEYS), KEYS, strict=True):
        check(hit, key)


def put(client):
    key = random.choice(KEYS)  # noqa: S311
    assert client.put(key, {"x": value_of(key)})


def put_many(client):
    assert client.put_many([(key, {"x": value_of(key)}) for key in KEYS]) == len(KEYS)


def lease(client):
    key = random.choice(KEYS)  # noqa: S311
    with client.lease(key) as hit:
        check(hit, key)
        del hit


def empty_and_put(client):
    key = random.choice(KEYS)  # noqa: S311
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
            assert 1 <= len(client._near.connections()) <= CONNECTIONS_MAX
            served = client._near.connections()[0]._number
            get(client)
            assert max(c._number for c in client._near.connections()) > served - 1, "over shared memory again"
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
        for n in range(random.randrange(step) + 1, 100_000, step):  # noqa: S311
            if not interrupted(n, call, client):
                break
            done += 1
            get(client)
        print("interrupts", door, call.__name__, done)
        assert done > 10


@pytest.mark.parametrize("door", DOORS)
def test_interrupts_at_random_instructions_leave_the_client_whole(shared_daemon, door, quiet):
    count = INTERRUPTS // len(DOORS)
    with storm(shared_daemon, door) as client:
        lengths = {call: instructions(call, client) for call in CALLS}
        done = 0
        while done < count:
            call = random.choice(CALLS)  # noqa: S311
            done += interrupted(random.randrange(2 * lengths[call]) + 1, call, client)  # noqa: S311
            if done % 5 == 0:
                random.choice(CALLS)(client)  # noqa: S311
