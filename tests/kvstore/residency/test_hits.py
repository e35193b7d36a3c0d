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
    "plan": lambda store: store.read(store.plan([b"k"])),
    "plan, counted later": lambda store: [store.plan([b"k"], count_later=True), store.settle()],
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
        assert (held[0].tier if held[0] else None) == tier
        assert held[1] is None


def test_an_entry_at_its_deadline_is_no_answer_of_any_verb() -> None:
    for verb in (
        lambda store: store.get(b"k"),
        lambda store: store.plan([b"k"]).tiers[0],
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


def test_a_pinned_entry_is_found_after_its_deadline() -> None:
    with open_store() as store:
        store.put(b"k", VALUE, ttl_s=10)
        store.pin(b"k", ttl_s=100)
        clock_of(store).advance(50)
        assert store.get(b"k") is not None
        clock_of(store).advance(50)
        assert store.get(b"k") is not None, "unpinned now, and its deadline starts anew"
        clock_of(store).advance(10)
        assert store.get(b"k") is None


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
        store.plan([b"hot"])
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
        kinds = {}
        for accept, from_nbytes in ((frozenset({encoding}), 0), (frozenset({encoding}), NBYTES + 1), (frozenset(), 0)):
            plan = store.plan(keys, accept=accept, from_nbytes=from_nbytes)
            kinds[bool(accept), from_nbytes] = [type(at).__name__ for at in store.read(plan)]
        assert kinds[True, 0] == ["Hit", "Found", "Found", "NoneType"]
        assert kinds[True, NBYTES + 1] == kinds[False, 0] == ["Hit", "Hit", "Hit", "NoneType"]


def test_who_accepts_only_encodings_that_it_knows_gets_the_others_decoded(tmp_path: Path) -> None:
    """A client of before nf4-kv2 names three encodings, and is never sent a fourth."""
    keys = [b"warm", b"cold"]
    with open_store(tmp_path) as store:
        x = torch.randn(2, 128, 2, 64)
        for key in keys:
            store.put(key, {"k": x, "v": x})
        store.demote(*keys)
        store.demote(b"cold")
        assert [store.inspect(key).encoding for key in keys] == ["nf4-kv2"] * 2  # type: ignore[union-attr]
        older, today = frozenset({"nf4", "nf4-kv", "int8"}), frozenset({"nf4", "nf4-kv2", "nf4-kv", "int8"})
        found = list(store.read(store.plan(keys, accept=older)))
        assert [type(at).__name__ for at in found] == ["Hit", "Hit"]
        assert [type(at).__name__ for at in store.read(store.plan(keys, accept=today))] == ["Found", "Found"]
        for key, hit in zip(keys, found, strict=True):
            due = store.get(key)
            assert due is not None
            assert torch.equal(hit.tensors["k"], due.tensors["k"])  # type: ignore[union-attr]
            assert hit.tensors["k"].dtype == x.dtype  # type: ignore[union-attr]
