"""Pins of tenants: each has a share of what may be pinned, whoever comes first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig
from kvstore.errors import OverQuota
from kvstore.store import Store

A, B = b"a" * 16, b"b" * 16
VALUE = {"k": torch.ones(64 << 10, dtype=torch.uint8)}


@pytest.fixture(params=["hot", "cold"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    config = StoreConfig(hot=HotConfig(4 << 20), cold=ColdConfig(str(tmp_path), capacity_nbytes=4 << 20))
    with Store.open(config, clock=ManualClock(), background=False, tenants={"a": [A], "b": [B]}) as store:
        for tenant in (A, B):
            for n in range(20):
                store.put(tenant + b"%d" % n, VALUE, fidelity="exact")
        if request.param == "cold":
            store.demote(*[tenant + b"%d" % n for tenant in (A, B) for n in range(20)])
        yield store


def pinned(store: Store, tenant: bytes) -> int:
    """How many of a tenant's keys can be pinned."""
    for n in range(20):
        try:
            store.pin(tenant + b"%d" % n)
        except OverQuota:
            return n
    return 20


def test_a_tenant_that_pins_all_it_can_leaves_another_one_as_much(store: Store) -> None:
    first = pinned(store, A)
    assert 10 <= first <= 16, "half of the half that may be pinned"
    with pytest.raises(OverQuota, match="'a' in the (hot|cold) tier, the share of each of 2 is 1048576 of 2097152"):
        store.pin(A + b"19")
    assert pinned(store, B) == first


def test_what_a_tenant_unpins_or_deletes_it_may_pin_again(store: Store) -> None:
    first = pinned(store, A)
    assert store.unpin(A + b"0") == 1
    store.pin(A + b"19")
    with pytest.raises(OverQuota):
        store.pin(A + b"18")
    store.delete(A + b"19")
    store.pin(A + b"18")
    with pytest.raises(OverQuota):
        store.pin(A + b"17")
    assert first


def test_without_tenants_all_of_the_limit_is_everybodys(tmp_path: Path) -> None:
    config = StoreConfig(hot=HotConfig(4 << 20), cold=ColdConfig(str(tmp_path)))
    with Store.open(config, clock=ManualClock(), background=False) as store:
        for n in range(40):
            store.put(b"%d" % n, VALUE)
        for n in range(20):
            store.pin(b"%d" % n)
