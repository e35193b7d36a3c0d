"""What leaves the last tier that held it leaves whole: its chunks, its tombstone, what is counted of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.entries.entry import Entry
from kvstore.keys import CheckedKeys, Key
from kvstore.options import PutOptions
from kvstore.store import Store
from kvstore.tiers import TierName
from kvstored.access.tenant_view import TenantViews

VALUE = {"k": torch.ones(64, 64)}
T = TypeVar("T")


def in_another_thread(work: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as other:
        return other.submit(work).result(60)


def open_store(path: Path | None = None, **settings: object) -> Store:
    config = StoreConfig(
        hot=HotConfig(1 << 20),
        warm=WarmConfig(1 << 20),
        cold=ColdConfig(None if path is None else str(path)),
        **settings,  # type: ignore[arg-type]
    )
    return Store.open(config, clock=ManualClock(), background=False)


@pytest.mark.parametrize("left", ["hot", "cold"])
def test_a_chunk_that_has_left_every_tier_takes_those_along_that_continue_it(left: TierName) -> None:
    with open_store() as store:
        r, root = store._r, Key(b"a")
        store.put_many([(b"a", VALUE), (b"b", VALUE), (b"c", VALUE)], chain=True)
        with r.lock:
            assert not r.forget_if_gone(root, "evicted", left), "it is there"
            assert r.hot.remove(root)
            assert r.forget_if_gone(root, "evicted", left)
            assert not r.forget_if_gone(root, "evicted", left)
        assert not r.index
        assert len(r.hot) == 0
        states = [(at.state, at.tier) for at in store.explain(b"a", b"b", b"c")]
        assert states == [("evicted", left), ("orphaned", "hot"), ("orphaned", "hot")]


def test_a_leaf_that_has_left_every_tier_leaves_its_chain_and_a_tombstone() -> None:
    with open_store() as store:
        r = store._r
        store.put_many([(b"a", VALUE), (b"b", VALUE)], chain=True)
        store.get(b"b")
        owner = r.index[Key(b"b")].owner
        with r.lock:
            flight = r.flights.start(Key(b"b"))
            r.hot.remove(Key(b"b"))
            r.forget_if_gone(Key(b"b"), "evicted", "hot")
        assert flight is not None
        assert flight.called_off
        assert list(r.index) == [b"a"]
        assert list(r.chains.children(Key(b"a"))) == []
        assert owner.entries == 1
        gone = store.explain(b"b")[0]
        assert (gone.state, gone.tier, gone.hits) == ("evicted", "hot", 1)
        assert store.put(b"b", VALUE, parent=b"a")
        assert store.explain(b"b")[0].state == "held"


@pytest.mark.parametrize("keys", [[b"root", b"leaf"], [b"leaf", b"root"]])
def test_a_chunk_that_leaves_with_the_expired_one_it_continues_is_not_touched(keys: list[bytes]) -> None:
    """It counted as held, and its deadline was watched though it was gone: no sweep found an expired key after that."""
    with open_store(ttl_s=100.0) as store:
        clock = store._r.clock
        assert isinstance(clock, ManualClock)
        store.put_many([(b"root", VALUE), (b"leaf", VALUE)], chain=True)
        clock.advance(60)
        store.touch([b"leaf"])
        clock.advance(60)  # the root has expired, the leaf has not
        assert store.touch(keys, ttl_s=10) == 0
        assert not store._r.index
        store.put(b"other", VALUE)
        clock.advance(1000)
        store.maintain()
        assert not store._r.index
        assert len(store._r.deadlines) == 0


def test_the_first_of_some_keys_that_is_held_is_told_without_the_lock_and_without_those_that_expired() -> None:
    with open_store() as store:
        store.put(b"a", VALUE, ttl_s=10)
        store.put(b"b", VALUE, ttl_s=100)
        with store._r.lock:
            assert in_another_thread(lambda: store.first_held([b"none", b"a", b"b"])) == 1
        assert store.first_held([]) == 0
        assert store.first_held([b"none", b"other"]) == 2
        clock = store._r.clock
        assert isinstance(clock, ManualClock)
        clock.advance(11)
        assert store.first_held([b"a", b"b"]) == 1
        assert store.put(b"a", VALUE, ttl_s=10, pin=True)
        clock.advance(11)
        assert store.first_held([b"a", b"b"]) == 0
        view = TenantViews(store, bytes(32))["tenant"]
        assert view.first_held(CheckedKeys([b"a", b"b"])) == 2
        view.put_entries([Entry(Key(b"b"), store._r.hot.get(Key(b"a")).tensors)], PutOptions())  # type: ignore[union-attr]
        assert view.first_held(CheckedKeys([b"a", b"b"])) == 1


def test_only_an_automatic_split_moves_the_border() -> None:
    with open_store(split="fixed") as store:
        assert store._r.balance is None
    with open_store(split="auto") as store:
        assert store._r.balance is not None


def test_a_store_that_is_trimmed_or_demoted_says_how_many_left(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for n in range(3):
            store.put(b"%d" % n, VALUE)
        assert store._mover.trim(store._r.hot) == 0
        store._r.hot.capacity_nbytes = 2 * store._r.hot.used_nbytes // 3
        assert store._mover.trim(store._r.hot) == 1
        assert store.stats().tiers["hot"].demotions == 1
        assert store.set_hot_capacity(store._r.hot.used_nbytes) == 0, "all of it fits"
        assert store.set_hot_capacity(store._r.hot.used_nbytes - 1) == 1


def test_a_damaged_record_is_dropped_pinned_or_not(tmp_path: Path) -> None:
    """Once, and counted: a second get finds nothing to read."""
    with open_store(tmp_path) as store:
        for key in (b"pinned", b"plain"):
            store.put(key, VALUE, fidelity="exact")
            store.demote(key)
        store.pin(b"pinned")
        assert store._r.cold is not None
        store._r.cold.flush()
        for segment in tmp_path.glob("**/*.seg"):
            segment.write_bytes(bytes(segment.stat().st_size))
        for n, key in enumerate((b"pinned", b"plain"), start=1):
            assert store.get(key) is None
            assert store.stats().values["cold_corrupt_total"] == n
            assert store.locate([key]) == [None]
            assert store.explain(key)[0].state == "corrupt"
            assert store.get(key) is None
        assert store.stats().values["cold_corrupt_total"] == 2
        assert store.stats().values["entries"] == 0


def test_a_lossy_copy_in_hot_goes_with_the_encoded_form_that_the_disk_drops(tmp_path: Path) -> None:
    """Else it would be encoded a second time when it sinks, and its bytes would no longer be those of the first."""
    with open_store(tmp_path) as store:
        r, key = store._r, Key(b"k")
        store.put(b"k", {"k": torch.randn(64, 64)})
        store.demote(b"k")
        store.demote(b"k")
        assert store.promote(b"k") == 1
        entry = r.hot.get(key)
        assert entry is not None
        assert entry.lossy
        assert r.cold is not None
        r.cold.wait(r.cold.queue_removal(key))
        assert key in r.hot
        r.dropped_from_cold(key, "evicted")
        assert key not in r.hot
        assert key not in r.index
