"""The circuit breaker, on a clock of its own."""

from kvstored_client.breaker import FAILURES_TO_OPEN, PAUSE_MAX_S, PAUSE_MIN_S, Breaker


class Time:
    """A clock set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def opened(time):
    breaker = Breaker(clock=time, jitter=lambda: 1.0)
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.allow(1)
        breaker.failed()
    return breaker


def test_it_opens_after_three_failures_in_a_row_and_not_before():
    breaker = Breaker(clock=Time())
    assert [breaker.failed() for _ in range(FAILURES_TO_OPEN)] == [False, False, True]
    assert breaker.is_open
    assert not breaker.allow(1)


def test_a_success_between_failures_starts_the_count_anew():
    breaker = Breaker(clock=Time())
    for _ in range(10):
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open


def test_one_probe_passes_after_the_pause_and_its_success_closes():
    time = Time()
    breaker = opened(time)
    time.now += PAUSE_MIN_S * 1.01
    assert [breaker.allow(5), breaker.allow(5), breaker.allow(5)] == [True, False, False]
    assert breaker.succeeded()
    assert not breaker.is_open
    assert breaker.allow(5)


def test_each_failed_probe_makes_the_pause_longer_up_to_a_cap():
    time = Time()
    breaker = opened(time)
    pauses = []
    for _ in range(12):
        start = time.now
        while not breaker.allow(5):
            time.now += 0.05
        pauses.append(time.now - start)
        assert not breaker.failed()
    assert pauses == sorted(pauses)
    assert pauses[0] < 2 * PAUSE_MIN_S
    assert PAUSE_MAX_S - 0.1 < pauses[-1] < PAUSE_MAX_S + 0.1


def test_the_pause_is_jittered_by_half():
    time = Time()
    breaker = Breaker(clock=time, jitter=lambda: 0.0)
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed()
    time.now += PAUSE_MIN_S * 0.51
    assert breaker.allow(1)


def test_a_probe_that_never_reports_does_not_close_the_door_for_good():
    time = Time()
    breaker = opened(time)
    time.now += PAUSE_MIN_S * 1.01
    assert breaker.allow(5)
    time.now += 5.01
    assert breaker.allow(5)


def test_stragglers_from_before_do_not_lengthen_the_pause():
    time = Time()
    breaker = opened(time)
    for _ in range(20):
        breaker.failed()
    time.now += PAUSE_MIN_S * 1.01
    assert breaker.allow(1)
