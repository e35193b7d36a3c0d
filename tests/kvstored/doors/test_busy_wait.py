"""A daemon stays awake for a client only as long as that makes its calls shorter."""

import os
import socket
from types import SimpleNamespace

import pytest

from kvstored.doors import busy_wait
from kvstored.doors.busy_wait import LOOK_S, PAUSE_MAX_S, Callers, Waiting

LOOK_TAKES_S = 2e-6
SOON_S = 20e-6


class Packets:
    """A socket on which a packet comes some time after it is waited for."""

    def __init__(self, clock):
        self.clock = clock
        self.due = 0.0
        self.looks = self.sleeps = 0

    def recv_into(self, packet, nbytes=0, flags=0):
        if flags & socket.MSG_DONTWAIT:
            self.looks += 1
            self.clock.now += LOOK_TAKES_S
            if self.clock.now < self.due:
                raise BlockingIOError
        else:
            self.sleeps += 1
            self.clock.now = max(self.clock.now, self.due)
        return 1


class Client:
    """Calls, and says how its call was waited for."""

    def __init__(self, clock, callers):
        self.clock = clock
        self.sock = Packets(clock)
        self.waiting = Waiting(self.sock, callers)
        self.moves = 0
        self.waiting._move = self._moved

    def _moved(self):
        self.moves += 1

    def calls_after(self, seconds):
        """(looks, sleeps) until the packet was there."""
        self.sock.due, self.sock.looks, self.sock.sleeps = self.clock.now + seconds, 0, 0
        assert self.waiting.receive(memoryview(bytearray(1))) == 1
        return self.sock.looks, self.sock.sleeps


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1.0)
    monkeypatch.setattr(busy_wait, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def callers():
    return Callers(frozenset({0, 1}))


def test_a_client_that_calls_again_at_once_is_waited_for_awake(clock, callers):
    client = Client(clock, callers)
    assert client.calls_after(SOON_S) == (0, 1)  # nothing is known of it yet
    for _ in range(100):
        looks, sleeps = client.calls_after(SOON_S)
        assert looks > 0
        assert sleeps == 0
    assert client.moves == 0


def test_a_client_that_pauses_is_slept_on_and_costs_one_look(clock, callers):
    client = Client(clock, callers)
    client.calls_after(SOON_S)
    looks, sleeps = client.calls_after(3600.0)
    assert sleeps == 1
    assert looks <= 2 * LOOK_S / LOOK_TAKES_S + 2  # a move in between begins it anew
    assert client.calls_after(10 * LOOK_S) == (0, 1)


def test_nobody_looks_while_another_client_calls(clock, callers):
    one, other = Client(clock, callers), Client(clock, callers)
    for client in (one, other, one, other):
        assert client.calls_after(SOON_S) == (0, 1)


def test_looking_in_vain_becomes_rare(clock, callers):
    """Where each look keeps the client from running: its call always comes just after it."""
    client = Client(clock, callers)
    began, looked = clock.now, 0
    for _ in range(2000):
        looks, sleeps = client.calls_after(SOON_S)
        assert sleeps == (0 if looks else 1)
        clock.now += 0.0001
        if client.waiting._hurried and clock.now >= client.waiting._not_before:
            looks, sleeps = client.calls_after(3 * LOOK_S)
            assert looks > 0
            assert sleeps == 1
            looked += 1
    assert looked > 1
    assert looked * LOOK_S < 0.04 * (clock.now - began)
    assert client.waiting._pause_s == PAUSE_MAX_S


def test_calls_in_pairs_are_looked_for_now_and_then_only(clock, callers):
    client = Client(clock, callers)
    began, looked = clock.now, 0
    for _ in range(2000):
        for seconds in (SOON_S, SOON_S, 0.002):
            looked += client.calls_after(seconds)[0] > 0
    assert looked * LOOK_S < 0.1 * (clock.now - began)


def test_who_was_woken_and_finds_nothing_moves_to_another_processor_once(clock, callers):
    client = Client(clock, callers)
    client.calls_after(SOON_S)
    assert client.calls_after(LOOK_S / 2)[1] == 0
    assert client.moves == 1
    assert client.calls_after(LOOK_S / 2)[1] == 0  # awake since: it is where it should be
    assert client.moves == 1


def test_on_one_processor_nobody_looks(clock):
    client = Client(clock, Callers(frozenset({0})))
    for _ in range(10):
        assert client.calls_after(SOON_S) == (0, 1)


def test_a_move_leaves_every_processor_open_to_the_thread():
    allowed = os.sched_getaffinity(0)
    Waiting(None, Callers())._move()
    assert os.sched_getaffinity(0) == allowed


def test_packets_come_through_a_real_socket_and_its_end_is_zero():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        wait, packet = Waiting(ours, Callers()), memoryview(bytearray(100))
        for i in range(200):
            theirs.send(b"%d" % i)
            assert bytes(packet[: wait.receive(packet)]) == b"%d" % i
        theirs.close()
        assert wait.receive(packet) == 0
