"""Tenants share the memory tiers by quota and by fairness, and see nothing of each other's keys."""

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, QuotaConfig, StoreConfig, WarmConfig, from_mapping
from kvstore.errors import ConfigError, InvalidEntry
from kvstore.store import Store

A, B = b"A" * 16, b"B" * 16
VALUE = {"x": torch.zeros(256)}


def open_store(hot_nbytes: int = 40_000, **quotas: QuotaConfig) -> Store:
    config = StoreConfig(hot=HotConfig(hot_nbytes), warm=WarmConfig(0), quotas=quotas)
    store = Store.open(config, clock=ManualClock(), background=False)
    store.register_tenant("a", [A])
    store.register_tenant("b", [B])
    return store


def held(store: Store, prefix: bytes) -> int:
    return sum(1 for _ in store.entries(key_prefix=prefix))


def test_a_tenant_that_floods_the_store_evicts_itself_first() -> None:
    with open_store() as store:
        for i in range(8):
            store.put(A + b"%d" % i, VALUE)
        for i in range(500):
            store.put(B + b"%d" % i, VALUE)
        assert held(store, A) == 8
        used = store.tenants()["hot"]
        assert used["b"] >= used["a"]


def test_two_floods_share_alike() -> None:
    with open_store() as store:
        for i in range(300):
            store.put(A + b"%d" % i, VALUE)
            store.put(B + b"%d" % i, VALUE)
        assert abs(held(store, A) - held(store, B)) <= 1


def test_a_quota_holds_while_there_is_room() -> None:
    with open_store(b=QuotaConfig(hot_nbytes=8_000)) as store:
        for i in range(50):
            store.put(B + b"%d" % i, VALUE)
        assert 0 < store.tenants()["hot"]["b"] <= 8_000
        for i in range(10):
            store.put(A + b"%d" % i, VALUE)
        assert held(store, A) == 10


def test_keys_held_before_a_tenant_is_known_are_its_own_afterwards() -> None:
    with Store.open(StoreConfig(), clock=ManualClock(), background=False) as store:
        store.put(A + b"1", VALUE, pin=True)
        store.put(A + b"2", VALUE)
        store.register_tenant("a", [A])
        assert list(store.tenants()["hot"]) == ["a"]
        assert store.delete(A + b"1", A + b"2") == 2
        assert store.tenants()["hot"] == {}


def test_a_tenant_needs_a_name_and_whole_prefixes() -> None:
    with open_store() as store:
        for name, prefix in (("", A), ("c", b"short")):
            with pytest.raises(InvalidEntry, match="prefixes of 16 bytes"):
                store.register_tenant(name, [prefix])


def test_quotas_are_read_from_a_table_by_tenant() -> None:
    config = from_mapping(StoreConfig, {"quotas": {"a": {"hot_nbytes": "1MiB"}}})
    assert config.quotas["a"] == QuotaConfig(hot_nbytes=1 << 20)
    with pytest.raises(ConfigError, match="did you mean quotas.a.hot_nbytes"):
        from_mapping(StoreConfig, {"quotas": {"a": {"hot_nbyte": 1}}})
