"""No hold of the store's lock looks at more than a few Metas for each key of a slice, whatever a caller has put."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvstore.metadata.index
from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.errors import OverQuota
from kvstore.keys import KEYS_PER_CALL_MAX, Key
from kvstore.metadata import slices
from kvstore.metadata.meta import Meta
from kvstore.residency.state import Lock
from kvstore.store import Store

MANY = 3000
PER_HOLD = 128 * 12
"""Metas looked up in one hold: those of a slice, a dozen times each. A walk over `MANY` of them would be twice that."""
VALUE = {"k": torch.ones(1)}
ROOT = b"root"


class Index(kvstore.metadata.index.Index):
    """Counts the Metas that are looked up."""

    looked = 0

    def get(self, key: Key) -> Meta | None:  # type: ignore[override]
        Index.looked += 1
        return super().get(key)

    def __getitem__(self, key: Key) -> Meta:
        Index.looked += 1
        return super().__getitem__(key)


class Counted(Lock):
    """Notes how many were looked up in the hold that looked up most."""

    most = 0
    depth = began = 0

    def __enter__(self) -> bool:
        if not self._is_owned():
            self.began = Index.looked
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.most = max(self.most, Index.looked - self.began)
        super().__exit__(*error)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with opened(monkeypatch) as store:
        yield store


def opened(monkeypatch: pytest.MonkeyPatch, **config: Any) -> Store:
    monkeypatch.setattr("kvstore.metadata.chains.Index", Index)
    config = {"hot": HotConfig(64 << 20), "warm": WarmConfig(0), **config}
    store = Store.open(StoreConfig(**config), clock=ManualClock(), background=False)
    store._r.lock = Counted()
    return store


def wide(store: Store, count: int = MANY) -> list[bytes]:
    """A root with so many children."""
    store.put(ROOT, VALUE)
    children = [b"c%d" % n for n in range(count)]
    for child in children:
        store.put(child, VALUE, parent=ROOT)
    return children


def deep(store: Store, count: int = MANY) -> list[bytes]:
    """A chain of so many chunks, root first."""
    keys = [b"d%d" % n for n in range(count)]
    store.put_many([(key, VALUE) for key in keys], chain=True)
    return keys


def most_looked_up(store: Store, call: Callable[[], Any]) -> int:
    """Metas looked up in one hold of the lock, at most, by a call."""
    lock = store._r.lock
    assert isinstance(lock, Counted)
    lock.most = 0
    call()
    return lock.most


def test_an_unpin_of_a_root_named_in_a_whole_call_walks_no_children(store: Store) -> None:
    wide(store)
    assert most_looked_up(store, lambda: store.unpin(*[ROOT] * KEYS_PER_CALL_MAX)) <= 20


def test_a_put_over_a_root_walks_no_children(store: Store) -> None:
    wide(store)
    assert most_looked_up(store, lambda: store.put(ROOT, VALUE)) <= 20


def test_an_unpinned_root_stays_pinned_while_any_of_its_children_is(store: Store) -> None:
    children = wide(store, 50)
    store.pin(children[7], children[30])
    for child in (children[7], children[30]):
        assert store.unpin(ROOT) == 0
        assert store.unpin(child) == 1
    assert store.unpin(ROOT) == 1


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_an_eviction_looks_through_no_children_that_are_elsewhere(
    policy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with opened(monkeypatch, cold=ColdConfig(str(tmp_path)), policy=policy) as store:
        children = wide(store, 1000)
        store.demote(*children)
        room = store._r.hot.used_nbytes
        store.set_hot_capacity(room)
        assert most_looked_up(store, lambda: store.put(b"next", VALUE)) <= 60
        assert [tier.tiers[0] for tier in map(store.inspect, (ROOT, b"next")) if tier] == ["cold", "hot"]


def test_a_chunk_appended_to_a_long_chain_touches_what_is_before_it_in_slices(store: Store) -> None:
    keys = deep(store)
    call = lambda: store.put_many([(b"x", VALUE), (b"y", VALUE)], chain=True, parent=keys[-1])  # noqa: E731
    assert most_looked_up(store, call) <= PER_HOLD
    assert list(store._r.hot.keys())[-1] == keys[0], "the root ends most recently used"


def test_a_pin_at_the_end_of_a_long_chain_holds_all_of_it_and_takes_slices(store: Store) -> None:
    keys = deep(store)
    assert most_looked_up(store, lambda: store.pin(keys[-1])) <= PER_HOLD
    assert all(store._r.index[Key(key)].pinned for key in keys)
    assert most_looked_up(store, lambda: store.unpin(*keys)) <= PER_HOLD
    assert not any(store._r.index[Key(key)].pinned for key in keys)


def test_a_pin_of_a_long_chain_that_has_no_room_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(monkeypatch, pin_max_fraction=0.001) as store:
        keys = deep(store, 1000)
        with pytest.raises(OverQuota):
            store.pin(keys[-1])
        assert not any(meta.pinned or meta.pinned_children for meta in store._r.index.values())


def test_what_is_unpinned_while_a_long_chain_is_pinned_is_pinned_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = deep(store, 1000)
    pauses = 0

    def unpin_in_the_middle(_: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 12:  # the upper part is pinned, the lower part is not
            assert store.unpin(*keys) > 300

    monkeypatch.setattr(slices, "time", SimpleNamespace(sleep=unpin_in_the_middle))
    store.pin(keys[-1])
    assert pauses > 12
    assert all(store._r.index[Key(key)].pinned for key in keys)


@pytest.mark.parametrize("shape", [wide, deep])
def test_a_long_chain_is_deleted_in_slices_and_whole(store: Store, shape: Callable[[Store], list[bytes]]) -> None:
    keys = shape(store)
    first = keys[0] if shape is deep else ROOT
    before = len(store._r.index)
    assert most_looked_up(store, lambda: store.delete(first)) <= PER_HOLD
    assert not store._r.index
    assert store._r.hot.used_nbytes == 0
    assert store._r.counters.deletes == 1
    assert store._r.counters.orphaned == before - 1


def test_while_a_long_chain_is_deleted_there_are_no_orphans_and_nothing_put_into_it_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = wide(store)
    r = store._r
    seen: list[int] = []

    def look(_: float) -> None:
        seen.append(len(r.index))
        assert all(meta.parent is None or meta.parent in r.index for meta in r.index.values())
        assert store.put(b"late%d" % len(seen), VALUE, parent=ROOT)
        assert store.put(ROOT, VALUE)

    monkeypatch.setattr(slices, "time", SimpleNamespace(sleep=look))  # not of other threads
    assert store.delete(ROOT) == 1
    assert len(seen) > 10
    assert seen == sorted(seen, reverse=True)
    assert not r.index
    assert store.locate([ROOT, b"late1", children[0]]) == [None, None, None]


def test_a_root_past_its_deadline_is_gone_at_once_and_its_children_in_slices(store: Store) -> None:
    store.put(ROOT, VALUE, ttl_s=10.0)
    for n in range(MANY):
        store.put(b"c%d" % n, VALUE, parent=ROOT, ttl_s=1000.0)
    store._r.clock.advance(20.0)  # type: ignore[attr-defined]
    assert most_looked_up(store, lambda: store.get(ROOT)) <= PER_HOLD
    assert store.get(ROOT) is None
    assert store.locate([ROOT]) == [None]
    assert store.explain(ROOT)[0].state == "expired"
    assert not store.put(b"late", VALUE, parent=ROOT)
    assert store._r.counters.expirations == 1
    assert most_looked_up(store, store.maintain) <= PER_HOLD
    assert not store._r.index
    assert not store._r.leaving


def test_what_is_put_over_a_root_that_is_leaving_stays(store: Store) -> None:
    store.put(ROOT, VALUE, ttl_s=10.0)
    for n in range(MANY):
        store.put(b"c%d" % n, VALUE, parent=ROOT, ttl_s=1000.0)
    store._r.clock.advance(20.0)  # type: ignore[attr-defined]
    assert store.get(ROOT) is None
    assert store.put(ROOT, VALUE)
    store.maintain()
    assert store.get(ROOT) is not None


def test_a_call_of_expired_keys_takes_few_of_them_out_at_once(store: Store) -> None:
    keys = [b"%d" % n for n in range(MANY)]
    for key in keys:
        store.put(key, VALUE, ttl_s=10.0)
    store._r.clock.advance(20.0)  # type: ignore[attr-defined]
    assert most_looked_up(store, lambda: store.get_many(keys)) <= 512 * 12
    assert store.get_many(keys) == [None] * MANY
    assert store._r.counters.misses["expired"] == 2 * MANY  # those taken out meanwhile are known to have expired
    assert most_looked_up(store, store.maintain) <= PER_HOLD
    assert not store._r.index


@pytest.mark.parametrize("verb", ["touch", "delete", "evict", "pin", "unpin", "locate", "match", "demote"])
def test_a_call_of_many_keys_is_dealt_with_in_slices(store: Store, verb: str) -> None:
    keys = deep(store, KEYS_PER_CALL_MAX)
    call = getattr(store, verb)
    listed = verb in ("touch", "locate", "match")
    assert most_looked_up(store, lambda: call(keys) if listed else call(*keys)) <= 1024 * 4


def test_one_large_entry_takes_the_place_of_many_small_ones_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"k": torch.ones(256)}
    with opened(monkeypatch, hot=HotConfig(4 << 20)) as store:
        for n in range(1500):
            store.put(b"%d" % n, small)
        large = {"k": torch.ones((3 << 20) // 4)}
        assert most_looked_up(store, lambda: store.put(b"large", large)) <= PER_HOLD
        assert store.get(b"large") is not None
        assert store._r.hot.used_nbytes <= 4 << 20


def test_a_chunk_that_outgrows_its_pin_unpins_what_continues_it_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(monkeypatch, hot=HotConfig(8 << 20), pin_max_fraction=0.5) as store:
        keys = deep(store, 1000)
        store.pin(keys[-1])
        over = {"k": torch.ones((4 << 20) // 4)}
        assert most_looked_up(store, lambda: store.put(keys[0], over)) <= PER_HOLD
        assert not any(meta.pinned or meta.pinned_children for meta in store._r.index.values())


def test_a_pin_that_would_close_a_ring_of_a_long_chain_is_told_in_few_steps(store: Store) -> None:
    keys = deep(store)
    store.put(b"x", VALUE)
    store.put(b"y", VALUE, parent=b"x")
    assert store.put(b"x", VALUE, parent=keys[-1])
    assert store._r.index[Key(b"x")].parent == keys[-1], "two steps down show that it is no ring"
    store.put(keys[0], VALUE, parent=b"y")
    assert store._r.index[Key(keys[0])].parent is None, "a ring"


@pytest.mark.parametrize("policy", ["arc", "s3fifo"])
def test_a_policy_takes_few_steps_for_a_victim_however_often_all_were_hit(policy: str) -> None:
    from kvstore.policies import policy_named

    order = policy_named(policy)()
    keys = [Key(b"%d" % n) for n in range(20_000)]
    for key in keys:
        order.track(key)
    for _ in range(3):
        order.touch(keys)
    victims = set()
    for _ in range(50):
        victim = order.victim()
        assert victim is not None
        victims.add(victim)
        order.evict(victim)
    assert len(victims) == 50
    for key in keys[:19_000]:
        order.forget(key)
    last = order.victim()
    assert last is not None
    order.evict(last)
    assert order.ghosts <= 50 + 1  # type: ignore[attr-defined]


def test_touches_that_shorten_lives_and_puts_over_again_leave_nothing_behind(store: Store) -> None:
    keys = [b"%d" % n for n in range(50)]
    for key in keys:
        store.put(key, VALUE, ttl_s=30 * 86400.0)
    for step in range(500):
        store.touch(keys, ttl_s=30 * 86400.0 - 5000.0 * step)
        store.put(keys[0], VALUE, ttl_s=86400.0 + step)
        store.delete(keys[1])
        store.put(keys[1], VALUE, ttl_s=86400.0 + 97.0 * step)
    assert len(store._r.deadlines) == 50
    assert len(store._r.deadlines._buckets) < 64
