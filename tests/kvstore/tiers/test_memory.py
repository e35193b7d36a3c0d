"""A tier in memory at its limits: the last byte that fits, and the first that does not."""

import pytest
import torch

from kvstore.entries.entry import EncodedTensor, Entry, TensorSpec
from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.metadata.owner import NO_LIMITS, NOBODY, Owner
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.order import Order


def entry(name: bytes, nbytes: int = 4096) -> Entry:
    x = torch.zeros(nbytes, dtype=torch.uint8)
    return Entry(Key(name), {"x": EncodedTensor(TensorSpec("uint8", (nbytes,)), "raw", {"": x})})


ONE = entry(b"a").nbytes
"""What each of these entries takes."""


def test_an_entry_as_large_as_the_tier_is_admitted_and_held() -> None:
    tier = MemoryTier("hot", ONE)
    assert tier.admits(ONE, Key(b"a"), NOBODY)
    assert not tier.admits(ONE + 1, Key(b"a"), NOBODY)
    assert tier.has_room(ONE, Key(b"a"), NOBODY)
    assert not tier.has_room(ONE + 1, Key(b"a"), NOBODY)
    tier.put(entry(b"a"))
    assert tier.used_nbytes == tier.capacity_nbytes
    with pytest.raises(OverQuota, match="displace first"):
        tier.put(entry(b"b"))


def test_a_value_put_again_takes_the_place_of_the_old_one_and_displaces_nothing() -> None:
    tier = MemoryTier("hot", 2 * ONE)
    for name in (b"a", b"b"):
        tier.put(entry(name))
    assert tier.displace(ONE, Key(b"a")) is None
    tier.put(entry(b"a"))
    assert len(tier) == 2
    assert tier.used_nbytes == 2 * ONE
    larger = entry(b"a", 4097)
    gone = tier.displace(larger.nbytes, Key(b"a"))
    assert gone is not None
    assert gone.key == b"b"


def test_an_entry_larger_than_its_owners_quota_is_not_admitted() -> None:
    owner = Owner("t", "", "t", NO_LIMITS, (float(ONE), 0.0, 0.0))
    tier = MemoryTier("hot", 10 * ONE, order=Order(owner_of=lambda _key: owner))
    assert tier.admits(ONE, Key(b"a"), owner)
    assert not tier.admits(ONE + 1, Key(b"a"), owner)
    assert not tier.has_room(ONE + 1, Key(b"a"), owner)
    tier.put(entry(b"a"))
    assert tier.has_room(ONE, Key(b"a"), owner), "in its own place"
    assert not tier.has_room(ONE, Key(b"b"), owner)


def test_both_quotas_bound_what_is_admitted() -> None:
    """The namespace's and its tenant's."""
    for limits in (((100.0, 0.0, 0.0), NO_LIMITS), (NO_LIMITS, (100.0, 0.0, 0.0))):
        owner, order = Owner("t", "n", "t/n", *limits), Order(tier="hot")
        assert order.admits(owner, 100)
        assert not order.admits(owner, 101)
        assert order.within_quota(owner, 100)
        assert not order.within_quota(owner, 101)


def test_what_is_pinned_is_never_displaced_and_its_bytes_are_not_to_be_had() -> None:
    tier = MemoryTier("hot", 2 * ONE)
    for name in (b"a", b"b"):
        tier.put(entry(name))
    tier.pin(Key(b"a"))
    tier.pin(Key(b"a"))
    tier.pin(Key(b"absent"))
    with pytest.raises(OverQuota, match="pin_max_fraction"):
        tier.pin(Key(b"b"))
    assert tier.admits(ONE, Key(b"c"), NOBODY)
    assert not tier.admits(ONE + 1, Key(b"c"), NOBODY)
    assert tier.admits(2 * ONE, Key(b"a"), NOBODY), "put again it takes the place of what is pinned"
    gone = tier.displace(ONE, Key(b"c"))
    assert gone is not None
    assert gone.key == b"b"
    tier.put(entry(b"c"))
    tier.put(entry(b"a"))
    assert list(tier.keys())[-1] == b"a", "it is pinned still"
    tier.remove(Key(b"c"))
    with pytest.raises(OverQuota, match="are pinned"):
        tier.displace(ONE + 1, Key(b"c"))
    tier.unpin(Key(b"a"))
    tier.close()
    assert tier.used_nbytes == len(tier) == 0
