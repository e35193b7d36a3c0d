"""Tenants and namespaces share every tier by quota and by fairness, and see nothing of each other's keys."""

from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, QuotaConfig, StoreConfig, WarmConfig, from_mapping
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


def open_cold(path: Path, cold_nbytes: int = 1 << 20, **config: object) -> Store:
    """Hot holds one entry of 16 KiB, the disk a few dozen."""
    made = StoreConfig(
        hot=HotConfig(20_000), warm=WarmConfig(0), cold=ColdConfig(str(path), capacity_nbytes=cold_nbytes), **config
    )  # type: ignore[arg-type]
    store = Store.open(made, clock=ManualClock(), background=False, tenants={"a": [A], "b": [B]})
    assert store.tenants()["cold"].keys() <= {"a", "b", ""}
    return store


LARGE = {"x": torch.randn(4096, generator=torch.Generator().manual_seed(3))}


def flood(store: Store, prefix: bytes, count: int, namespace: str = "") -> None:
    for i in range(count):
        store.put(prefix + b"%d" % i, LARGE, fidelity="exact", namespace=namespace)


def test_a_tenant_that_floods_the_disk_evicts_itself_first(tmp_path: Path) -> None:
    with open_cold(tmp_path) as store:
        flood(store, A, 8)
        flood(store, B, 200)
        assert held(store, A) == 8
        used = store.tenants()["cold"]
        assert used["b"] > used["a"] > 7 * 16_384
        store.drain()  # what was estimated is known now
        assert sum(store.tenants()["cold"].values()) == store.stats().tiers["cold"].used_nbytes


def test_a_quota_holds_on_the_disk_while_there_is_room(tmp_path: Path) -> None:
    with open_cold(tmp_path, quotas={"b": QuotaConfig(cold_nbytes=150_000)}) as store:
        flood(store, B, 40)
        flood(store, A, 10)
        store.drain()
        used = store.tenants()["cold"]
        assert 100_000 < used["b"] <= 150_000
        assert held(store, A) == 10
        assert sum(used.values()) == store.stats().tiers["cold"].used_nbytes


def test_after_a_restart_each_record_is_still_its_tenants_and_its_namespaces(tmp_path: Path) -> None:
    quotas = {"model": QuotaConfig(cold_nbytes=120_000)}
    with open_cold(tmp_path, namespaces=quotas) as store:
        flood(store, A, 4, "model@1234")
        flood(store, B, 3)
        store.drain()
        before = store.tenants()["cold"]
    with open_cold(tmp_path, namespaces=quotas) as store:
        assert store.tenants()["cold"] == before
        values = store.stats().values
        assert values["namespace_entries_a/model@1234"] == 4
        assert values["namespace_nbytes_a/model@1234"] == before["a"]
        for i in range(30):
            store.put(A + b"new%d" % i, LARGE, fidelity="exact", namespace="model@1234")
        assert store.stats().values["namespace_nbytes_a/model@1234"] <= 120_000 + 20_000  # and one in hot
        assert held(store, B) == 3


def test_a_tenant_registered_late_is_charged_for_what_it_holds_on_the_disk(tmp_path: Path) -> None:
    config = StoreConfig(hot=HotConfig(20_000), warm=WarmConfig(0), cold=ColdConfig(str(tmp_path)))
    with Store.open(config, clock=ManualClock(), background=False) as store:
        flood(store, A, 3)
        store.pin(A + b"0")
        store.drain()
        store.register_tenant("a", [A])
        assert list(store.tenants()["cold"]) == ["a"]
        assert store.tenants()["cold"]["a"] == store.stats().tiers["cold"].used_nbytes
        assert store.delete(A + b"0", A + b"1", A + b"2") == 3
        assert store.tenants()["cold"] == {}


def test_a_namespaces_quota_is_kept_by_evicting_from_that_namespace() -> None:
    config = StoreConfig(hot=HotConfig(100_000), warm=WarmConfig(0), namespaces={"big": QuotaConfig(hot_nbytes=20_000)})
    with Store.open(config, clock=ManualClock(), background=False) as store:
        for i in range(10):
            store.put(b"small%d" % i, VALUE, namespace="small@1")
        for i in range(100):
            store.put(b"big%d" % i, VALUE, namespace="big@1")
        values = store.stats().values
        assert 15_000 < values["namespace_nbytes_big@1"] <= 20_000
        assert values["namespace_entries_small@1"] == 10
        assert sum(1 for _ in store.entries(key_prefix=b"big")) == values["namespace_entries_big@1"]


def test_a_tenants_quota_covers_all_its_namespaces_together() -> None:
    config = StoreConfig(
        hot=HotConfig(200_000),
        warm=WarmConfig(0),
        quotas={"a": QuotaConfig(hot_nbytes=40_000)},
        namespaces={"x": QuotaConfig(hot_nbytes=30_000)},
    )
    with Store.open(config, clock=ManualClock(), background=False, tenants={"a": [A]}) as store:
        for i in range(60):
            store.put(A + b"x%d" % i, VALUE, namespace="x")
            store.put(A + b"y%d" % i, VALUE, namespace="y")
        values = store.stats().values
        assert values["namespace_nbytes_a/x"] <= 30_000
        assert 30_000 < values["tenant_nbytes_a"] <= 40_000
        assert values["namespace_entries_a/y"] > 0


