"""A daemon that numbers no answers (an older one) is served by order alone: an answer is still never another call's.

Whoever was interrupted, or waited in vain, leaves a connection that serves no other call.
"""

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.kvstored_client.test_interrupts import (
    KEYS,
    Interrupt,
    alarm,
    check,
    get,
    instructions,
    interrupted,
    put_many,
)
from tests.kvstored_client.test_lying_daemon import FalseLeaseSocket


class OlderLeaseSocket(FalseLeaseSocket):
    """Stands before a daemon and takes the numbers out of its answers. first: so many of them keep theirs."""

    first = 0

    def _answer(self, near, data, fds):
        reply = pb.LeaseReply.FromString(data)
        if self.first > 0:
            self.first -= 1
        else:
            reply.number = 0
        return super()._answer(near, reply.SerializeToString(), fds)


@pytest.fixture
def older(shared_daemon, tmp_path_factory) -> Iterator[tuple[OlderLeaseSocket, str]]:
    directory = tmp_path_factory.mktemp("k")
    (directory / "k").symlink_to(shared_daemon.socket_path)
    front = OlderLeaseSocket(str(directory / "k.lease"), f"{shared_daemon.socket_path}.lease", random.Random(1))
    yield front, f"unix:{directory}/k"
    front.close()


def client_of(address: str, timeout_s: float = 30.0) -> Client:
    return Client(address, framework="numpy", on_error="raise", timeout_s=timeout_s)


def test_an_older_daemon_serves_over_shared_memory(older, monkeypatch):
    with client_of(older[1]) as client:
        monkeypatch.setattr(client._transport, "stream_in", None)
        monkeypatch.setattr(client._transport, "send", None)
        for key in KEYS:
            assert client.put(key, {"x": np.frombuffer(key * 256, np.uint8)})
        for key in KEYS:
            check(client.get(key), key)
        assert not client._pool.connections()[0]._numbered


def test_an_interrupt_at_any_instruction_pairs_no_answer_wrongly(older):
    with client_of(older[1]) as client:
        put_many(client)
        length = instructions(get, client)
        done = sum(interrupted(n, get, client) or True for n in range(1, length, 23) if check_all(client) is None)
        assert done > 10
        check_all(client)


def check_all(client: Client) -> None:
    key = random.choice(KEYS)
    check(client.get(key), key)


def test_an_answer_that_comes_after_the_wait_for_it_is_read_by_nobody(older, shared_daemon):
    with client_of(older[1]) as client:
        put_many(client)
        for key in KEYS[:2]:
            shared_daemon.signal(signal.SIGSTOP)
            try:
                with alarm(0.05), pytest.raises(Interrupt):
                    client.get(key)
            finally:
                shared_daemon.signal(signal.SIGCONT)
            for other in KEYS:
                check(client.get(other), other)


def test_one_that_numbers_its_first_answer_must_number_all(older):
    """Else the guard could be taken away by whoever leaves the numbers out."""
    front, address = older
    with client_of(address) as client:
        front.first = 2  # the greeting's, and one more
        put_many(client)
        connection = client._pool.connections()[0] if client._pool.connections() else None
        check(client.get(KEYS[0]), KEYS[0])  # over the stream, or a new connection
        assert connection is None or connection.closed
