"""No counter and no gauge of a store is ever negative, and counters only grow, whatever is done to it."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.errors import KvstoreError
from kvstore.lookup import ELSEWHERE, Lookup
from kvstore.store import Store

KEYS = [b"a", b"b", b"c", b"d", b"e"]
GROWING = ("gets", "misses", "puts", "evictions", "expirations", "lookup_keys", "lookup_tokens", "prefill_saved_s")
SAID = st.sampled_from([None, ELSEWHERE, Lookup(2, 32, 16), Lookup(0, 0, 16), Lookup(1, 1, 1 << 30)])


def damage(store: Store) -> None:
    """Spoil what lies on disk."""
    store.drain()
    for path in Path(store.config.cold.path).glob("segments/*"):
        data = path.read_bytes()
        path.write_bytes(data[:64] + bytes(len(data[64:])))


VERBS = {
    "put": lambda store, keys, said, clock: [store.put(key, {"x": torch.randn(30_000)}, ttl_s=5) for key in keys],
    "chain": lambda store, keys, said, clock: store.put_many([(k, {"x": torch.ones(9)}) for k in keys], chain=True),
    "get": lambda store, keys, said, clock: store.get_many(keys, lookup=said),
    "leading": lambda store, keys, said, clock: store.get_many(keys, leading=True, lookup=said),
    "match": lambda store, keys, said, clock: store.match(keys, lookup=said),
    "locate": lambda store, keys, said, clock: store.locate(keys, lookup=said),
    "delete": lambda store, keys, said, clock: store.delete(*keys),
    "evict": lambda store, keys, said, clock: store.evict(*keys),
    "demote": lambda store, keys, said, clock: store.demote(*keys),
    "promote": lambda store, keys, said, clock: store.promote(*keys),
    "pin": lambda store, keys, said, clock: store.pin(*keys),
    "unpin": lambda store, keys, said, clock: store.unpin(*keys),
    "wait": lambda store, keys, said, clock: clock.advance(3),
    "later": lambda store, keys, said, clock: clock.advance(100),
    "maintain": lambda store, keys, said, clock: store.maintain(),
    "report": lambda store, keys, said, clock: store.report(prefill_saved_s=1.5),
    "shrink": lambda store, keys, said, clock: store.set_hot_capacity(100_000),
    "damage": lambda store, keys, said, clock: damage(store),
}
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(VERBS)), st.lists(st.sampled_from(KEYS), min_size=1, max_size=5), SAID),
    min_size=5, max_size=40,
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, budget=st.sampled_from([0, 100_000, 1 << 30]))
def test_no_number_is_negative_after_any_operations(steps: list, budget: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kvn-") as folder:
        clock = ManualClock()
        cold = ColdConfig(path=folder, capacity_nbytes=1 << 20, write_nbytes_per_day=budget)
        config = StoreConfig(hot=HotConfig(400_000), warm=WarmConfig(60_000), cold=cold)
        with Store.open(config, clock=clock, background=False) as store:
            before: dict[str, float] = {}
            for name, keys, said in steps:
                try:
                    VERBS[name](store, keys, said, clock)
                except KvstoreError:
                    continue
                stats = store.stats()
                numbers = dict(stats.values) | {
                    f"{tier}.{field}": getattr(of, field) for tier, of in stats.tiers.items() for field in of.__slots__
                }
                assert {key: value for key, value in numbers.items() if value < 0} == {}, name
                assert [key for key in GROWING if numbers[key] < before.get(key, 0)] == [], name
                assert numbers["hit_ratio"] <= 1 >= numbers["token_hit_ratio"]
                before = numbers


def test_the_write_budget_left_is_zero_where_there_is_none_and_where_it_is_overdrawn() -> None:
    for budget in (0, 1000):
        with tempfile.TemporaryDirectory(prefix="kvn-") as folder:
            cold = ColdConfig(path=folder, write_nbytes_per_day=budget)
            with Store.open(StoreConfig(cold=cold), clock=ManualClock(), background=False) as store:
                store.put(b"key", {"x": torch.randn(30_000)}, pin=True)
                store.drain()
                assert store.stats().values["cold_bytes_written"] > budget
                assert store.stats().values["cold_write_left_nbytes"] == 0
