"""What a restored prefix saved: from prefills that were timed, never from a guess."""

import pytest

from kvstored_client.integrations.prefill_time import TIMED_TOKENS, PrefillTime


class Clock:
    """A clock of ours."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_prompt_restored_saves_what_one_of_its_length_took_less_the_restoring():
    time = PrefillTime()
    time.observe(1, 1000, 2.0)
    assert time.restored(1, 1020, 500, spent_s=0.25) == pytest.approx(0.75)
    assert time.saved_s == pytest.approx(0.75)


def test_a_restore_slower_than_the_prefill_saves_nothing_and_costs_nothing():
    time = PrefillTime()
    time.observe(1, 100, 0.1)
    assert time.restored(1, 100, 100, spent_s=5.0) == 0
    assert time.saved_s == 0


def test_the_fastest_prefill_of_a_class_counts_and_each_class_has_its_own():
    time = PrefillTime()
    for seconds in (60.0, 1.0, 3.0):
        time.observe(1, 1000, seconds)
    time.observe(1, 8000, 40.0)
    assert time.per_position_s(1, 900) == pytest.approx(0.001)
    assert time.per_position_s(1, 8100) == pytest.approx(0.005)


def test_a_length_not_seen_is_taken_from_the_nearest_shorter_one():
    time = PrefillTime()
    time.observe(1, 100, 0.1)
    time.observe(1, 8000, 40.0)
    assert time.per_position_s(1, 2000) == pytest.approx(0.001)
    assert time.per_position_s(1, 50) == pytest.approx(0.001)
    assert time.per_position_s(4, 50) is None  # another batch


def test_where_only_hits_were_seen_one_short_prefill_is_timed_once():
    clock, lengths = Clock(), []

    def prefill(tokens):
        lengths.append(tokens)
        clock.now += 0.01 * tokens

    time = PrefillTime(clock)
    for _ in range(3):
        assert time.restored(1, 4000, 1000, 1.0, prefill) == pytest.approx(9.0)
    assert lengths == [TIMED_TOKENS]
    assert time.restored(2, 10, 8, 0.0, prefill) == 0  # too short to tell: asked once, and not again
    assert time.restored(2, 10, 8, 0.0, prefill) == 0
    assert lengths == [TIMED_TOKENS, 10]


def test_without_a_prefill_nothing_is_claimed():
    time = PrefillTime()
    assert time.restored(1, 1000, 900, 0.0) == 0
    time.observe(1, 8, 1.0)  # a step, not a prefill
    assert time.restored(1, 1000, 900, 0.0) == 0
