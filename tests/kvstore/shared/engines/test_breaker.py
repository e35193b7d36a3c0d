"""When a server that failed is asked again, on a clock that the test moves."""

import pytest

from kvstore.clock import ManualClock
from kvstore.shared.breaker import CLOSED, HALF_OPEN, OPEN, PAUSE_MAX_S, Breaker


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock)


def opened(breaker):
    for _ in range(3):
        breaker.failed()
    return breaker


def test_it_opens_at_the_third_failure_in_a_row(breaker):
    assert not breaker.failed()
    assert not breaker.failed()
    breaker.succeeded()
    assert not breaker.failed()
    assert not breaker.failed()
    assert breaker.closed
    assert breaker.failed()
    assert breaker.state == OPEN


def test_a_hang_opens_it_at_once_and_the_first_probe_is_due_at_once(breaker):
    assert breaker.failed(hung=True)
    assert not breaker.closed
    assert breaker.due_s() == 0
    assert breaker.take_probe()


def test_one_probe_is_taken_after_the_pause_and_its_success_closes(breaker, clock):
    opened(breaker)
    assert breaker.due_s() == 1
    clock.advance(0.999)
    assert not breaker.take_probe()
    clock.advance(0.001)
    assert breaker.take_probe()
    assert breaker.state == HALF_OPEN
    assert not breaker.take_probe()
    assert breaker.due_s() is None
    assert breaker.succeeded()
    assert breaker.state == CLOSED


@pytest.mark.parametrize("hung", [False, True])
def test_the_pause_doubles_from_one_second_to_thirty_and_begins_anew_after_a_success(breaker, clock, hung):
    if hung:
        breaker.failed(hung=True)
    else:
        opened(breaker)
        clock.advance(1)
    pauses = []
    for _ in range(7):
        assert breaker.take_probe()
        breaker.probe_failed()
        pauses.append(breaker.due_s())
        clock.advance(pauses[-1])
    assert pauses == ([1, 2, 4, 8, 16, 30, 30] if hung else [2, 4, 8, 16, 30, 30, 30])
    assert pauses[-1] == PAUSE_MAX_S
    breaker.succeeded()
    opened(breaker)
    assert breaker.due_s() == 1


def test_stragglers_do_not_prolong_the_pause(breaker, clock):
    opened(breaker)
    clock.advance(0.5)
    for _ in range(10):
        assert not breaker.failed(hung=True)
    assert breaker.due_s() == 0.5


def test_a_late_success_of_a_call_closes_it_while_a_probe_is_on_its_way(breaker, clock):
    opened(breaker)
    clock.advance(1)
    assert breaker.take_probe()
    assert breaker.succeeded()
    breaker.probe_failed()
    assert breaker.state == CLOSED
