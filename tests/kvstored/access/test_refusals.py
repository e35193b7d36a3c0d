"""Refusals: those of one caller are sent one after another, and few of them are written down."""

from kvstored.access import refusals
from kvstored.access.refusals import ALL_S, BURST, DELAY_MAX_S, EACH_S, LINE_S, USERS_MAX, WAITING_MAX, Lines, Pace


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_caller_hears_a_few_refusals_at_once_and_the_next_ones_one_after_another():
    pace = Pace(Clock())
    assert [pace.delay_s("a") for _ in range(BURST)] == [0.0] * BURST
    waits = [pace.delay_s("a") for _ in range(100)]
    assert all(abs(wait - i * EACH_S) < EACH_S / 100 for i, wait in enumerate(waits))
    assert pace.delay_s("b") == 0.0, "another caller's refusals do not wait for these"


def test_a_caller_that_pauses_hears_its_refusals_at_once_again():
    clock = Clock()
    pace = Pace(clock)
    for _ in range(BURST + 20):
        pace.delay_s("a")
    clock.now += (BURST + 20) * EACH_S
    assert pace.delay_s("a") == 0.0


def test_callers_of_many_names_wait_for_each_other_beyond_their_first_refusals():
    pace = Pace(Clock())
    for caller in range(50):
        for _ in range(BURST):
            assert pace.delay_s(str(caller)) == 0.0
    waits = [pace.delay_s(str(caller)) for caller in range(50)]
    assert waits[-1] > 48 * ALL_S


def test_no_refusal_waits_for_longer_than_the_limit_and_not_too_many_wait():
    pace = Pace(Clock())
    assert max(pace.delay_s("a") for _ in range(10_000)) <= DELAY_MAX_S
    pace.waiting = WAITING_MAX
    assert pace.delay_s("a") == 0.0


def test_callers_that_come_and_go_are_forgotten(monkeypatch):
    monkeypatch.setattr(refusals, "CALLERS_MAX", 10)
    clock = Clock()
    pace = Pace(clock)
    for caller in range(30):
        pace.delay_s(str(caller))
    assert len(pace._free_at) <= 11, "strangers of many addresses are one"
    clock.now += 60
    pace.delay_s("new")
    assert len(pace._free_at) == 1


def test_a_kind_of_event_has_a_few_lines_a_minute_and_the_next_one_tells_how_many_had_none():
    clock = Clock()
    lines = Lines(2, clock)
    assert [lines.left_out("a") for _ in range(5)] == [0, 0, None, None, None]
    assert lines.left_out("b") == 0
    clock.now += LINE_S
    assert [lines.left_out("a") for _ in range(3)] == [3, 0, None]
    for kind in range(2 * USERS_MAX):
        lines.left_out(kind)
    assert len(lines._told) <= USERS_MAX
