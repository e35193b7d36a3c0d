"""Whose keys leave a tier first, where owners have lanes of their own."""

from kvstore.keys import Key
from kvstore.metadata.owner import Owner
from kvstore.tiers.order import Order

LIMITED = Owner(tenant="c", namespace="batch", lane="c/batch", limits=(10.0, 10.0, 10.0))
OTHER = Owner(tenant="a", lane="a")


def order_of(owners: dict[bytes, Owner]) -> Order:
    return Order(owner_of=lambda key: owners[key], tier="cold")


def test_a_tier_told_to_forget_a_key_of_an_owner_it_holds_nothing_of_still_evicts() -> None:
    """Each eviction after it raised KeyError: 'c/batch', so nothing could sink to a full cold tier any more."""
    order = order_of({b"never here": LIMITED, b"held": OTHER})
    order.track(Key(b"held"), owner=OTHER)
    order.count(OTHER, 5)
    order.forget(Key(b"never here"))
    assert order.used() == {"a": 5}
    assert order.victim(OTHER, 1) == b"held"
    assert order.victim(LIMITED, 1) == b"held"
    assert order.within_quota(LIMITED, 10)
    order.track(Key(b"never here"), 3, owner=LIMITED)
    assert order.used() == {"a": 5, "c": 3}
    order.forget(Key(b"never here"), 3)
    assert order.used() == {"a": 5}