def test_a_chunk_is_counted_under_its_parents_namespace() -> None:
    with Store.open(StoreConfig(), clock=ManualClock(), background=False) as store:
        store.put_many([(b"root", VALUE), (b"next", VALUE)], chain=True, namespace="one")
        store.put(b"third", VALUE, parent=b"next", namespace="two")
        assert store.get(b"third") is not None
        values = store.stats().values
        assert values["namespace_entries_one"] == 3
        assert values["namespace_hits_one"] == 1
        assert "namespace_entries_two" not in values


def test_stats_name_each_tenant_and_only_the_hottest_namespaces() -> None:
    with open_store(hot_nbytes=1 << 20) as store:
        for i in range(30):
            store.put(A + b"%d" % i, VALUE, namespace=f"n{i:02}")
        for i in range(20):
            store.get(A + b"%d" % i)
        values = store.stats().values
        assert values["tenant_entries_a"] == 30
        assert values["tenant_hits_a"] == 20
        assert values["tenant_nbytes_a"] == store.stats().tiers["hot"].used_nbytes
        assert values["tenant_nbytes_b"] == 0
        shown = [name for name in values if name.startswith("namespace_nbytes_")]
        assert len(shown) == 16
        assert all(values[name.replace("nbytes", "hits")] == 1 for name in shown)


def test_accounts_agree_with_the_tiers_after_any_mixture_of_verbs(tmp_path: Path) -> None:
    import random

    rng = random.Random(5)
    config = {"quotas": {"a": QuotaConfig(hot_nbytes=15_000, cold_nbytes=300_000)}, "namespaces": {"n": QuotaConfig()}}
    with open_cold(tmp_path, cold_nbytes=1 << 20, **config) as store:
        for step in range(600):
            key = rng.choice([A, B, b"-" * 16]) + b"%d" % rng.randrange(40)
            value = {"x": LARGE["x"][: rng.choice([64, 1024, 4096])]}
            verb = rng.randrange(8)
            if verb < 4:
                store.put(key, value, namespace=rng.choice(["", "n", "m"]))
            elif verb == 4:
                store.get(key)
            elif verb == 5:
                store.delete(key)
            elif verb == 6:
                (store.unpin if step % 2 else store.demote)(key)
            else:
                store.evict(key)
        store.drain()
        stats, tenants = store.stats(), store.tenants()
        for tier, found in stats.tiers.items():
            assert sum(tenants[tier].values()) == found.used_nbytes
        assert sum(owner.entries for owner in store._r.tenants) == stats.values["entries"]
        for tier in (store._r.hot, store._r.warm, store._r.cold):
            assert tier is not None
            assert len(tier) == len(list(tier.keys()))


def test_a_namespaces_name_is_short_and_printable() -> None:
    with Store.open(StoreConfig(), clock=ManualClock(), background=False) as store:
        for name in ("x" * 97, "a\nb"):
            with pytest.raises(InvalidEntry, match="at most 96 bytes of printable text"):
                store.put(b"k", VALUE, namespace=name)


def test_a_caller_who_invents_namespaces_without_end_is_counted_under_none() -> None:
    from kvstore.keys import Key
    from kvstore.metadata.tenants import OWNERS_MAX, Tenants

    tenants = Tenants({}, {})
    for i in range(OWNERS_MAX):
        tenants.owner(Key(b"k"), f"n{i}").entries = 1
    assert tenants.owner(Key(b"k"), "one more").namespace == ""
    tenants.owner(Key(b"k"), "n7").entries = 0
    assert tenants.owner(Key(b"k"), "one more").namespace == "one more"  # the idle one made room


def test_past_the_limit_a_namespace_with_a_codec_policy_keeps_it() -> None:
    """It was counted under none, and so encoded by the store's own codec."""
    from kvstore.keys import Key
    from kvstore.metadata.tenants import OWNERS_MAX, Tenants

    tenants = Tenants({}, {}, {"model", "whole@name"})
    for i in range(OWNERS_MAX):
        tenants.owner(Key(b"k"), f"n{i}").entries = 1
    for asked, counted in (("model@digest", "model"), ("model", "model"), ("whole@name", "whole@name"), ("m@x", "")):
        assert tenants.owner(Key(b"k"), asked).namespace == counted
    before = len(list(tenants))
    for i in range(100):
        tenants.owner(Key(b"k"), f"model@{i}").entries = 1
    assert len(list(tenants)) == before


@pytest.mark.parametrize("verb", ["put", "put_many", "a chain", "with a parent"])
def test_the_namespace_of_a_put_reaches_its_codec_policy(verb: str) -> None:
    policy = {"warm": {"codec": "nf4-kv", "namespaces": {"model": {"codec": "int8"}}}}
    tensors = {"k": torch.randn(2, 64, 2, 32, generator=torch.Generator().manual_seed(3))}
    with Store.open(from_mapping(StoreConfig, policy), background=False) as store:
        if verb == "put":
            store.put(b"k", tensors, namespace="model@digest")
        elif verb == "with a parent":  # its namespace is the parent's
            store.put(b"root", tensors, namespace="model@digest")
            store.put(b"k", tensors, parent=b"root", namespace="another")
        else:
            store.put_many([(b"k", tensors)], namespace="model@digest", chain=verb == "a chain")
        store.put(b"other", tensors)
        store.demote(b"k", b"other")
        assert [store.get(key).encoding for key in (b"k", b"other")] == ["int8", "nf4-kv"]
