"""What is spread over many dictionaries behaves as one, and no step of it is long."""

import random
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.keys import Key
from kvstore.metadata.index import SPREAD_PARTS, Spread, hashes_of
from kvstore.policies import lru
from kvstore.policies.lru import KeyOrder

keys = st.integers(0, 60).map(lambda n: Key(b"%d" % n))


class KeyOrderMachine(RuleBasedStateMachine):
    """A KeyOrder whose parts hold three keys, against an OrderedDict."""

    def __init__(self) -> None:
        super().__init__()
        self.order, self.model = KeyOrder(), OrderedDict()  # type: ignore[var-annotated]

    @rule(key=keys)
    def append(self, key: Key) -> None:
        self.order.append(key)
        self.model[key] = None
        self.model.move_to_end(key)

    @rule(key=keys)
    def prepend(self, key: Key) -> None:
        self.order.prepend(key)
        self.model[key] = None
        self.model.move_to_end(key, last=False)

    @rule(some=st.lists(keys, unique=True))
    def extend(self, some: list[Key]) -> None:
        new = [key for key in some if key not in self.model]
        random.Random(len(some)).shuffle(some)
        rows = np.array([some.index(key) for key in new], np.int64)
        self.order.extend(some, rows, hashes_of(some))
        self.model.update(dict.fromkeys(new))

    @rule(some=st.lists(keys))
    def touch(self, some: list[Key]) -> None:
        known = [key for key in some if key in self.model]
        for key in known:
            self.model.move_to_end(key)
        assert self.order.touch(some) == known

    @rule(key=keys)
    def discard(self, key: Key) -> None:
        assert self.order.discard(key) == (self.model.pop(key, 0) is None)

    @rule()
    def pop_first(self) -> None:
        self.order.pop_first()
        if self.model:
            self.model.popitem(last=False)

    @invariant()
    def is_the_same(self) -> None:
        assert self.order.first() == next(iter(self.model), None)
        assert list(self.order) == self.order.keys_now() == list(self.model)
        assert len(self.order) == len(self.model)
        assert all((key in self.order) == (key in self.model) for key in (Key(b"%d" % n) for n in range(61)))
        assert len(self.order._heads) <= 2 * len(self.order._parts) + 9


TestKeyOrder = KeyOrderMachine.TestCase
TestKeyOrder.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


class TestShortParts(TestKeyOrder):
    """The same with parts that divide all the time."""

    def setUp(self) -> None:
        super().setUp()
        self.before, lru.PART_MAX = lru.PART_MAX, 3

    def tearDown(self) -> None:
        lru.PART_MAX = self.before
        super().tearDown()


def test_no_part_of_an_order_is_long_however_it_grew() -> None:
    some = [Key(random.Random(1).randbytes(8) + b"%d" % n) for n in range(40_000)]
    one_by_one, at_once = KeyOrder(), KeyOrder()
    for key in some:
        one_by_one.append(key)
    at_once.extend(some[::-1], np.arange(len(some))[::-1], hashes_of(some[::-1]))
    assert at_once.keys_now() == some
    assert at_once._parts.count(None) > 10, "nobody needed them"
    assert at_once.first() == some[0]
    for order in (one_by_one, at_once):
        assert max(len(part or ()) for part in order._parts) < 3 * lru.PART_MAX
        assert list(order) == some
        assert order.first() == some[0]
    at_once.append(some[0])
    at_once.append(Key(b"new"))
    assert at_once.keys_now() == [*some[1:], some[0], b"new"]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_an_order_that_a_restart_found_goes_on_dividing_its_parts(parts: int) -> None:
    """Of one with two, four or eight parts none was divided any more: instead an empty one was added at times."""
    found = [Key(b"%d" % n) for n in range(parts * lru.PART_MAX)]
    order = KeyOrder()
    order.extend(found, np.arange(len(found)), hashes_of(found))
    added = [Key(b"new%d" % n) for n in range(3 * len(found))]
    for key in added:
        order.append(key)
    assert max(len(part or ()) for part in order._parts) < 3 * lru.PART_MAX
    assert order._number == -(-len(found + added) // lru.PART_MAX)
    assert list(order) == order.keys_now() == found + added


def test_values_are_spread_evenly() -> None:
    spread: Spread[int] = Spread()
    for n in range(SPREAD_PARTS * 100):
        spread[Key(b"%d" % n)] = n
    assert max(map(len, spread._parts)) < 200
    assert sorted(spread.values()) == list(range(SPREAD_PARTS * 100))
    assert set(spread) == set(spread.keys_now()) == set(spread.keys())
    assert (spread.get(Key(b"5")), spread.take(Key(b"5")), spread.take(Key(b"5")), spread.get(Key(b"5"))) == (
        5, 5, None, None,
    )  # fmt: skip
    del spread[Key(b"6")]
    assert Key(b"6") not in spread
    assert len(spread) == SPREAD_PARTS * 100 - 2
    spread.clear()
    assert not spread
