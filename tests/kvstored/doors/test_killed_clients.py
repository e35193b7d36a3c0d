"""Clients killed at random points of reading, writing and holding leases: nothing leaks, nobody reads wrong bytes."""

import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import environment, wait_until

TRIALS = 200
KILLER = """
import os, random, signal, sys, time
import numpy as np
from kvstored_client import Client

def value(n):
    return np.full(5_000 + 40_000 * n, n, dtype=np.float32)

def live(address, seed):
    rng = random.Random(seed)
    cache = Client(address, framework="numpy")
    blocks = []
    while True:
        n = rng.randrange(8)
        what = rng.random()
        if what < 0.3:
            cache.put(b"%d" % n, {"x": value(n)}, fidelity="exact")
        elif what < 0.6:
            cache.get(b"%d" % n)
        elif len(blocks) < 50:
            blocks.append(cache.lease(b"%d" % n))
            blocks[-1].__enter__()
        else:
            kept = cache.empty((1000,), "float32")

rng = random.Random(7)
for trial in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        live(sys.argv[1], trial)
    time.sleep(rng.uniform(0.002, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_200_killed_clients_leave_nothing_behind_and_no_wrong_byte_is_seen(daemon):
    client = daemon.client(framework="numpy")
    # On a busy machine none of them may live long enough to put anything.
    for n in range(8):
        client.put(b"%d" % n, {"x": np.full(5_000 + 40_000 * n, n, dtype=np.float32)}, fidelity="exact")
    killer = subprocess.Popen([sys.executable, "-c", KILLER, daemon.address, str(TRIALS)], env=environment())
    reads = 0
    while killer.poll() is None:
        for n in range(8):
            hit = client.get(b"%d" % n)
            if hit is not None:
                assert hit.tensors["x"].size == 5_000 + 40_000 * n
                assert (hit.tensors["x"] == n).all()
                reads += 1
    assert killer.returncode == 0
    assert reads > 0
    held = sum(4 * (5_000 + 40_000 * n) + 128 for n in range(8))

    def nothing_is_left():
        values = client.stats().values
        return values["leases"] == 0 and values["lease_connections"] == 1 and values["arena_used_nbytes"] <= held

    wait_until(nothing_is_left)
    assert np.array_equal(client.get(b"3").tensors["x"], np.full(125_000, 3, dtype=np.float32))
