"""What a get counts, moves and asks for, from wherever it is answered."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

MIB = 1 << 20
VALUE = {"k": torch.ones(64, 64)}
NBYTES = 64 * 64 * 4


def open_store(path: Path | None = None, **settings: Any) -> Store:
    config = StoreConfig(
        hot=HotConfig(4 * MIB), warm=WarmConfig(MIB), cold=ColdConfig(None if path is None else str(path)), **settings
    )
    return Store.open(config, clock=ManualClock(), background=False)


def clock_of(store: Store) -> ManualClock:
    clock = store._r.clock
    assert isinstance(clock, ManualClock)
    return clock


READS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get(b"k"),
    "resident": lambda store: store.resident([b"k"]),
    "resident, counted later": lambda store: [store.resident([b"k"], count_later=True), store.settle()],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("tier", ["hot", "warm", "cold"])
def test_a_get_moves_a_sliding_deadline_and_no_other(tmp_path: Path, read: str, tier: str) -> None:
    with open_store(tmp_path, promote_after=0) as store:
        store.put(b"k", VALUE, ttl_s=10)
        store.put(b"fixed", VALUE, ttl_s=10, sliding=False)
        for _ in range(("hot", "warm", "cold").index(tier)):
            assert store.demote(b"k", b"fixed") == 2
        clock_of(store).advance(9)
        READS[read](store)
        assert store.get(b"fixed") is not None
        clock_of(store).advance(9)
        held = store.locate([b"k", b"fixed"])
        expected = "hot" if tier == "hot" else None if read.startswith("resident") else tier
        assert (held[0].tier if held[0] else None) == expected, "only hot answers `resident`"
        assert held[1] is None


def test_an_entry_at_its_deadline_is_no_answer_of_any_verb() -> None:
    for verb in (
        lambda store: store.get(b"k"),
        lambda store: store.resident([b"k"]),
        lambda store: store.locate([b"k"])[0],
        lambda store: store.match([b"k"]).held or None,
        lambda store: store.inspect(b"k"),
        lambda store: store.touch([b"k"]) or None,
    ):
        with open_store() as store:
            store.put(b"k", VALUE, ttl_s=10)
            clock_of(store).advance(9.5)
            assert store.locate([b"k"])[0] is not None
            clock_of(store).advance(0.5)
            assert verb(store) is None


def test_a_pinned_entry_is_resident_until_its_pin_lapses() -> None:
    with open_store() as store:
        store.put(b"k", VALUE, ttl_s=10)
        store.pin(b"k", ttl_s=100)
        clock_of(store).advance(50)
        assert store.resident([b"k"]) is not None
        clock_of(store).advance(50)
        assert store.resident([b"k"]) is None
        assert store.get(b"k") is not None, "unpinned now, and its deadline starts anew"


def test_resident_answers_up_to_so_many_bytes_and_one_key_whatever_it_has() -> None:
    with open_store() as store:
        for key in (b"a", b"b"):
            store.put(key, VALUE)
        assert store.resident([b"a", b"b"], at_most_nbytes=2 * NBYTES) is not None
        assert store.resident([b"a", b"b"], at_most_nbytes=2 * NBYTES - 1) is None
        assert store.resident([b"a"], at_most_nbytes=1) is not None
        assert store.resident([b"a", b"absent"]) is None


def test_a_second_hit_within_the_window_asks_for_a_promotion_and_no_other() -> None:
    with open_store(promote_window_s=60.0, promote_after=2) as store:
        store.put(b"k", VALUE)
        store.demote(b"k")
        waiting = []
        for seconds in (0, 61, 60):
            clock_of(store).advance(seconds)
            assert store.get(b"k") is not None
            waiting.append(store.stats().values["promotions_waiting"])
        assert waiting == [0, 0, 1]
        store.maintain()
        hit = store.get(b"k")
        assert hit is not None
        assert hit.tier == "hot"


@pytest.mark.parametrize(("promote_after", "waiting"), [(0, 0), (1, 1)])
def test_promotions_as_configured(promote_after: int, waiting: int) -> None:
    with open_store(promote_after=promote_after) as store:
        store.put(b"k", VALUE)
        store.demote(b"k")
        for _ in range(3):
            store.get(b"k")
        assert store.stats().values["promotions_waiting"] == waiting


def test_gets_are_counted_by_where_they_were_answered_and_why_they_were_not(tmp_path: Path) -> None:
    with open_store(tmp_path, promote_after=0) as store:
        for key in (b"hot", b"warm", b"cold", b"late"):
            store.put(key, VALUE, ttl_s=10 if key == b"late" else 100)
        store.demote(b"warm", b"cold")
        store.demote(b"cold")
        clock_of(store).advance(10)
        store.get_many([b"hot", b"warm", b"cold", b"late", b"absent"])
        store.resident([b"hot"])
        stats = store.stats()
        assert stats.values["gets"] == 6
        assert [stats.tiers[name].hits for name in ("hot", "warm", "cold")] == [2, 1, 1]
        assert store._r.counters.misses == {"expired": 1, "absent": 1}
        assert stats.values["hit_nbytes"] == 4 * NBYTES
        assert [store._r.index[key].hits for key in (b"hot", b"warm", b"cold")] == [2, 1, 1]  # type: ignore[index]


def test_of_a_chain_the_first_miss_ends_the_answer(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for key in (b"a", b"c"):
            store.put(key, VALUE)
        assert [hit.key for hit in store.get_many([b"a", b"b", b"c"], leading=True) if hit] == [b"a"]
        assert [hit is not None for hit in store.get_many([b"a", b"b", b"c"])] == [True, False, True]
        assert len(store.match([b"a", b"b", b"c"]).held) == 1


def test_an_encoding_that_the_caller_accepts_is_given_out_as_it_is_held(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for key in (b"hot", b"warm", b"cold"):
            store.put(key, VALUE)
        store.demote(b"warm", b"cold")
        store.demote(b"cold")
        encoding = store._r.index[b"warm"].encoding  # type: ignore[index]
        keys = [b"hot", b"warm", b"cold", b"absent"]
        with store.lease_as_held(keys, {encoding}) as found:
            assert [type(at).__name__ for at in found] == ["Hit", "Found", "Found", "NoneType"]
        with store.lease_as_held(keys, {encoding}, from_nbytes=NBYTES + 1) as found:
            assert [type(at).__name__ for at in found] == ["Hit", "Hit", "Hit", "NoneType"]
        with store.lease_as_held(keys, ()) as found:
            assert [type(at).__name__ for at in found] == ["Hit", "Hit", "Hit", "NoneType"]
