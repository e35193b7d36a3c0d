"""A lease socket that takes connections and does not answer: the stream takes the calls."""

import socket
import time

import numpy as np
import pytest

from kvstored_client.shm import pool as pools
from tests.kvstored.inside import daemon_inside

X = {"x": np.arange(1000, dtype=np.float32)}


def test_a_fresh_lease_connection_that_stays_silent_sends_the_call_over_the_stream(monkeypatch):
    """Its clients waited five seconds for each miss, and never took the stream that worked."""
    with daemon_inside() as daemon:
        daemon.daemon._leases[0].stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
            mute.bind(f"{daemon.socket_path}.lease")
            mute.listen(64)
            client = daemon.client(on_error="miss", timeout_s=4.0)
            asked = []
            real = client._pool._connect
            monkeypatch.setattr(client._pool, "_connect", lambda hand: asked.append(hand) or real(hand))
            assert client.put(b"k", X)
            began = time.monotonic()
            for _ in range(20):
                assert np.array_equal(client.get(b"k").tensors["x"], X["x"])
            assert client.failures == 0
            assert client._transport.breaker.failures == 0
            assert time.monotonic() - began < 20 * 4.0 / 2, "not a wait each time"


def test_a_silent_lease_socket_is_asked_less_and_less(monkeypatch):
    pool = pools.ConnectionPool(pools.Path("nowhere"), 4.0)

    def silent(self, path, timeout_s):
        raise pools.Silent(f"{timeout_s}")

    now = [100.0]
    monkeypatch.setattr(pools.Connection, "open", silent)
    monkeypatch.setattr(pools.time, "monotonic", lambda: now[0])
    waits = []
    for _ in range(8):
        with pytest.raises(pools.UseStream, match="fresh lease connection: 2.0"):  # half of the patience
            pool._connect([])
        waits.append(pool._not_before - now[0])
        now[0] = pool._not_before
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
