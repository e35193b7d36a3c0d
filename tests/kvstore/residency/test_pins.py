"""Pins: the later end wins, the prefix is held with its end, and what cannot be held whole is not held at all."""

from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig
from kvstore.errors import OverQuota
from kvstore.keys import Key
from kvstore.store import Store

VALUE = {"k": torch.ones(64, 64)}


def open_store(path: Path | None = None, hot: int = 1 << 20) -> Store:
    config = StoreConfig(hot=HotConfig(hot), cold=ColdConfig(None if path is None else str(path)))
    return Store.open(config, clock=ManualClock(), background=False)


def until(store: Store, key: bytes) -> float | None:
    meta = store._r.index[Key(key)]
    return meta.pinned_until - store._r.clock.now() if meta.pinned else None


def test_of_two_pins_the_later_end_counts() -> None:
    with open_store() as store:
        store.put(b"k", VALUE)
        for ttl_s, left in ((10, 10), (50, 50), (20, 50), (50, 50), (None, float("inf")), (60, float("inf"))):
            assert store.pin(b"k", ttl_s=ttl_s) == 1
            assert until(store, b"k") == left
        assert store.unpin(b"k") == 1
        assert until(store, b"k") is None


def test_a_longer_pin_of_the_end_holds_the_whole_prefix_as_long() -> None:
    with open_store() as store:
        store.put_many([(b"a", VALUE), (b"b", VALUE), (b"c", VALUE)], chain=True)
        store.pin(b"b", ttl_s=10)
        store.pin(b"c", ttl_s=50)
        assert [until(store, key) for key in (b"a", b"b", b"c")] == [50, 50, 50]
        assert store.unpin(b"a") == 0
        assert store.unpin(b"a", b"b", b"c") == 3
        assert store.pin(b"absent") == 0


@pytest.mark.parametrize("keys", [(b"root", b"leaf"), (b"leaf", b"root")])
def test_a_chunk_that_leaves_with_the_expired_one_it_continues_is_not_pinned(keys: tuple[bytes, ...]) -> None:
    with open_store() as store:
        store.put(b"root", VALUE, ttl_s=10)
        store.put(b"leaf", VALUE, ttl_s=100, parent=b"root")
        clock = store._r.clock
        assert isinstance(clock, ManualClock)
        clock.advance(11)
        assert store.pin(*keys) == 0
        assert store.locate([b"root", b"leaf"]) == [None, None]


def test_a_pin_that_the_whole_prefix_has_no_room_for_pins_nothing_new() -> None:
    with open_store(hot=6 * (64 * 64 * 4 + 2000)) as store:
        keys = [b"%d" % n for n in range(5)]
        store.put_many([(key, VALUE) for key in keys], chain=True)
        store.pin(keys[0])
        with pytest.raises(OverQuota):
            store.pin(keys[-1])
        assert [until(store, key) is not None for key in keys] == [True, False, False, False, False]


def test_the_lowest_form_is_what_is_pinned(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put(b"k", VALUE)
        store.drain()
        store.pin(b"k")
        assert store._r.cold is not None
        assert not store._r.hot.order.is_pinned(Key(b"k"))
        assert Key(b"k") in store._r.cold._pinned  # type: ignore[attr-defined]
    with open_store(tmp_path) as store:
        assert until(store, b"k") == float("inf")


def in_cold_only(store: Store, key: bytes) -> None:
    store.put(key, VALUE, fidelity="exact")
    assert store.demote(key) == 1
    assert store._r.tiers_of(Key(key)) == ["cold"]


def test_a_key_that_cold_has_just_let_go_of_is_not_held(tmp_path: Path) -> None:
    """Between cold's eviction and its word to the store a key has a Meta and no tier: a pin raised IndexError."""
    with open_store(tmp_path) as store:
        store.put(b"parent", VALUE, fidelity="exact")
        store.put(b"child", VALUE, fidelity="exact", parent=b"parent")
        assert store.demote(b"parent") == 2
        cold = store._r.cold
        assert cold is not None
        with cold._changed:  # type: ignore[attr-defined]
            cold.forget(Key(b"parent"))  # type: ignore[attr-defined]
        assert store.pin(b"parent") == 0
        store.pin(b"child")
        assert until(store, b"child") is None, "what it continues is on its way out"
        store._r.dropped_from_cold(Key(b"parent"), "evicted")
        assert store.get(b"child") is None


def test_a_key_that_cold_lets_go_of_before_the_pin_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        in_cold_only(store, b"k")
        cold = store._r.cold
        assert cold is not None

        def pin(key: Key) -> None:
            with cold._changed:  # type: ignore[union-attr]
                cold.forget(key)  # type: ignore[union-attr]

        monkeypatch.setattr(cold, "pin", pin)
        store.pin(b"k")
        assert until(store, b"k") is None
        monkeypatch.undo()
        store._r.dropped_from_cold(Key(b"k"), "evicted")
        assert b"k" not in store._r.index
