"""Budgets and the default TTL change while the store is open; what no longer fits sinks, or leaves the last tier."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.errors import ConfigError, OverQuota
from kvstore.store import Store

MIB = 1 << 20
HOT, WARM, COLD = 4 * MIB, 2 * MIB, 64 * MIB
COUNT = 30


@pytest.fixture
def store(tmp_path: Path):
    config = StoreConfig(HotConfig(HOT), WarmConfig(WARM), ColdConfig(str(tmp_path), capacity_nbytes=COLD))
    with Store.open(config, clock=ManualClock(), background=False) as opened:
        generator = torch.Generator().manual_seed(3)
        for i in range(COUNT):
            opened.put(b"%d" % i, {"k": torch.randn(256, 256, generator=generator)})
        yield opened


def with_budgets(store: Store, **nbytes: int) -> StoreConfig:
    config = store.config
    tiers = {name: replace(getattr(config, name), capacity_nbytes=budget) for name, budget in nbytes.items()}
    return replace(config, **tiers)


def held(store: Store) -> int:
    return sum(store.inspect(b"%d" % i) is not None for i in range(COUNT))


def test_a_smaller_budget_is_kept_at_once_and_loses_nothing_where_there_is_room_below(store):
    assert store.reconfigure(with_budgets(store, hot=MIB, warm=MIB // 4)) == [
        "hot.capacity_nbytes", "warm.capacity_nbytes",
    ]  # fmt: skip
    tiers = store.stats().tiers
    assert (tiers["hot"].capacity_nbytes, tiers["warm"].capacity_nbytes) == (MIB, MIB // 4)
    assert tiers["hot"].used_nbytes <= MIB
    assert tiers["warm"].used_nbytes <= MIB // 4
    assert held(store) == COUNT
    assert store.get(b"0") is not None


def test_a_smaller_disk_budget_evicts_what_no_longer_fits(store):
    store.drain()
    before = store.stats().tiers["cold"].used_nbytes
    store.reconfigure(with_budgets(store, hot=1, warm=0, cold=MIB))
    cold = store.stats().tiers["cold"]
    assert before > MIB >= cold.used_nbytes
    assert 0 < held(store) < COUNT
    states = [said.state for said in store.explain(*(b"%d" % i for i in range(COUNT)))]
    assert (states.count("held"), states.count("evicted")) == (held(store), COUNT - held(store))


def test_a_larger_budget_takes_more(store):
    full = store.stats().tiers["hot"].entries
    store.reconfigure(with_budgets(store, hot=2 * HOT))
    for i in range(COUNT):
        store.put(b"more %d" % i, {"k": torch.zeros(256, 256)})
    assert store.stats().tiers["hot"].entries > full
    assert store.hot_budget_nbytes == 2 * HOT


@pytest.mark.parametrize("tier", ["hot", "cold"])
def test_the_share_for_pins_goes_with_the_budget(store, tier):
    if tier == "cold":
        store.drain()
        store.reconfigure(with_budgets(store, hot=1, warm=0))
    keys = [b"%d" % i for i in range(COUNT) if (info := store.inspect(b"%d" % i)) and tier in info.tiers]
    store.reconfigure(with_budgets(store, **{tier: MIB}))
    keys = [key for key in keys if (info := store.inspect(key)) and tier in info.tiers]
    assert keys
    with pytest.raises(OverQuota, match=rf"the limit is {MIB // 2} \(pin_max_fraction\)"):
        for key in keys:
            store.pin(key)
        pytest.fail(f"{len(keys)} keys were pinned")


def test_the_default_ttl_is_that_of_later_puts(store):
    store.put(b"before", {"k": torch.zeros(4)})
    assert store.reconfigure(replace(store.config, ttl_s=10.0)) == ["ttl_s"]
    store.put(b"after", {"k": torch.zeros(4)})
    assert [store.inspect(key).ttl_left_s for key in (b"before", b"after")] == [3600.0, 10.0]


def test_a_learned_border_goes_where_the_new_budgets_put_it(tmp_path):
    config = StoreConfig(HotConfig(HOT), WarmConfig(WARM), split="auto")
    with Store.open(config, clock=ManualClock(), background=False) as store:
        store.reconfigure(with_budgets(store, hot=MIB, warm=MIB))
        store.maintain()
        tiers = store.stats().tiers
        assert tiers["hot"].capacity_nbytes + tiers["warm"].capacity_nbytes == 2 * MIB
        assert store.hot_budget_nbytes == MIB


def test_what_cannot_change_is_named_and_nothing_changes(store):
    config = replace(with_budgets(store, hot=MIB), policy="arc")
    with pytest.raises(ConfigError, match="policy cannot change while the store is open; what can: cold.capacity_nb"):
        store.reconfigure(config)
    assert store.stats().tiers["hot"].capacity_nbytes == HOT


def test_the_same_settings_change_nothing(store):
    assert store.reconfigure(store.config) == []
