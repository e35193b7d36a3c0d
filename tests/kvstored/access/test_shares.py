"""Shares: a caller that competes with another takes no more than its part of the interpreter."""

import asyncio

import pytest

from kvstored.access.shares import BURST_S, BYTE_S, CALL_S, CONTENDED_S, DELAY_MAX_S, SHARE, Shares


class Time:
    """A clock that sleeping moves, one task at a time."""

    def __init__(self):
        self.now = 100.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def shares(time):
    return Shares(time, time.sleep)


def begin(shares, caller, calls, nbytes=0):
    async def run():
        for _ in range(calls):
            await shares.turn(caller, nbytes)

    asyncio.run(run())


def test_a_caller_that_is_alone_never_waits(shares, time):
    begin(shares, "a", 10_000)
    assert time.slept == []
    assert shares.delayed == 0


def test_a_caller_that_competes_gets_its_share_and_no_more(shares, time):
    shares.seen("b")  # over the lease socket
    began, calls = time.now, 300
    begin(shares, "a", calls)
    due = (calls * CALL_S - BURST_S) / SHARE
    assert time.now - began == pytest.approx(due, rel=0.05)
    assert shares.delayed > 200


def test_who_takes_little_does_not_wait_for_who_takes_much(shares, time):
    shares.seen("b")
    begin(shares, "a", 100)
    time.slept.clear()
    begin(shares, "b", 1)
    assert time.slept == []


@pytest.mark.parametrize("of_the_loop", [True, False])
def test_large_requests_and_long_work_cost_more(shares, time, of_the_loop):
    nbytes, calls = 4 << 20, 20
    began = time.now
    for _ in range(calls):
        shares.seen("b")
        begin(shares, "a", 1, nbytes if of_the_loop else 0)
        if not of_the_loop:
            shares.charge("a", nbytes * BYTE_S)
    assert time.now - began >= ((calls - 1) * (CALL_S + nbytes * BYTE_S) - BURST_S) / SHARE


def test_a_caller_waits_no_longer_once_the_other_is_gone(shares, time):
    shares.seen("b")
    begin(shares, "a", 100)
    time.now += 2 * CONTENDED_S
    time.slept.clear()
    begin(shares, "a", 1000)
    assert time.slept == []


def test_no_call_waits_longer_than_the_limit(shares, time):
    shares.seen("b")
    for _ in range(100):
        shares.charge("a", 1.0)
    begin(shares, "a", 3)
    assert max(time.slept) <= DELAY_MAX_S


def test_callers_that_come_and_go_are_forgotten(shares, time):
    for n in range(1000):
        shares.seen(str(n))
        begin(shares, str(n), 1)
        time.now += CONTENDED_S
    assert len(shares._seen) < 10
    assert len(shares._free_at) < 10
