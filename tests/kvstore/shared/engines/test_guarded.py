"""The deadline and the breaker around an engine that hangs, fails or overruns."""

import threading

import pytest

from kvstore.clock import ManualClock
from kvstore.shared import Health, SharedUnavailable
from kvstore.shared.breaker import CLOSED, HALF_OPEN, OPEN
from kvstore.shared.guarded import Guarded

from .plain import Plain

SHORT_S = 0.02


class Hanging(Plain):
    """Calls end when the test lets them. begun: how many did."""

    def __init__(self):
        super().__init__()
        self.go_on = threading.Event()
        self.begun = threading.Semaphore(0)
        self.fails = None
        self.answered = threading.Semaphore(0)

    def heads(self, names, timeout_s):
        self.begun.release()
        self.go_on.wait()
        try:
            if self.fails is not None:
                raise self.fails
            return super().heads(names, timeout_s)
        finally:
            self.answered.release()

    def get(self, names, nbytes, timeout_s):
        self.begun.release()
        self.go_on.wait()
        return super().get(names, nbytes, timeout_s)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def inner():
    engine = Hanging()
    yield engine
    engine.go_on.set()


@pytest.fixture
def guarded(inner, clock):
    made = Guarded(inner, clock, threads=3, in_flight_max_nbytes=1000)
    yield made
    inner.go_on.set()
    made.close()


def refused(call, *arguments):
    with pytest.raises(SharedUnavailable) as caught:
        call(*arguments)
    return caught.value.reason


def workers():
    return sum(thread.name == "kvstored-shared" for thread in threading.enumerate())


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("did not happen")


def test_a_call_ends_though_the_engine_does_not(guarded):
    assert refused(guarded.heads, ["a"], SHORT_S) == "timeout"
    assert guarded.breaker == OPEN


def test_while_it_is_open_no_call_reaches_the_engine_but_one_probe_that_nobody_waits_for(guarded, inner):
    refused(guarded.heads, ["a"], SHORT_S)
    for _ in range(5):
        assert refused(guarded.heads, ["a"], 1000.0) == "barred"
    for _ in range(2):
        assert inner.begun.acquire(timeout=10)
    assert guarded.breaker == HALF_OPEN
    assert not inner.begun.acquire(blocking=False)
    inner.go_on.set()
    wait_for(lambda: guarded.breaker == CLOSED)
    assert guarded.heads(["a"], 10.0) == [None]


def test_a_probe_that_fails_is_repeated_after_the_pause(guarded, inner, clock):
    refused(guarded.heads, ["a"], SHORT_S)
    inner.fails = SharedUnavailable("unreachable", "no")
    inner.go_on.set()
    wait_for(lambda: inner.answered.acquire(blocking=False))
    assert refused(guarded.heads, ["a"], 10.0) == "barred"
    wait_for(lambda: guarded.breaker == OPEN and inner.answered.acquire(blocking=False))
    assert refused(guarded.heads, ["a"], 10.0) == "barred"
    assert not inner.answered.acquire(timeout=0.05)
    inner.fails = None
    clock.advance(1)
    assert refused(guarded.heads, ["a"], 10.0) == "barred"
    wait_for(lambda: guarded.breaker == CLOSED)


def test_three_errors_in_a_row_open_it(guarded, inner):
    inner.go_on.set()
    inner.fails = SharedUnavailable("unreachable", "no")
    for _ in range(3):
        assert guarded.breaker == CLOSED
        assert refused(guarded.heads, ["a"], 10.0) == "unreachable"
    assert guarded.breaker == OPEN


def test_an_engine_with_breakers_of_its_own_gets_no_other(inner, clock):
    guarded = Guarded(inner, clock, state=lambda: HALF_OPEN)
    for _ in range(5):
        assert refused(guarded.heads, ["a"], SHORT_S) == "timeout"
    assert guarded.breaker == HALF_OPEN


def test_hung_calls_never_take_more_than_the_threads_that_there_are(inner, clock):
    before = workers()
    guarded = Guarded(inner, clock, threads=3, state=lambda: CLOSED)
    reasons = [refused(guarded.heads, ["a"], 0.001) for _ in range(100)]
    assert workers() - before == 3
    assert reasons[0] == "timeout"
    assert reasons[-1] == "busy"
    inner.go_on.set()
    guarded.close()
    wait_for(lambda: workers() == before)


def test_a_call_that_was_given_up_before_its_turn_never_reaches_the_engine(inner, clock):
    guarded = Guarded(inner, clock, threads=1, state=lambda: CLOSED)
    for _ in range(4):
        refused(guarded.heads, ["a"], 0.001)
    inner.go_on.set()
    assert guarded.heads(["b"], 10.0) == [None]
    assert inner.begun.acquire(blocking=False)
    assert inner.begun.acquire(blocking=False)
    assert not inner.begun.acquire(blocking=False)
    guarded.close()


def test_the_bytes_of_a_hung_call_stay_counted_until_it_ends(inner, clock):
    guarded = Guarded(inner, clock, state=lambda: CLOSED, in_flight_max_nbytes=1000)
    assert refused(guarded.get, ["a"], [800], SHORT_S) == "timeout"
    assert guarded.in_flight_nbytes == 800
    assert refused(guarded.get, ["a"], [300], 1000.0) == "busy"
    assert refused(guarded.put, [("a", [b"x" * 201])], 60, 1000.0) == "busy"
    assert guarded.put([("a", [b"x" * 200])], 60, 10.0) == [True]
    inner.go_on.set()
    wait_for(lambda: guarded.in_flight_nbytes == 0)
    assert guarded.get(["a"], [5000], 10.0) == [None]  # alone it may be larger than the budget
    guarded.close()


def test_whatever_an_engine_raises_is_that_the_store_is_unavailable(guarded, inner):
    inner.go_on.set()
    inner.fails = ZeroDivisionError("a bug")
    assert refused(guarded.heads, ["a"], 10.0) == "error"


def test_an_engine_that_is_barred_still_tells_its_health(guarded):
    refused(guarded.heads, ["a"], SHORT_S)
    assert guarded.health(10.0) == Health(1, 1, 0.0)


def test_after_close_every_call_is_refused(guarded, inner):
    inner.go_on.set()
    guarded.close()
    guarded.close()
    assert refused(guarded.heads, ["a"], 10.0) == "closed"
