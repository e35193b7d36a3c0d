"""What every policy promises the tiers."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.config import POLICIES
from kvstore.keys import Key
from kvstore.policies import Policy, policy_named


@pytest.fixture(params=POLICIES)
def factory(request: pytest.FixtureRequest) -> Callable[[], Policy]:
    return policy_named(request.param)


def keys(*names: str) -> list[Key]:
    return [Key(name.encode()) for name in names]


def test_an_empty_policy_has_no_victim(factory: Callable[[], Policy]) -> None:
    policy = factory()
    assert policy.victim() is None
    assert len(policy) == 0
    assert list(policy) == []


def test_a_victim_is_still_tracked_until_it_is_evicted_or_forgotten(factory: Callable[[], Policy]) -> None:
    policy = factory()
    for key in keys("a", "b", "c"):
        policy.track(key)
    victim = policy.victim()
    assert victim == b"a"
    assert victim in policy
    assert policy.victim() == victim
    policy.evict(victim)
    assert victim not in policy
    assert policy.victim() == b"b"
    policy.forget(Key(b"b"))
    assert policy.victim() == b"c"
    assert len(policy) == 1


def test_keys_never_used_again_leave_in_the_order_they_came(factory: Callable[[], Policy]) -> None:
    policy = factory()
    for i in range(50):
        policy.track(Key(b"%d" % i))
    left = []
    while (victim := policy.victim()) is not None:
        policy.evict(victim)
        left.append(victim)
    assert left == [b"%d" % i for i in range(50)]


def test_a_key_that_was_used_outlives_its_neighbours(factory: Callable[[], Policy]) -> None:
    policy = factory()
    for i in range(50):
        policy.track(Key(b"%d" % i))
    assert policy.touch(keys("unknown", "7")) == [b"7"]
    for _ in range(40):
        victim = policy.victim()
        assert victim is not None
        policy.evict(victim)
    assert Key(b"7") in policy


def test_an_unknown_key_is_no_error(factory: Callable[[], Policy]) -> None:
    policy = factory()
    assert policy.touch([Key(b"unknown")]) == []
    for verb in (policy.forget, policy.evict):
        verb(Key(b"unknown"))
    assert len(policy) == 0


def test_tracking_a_known_key_counts_as_use(factory: Callable[[], Policy]) -> None:
    policy = factory()
    for key in keys("a", "b", "a"):
        policy.track(key)
    assert len(policy) == 2
    assert policy.victim() == b"b"


def test_a_forgotten_key_comes_back_as_a_stranger(factory: Callable[[], Policy]) -> None:
    """Deleting must not leave a ghost: it would tell one tenant that another had the key."""
    fresh, policy = factory(), factory()
    for p in (fresh, policy):
        for i in range(20):
            p.track(Key(b"%d" % i))
    policy.touch([Key(b"x")])
    policy.track(Key(b"x"))
    policy.evict(Key(b"x"))
    policy.forget(Key(b"x"))
    for p in (fresh, policy):
        p.track(Key(b"x"))
    assert list(fresh) == list(policy)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(POLICIES),
    steps=st.lists(
        st.tuples(st.sampled_from(["track", "touch", "forget", "evict", "victim"]), st.integers(0, 15)), max_size=120
    ),
)
def test_a_policy_tracks_exactly_what_it_was_told_and_bounds_its_ghosts(
    name: str, steps: list[tuple[str, int]]
) -> None:
    policy = policy_named(name)()
    expected: set[Key] = set()
    most = 0
    for verb, number in steps:
        key = Key(b"%d" % number)
        if verb == "victim":
            victim = policy.victim()
            assert (victim in expected) if expected else victim is None
            if victim is not None:
                policy.evict(victim)
                expected.discard(victim)
            continue
        getattr(policy, verb)(key)
        if verb == "track":
            expected.add(key)
        elif verb != "touch":
            expected.discard(key)
        most = max(most, len(expected))
        assert set(policy) == expected
        assert len(policy) == len(expected)
        assert all(key in policy for key in expected)
        assert getattr(policy, "ghosts", 0) <= most
