"""The one look of a get: what is where, how big, what it needs; charged and counted under one lock, or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.errors import OverQuota
from kvstore.keys import CheckedKeys, Key
from kvstore.residency.read_path import Found, Plan
from kvstore.store import Store

MIB = 1 << 20
ROWS = 1024
NBYTES = ROWS * 64 * 4
ACCEPT = frozenset({"nf4-kv2"})


def open_store(path: Path | None = None) -> Store:
    config = StoreConfig(
        hot=HotConfig(16 * MIB), warm=WarmConfig(4 * MIB), cold=ColdConfig(path=str(path) if path else None)
    )
    return Store.open(config, clock=ManualClock(), background=False)


def chunk(seed: int) -> dict[str, torch.Tensor]:
    return {"k": torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def store(tmp_path: Path):
    """hot, warm and cold in the tiers of these names, and three more in hot."""
    with open_store(tmp_path) as store:
        for i, key in enumerate((b"cold", b"warm", b"hot", b"h1", b"h2", b"h3")):
            store.put(key, chunk(i), ttl_s=100)
        store.demote(b"cold", b"warm")
        store.demote(b"cold")
        yield store


def counted(store: Store) -> dict[str, float]:
    names = ("gets", "hits", "misses", "misses_absent", "misses_expired", "hit_nbytes")
    return {name: store.stats().values.get(name, 0.0) for name in names}


def test_a_plan_says_where_each_key_is_how_big_it_is_and_what_it_needs(store: Store) -> None:
    plan = store.plan([b"hot", b"absent", b"warm", b"cold"], accept=ACCEPT)
    assert list(plan.tiers) == ["hot", None, "warm", "cold"]
    assert plan.nbytes == 3 * NBYTES
    assert NBYTES < plan.held_nbytes < 1.5 * NBYTES
    assert (plan.hot, plan.at_hand) == (False, False)
    assert store.plan([b"hot", b"warm"], accept=ACCEPT).at_hand
    assert store.plan([b"absent"], accept=ACCEPT).at_hand
    assert not store.plan([b"hot", b"warm"]).at_hand
    assert not store.plan([b"warm"], accept=ACCEPT, from_nbytes=64 * MIB).at_hand
    assert store.plan([b"hot", b"h1"]).hot


def test_what_a_plan_found_is_read_whatever_became_of_its_keys_meanwhile(store: Store) -> None:
    plan = store.plan([b"hot", b"absent", b"warm"], accept=ACCEPT)
    store.delete(b"hot", b"warm")
    hot, absent, warm = store.read(plan)
    assert absent is None
    assert torch.equal(hot.tensors["k"], chunk(2)["k"])
    assert isinstance(warm, Found)
    assert warm.entry.encoding == "nf4-kv2"


def test_what_left_the_disk_between_look_and_read_is_a_miss_and_counted_as_one(store: Store) -> None:
    plan = store.plan([b"hot", b"cold"])
    store.delete(b"cold")
    hit, lost = store.read(plan)
    assert (hit.tier, lost) == ("hot", None)
    values = store.stats().values
    assert (values["hits"], values["misses"], values["misses_corrupt"]) == (1, 1, 1)
    assert values["hit_nbytes"] == NBYTES


def test_a_get_that_the_budget_refuses_is_not_counted_and_moves_no_deadline(store: Store) -> None:
    def refuse(plan: Plan) -> None:
        asked.append(plan.nbytes)
        raise OverQuota("busy")

    asked: list[int] = []
    keys = [b"hot", b"absent", b"warm", b"cold"]
    before, order = counted(store), list(store._r.hot.keys())
    deadlines = [store._r.index[Key(key)].expires_at for key in (b"hot", b"warm", b"cold")]
    store._r.clock.advance(10)
    for again in (keys, [b"hot", b"h1"]):
        with pytest.raises(OverQuota, match="busy"):
            store.plan(again, charge=refuse)
    assert asked == [3 * NBYTES, 2 * NBYTES]
    assert counted(store) == before
    assert list(store._r.hot.keys()) == order
    assert [store._r.index[Key(key)].expires_at for key in (b"hot", b"warm", b"cold")] == deadlines


def test_what_is_read_where_it_lies_in_hot_is_not_charged_for(store: Store) -> None:
    asked: list[int] = []
    for keys in ([b"hot", b"h1"], [b"hot", b"warm"], [b"absent"]):
        store.plan(keys, whole_if_hot=True, charge=lambda plan: asked.append(plan.nbytes))
    assert asked == [2 * NBYTES, 0]


def test_a_plan_ends_where_a_lot_is_full_and_the_rest_is_counted_when_it_is_asked_for(store: Store) -> None:
    keys = CheckedKeys([b"absent", b"h1", b"h2", b"warm", b"h3"])
    lots = []
    while keys:
        plan = store.plan(keys, at_most_nbytes=2 * NBYTES + 1)
        lots.append(list(plan.keys))
        keys = keys.part(len(plan))
    assert lots == [[b"absent", b"h1", b"h2"], [b"warm", b"h3"]]
    assert (counted(store)["gets"], counted(store)["hits"], counted(store)["misses"]) == (5, 4, 1)
    assert len(store.plan([b"h1", b"h2"], at_most_nbytes=1)) == 1, "the first key is covered, however large"


def test_what_lies_in_hot_and_needs_no_copy_is_no_lot(store: Store) -> None:
    keys = [b"h1", b"h2", b"h3", b"warm", b"hot"]
    assert len(store.plan(keys[:3], at_most_nbytes=1, whole_if_hot=True)) == 3
    plan = store.plan(keys, at_most_nbytes=1, whole_if_hot=True)
    assert (list(plan.keys), plan.hot) == (keys[:3], True)
    assert list(store.plan(keys[3:], at_most_nbytes=1, whole_if_hot=True).keys) == [b"warm"]


def test_a_chain_ends_at_its_first_miss_and_the_part_in_hot_is_known_to_be(store: Store) -> None:
    plan = store.plan([b"h1", b"h2", b"absent", b"h3"], leading=True)
    assert (list(plan.keys), plan.hot, plan.ended) == ([b"h1", b"h2"], True, True)
    assert counted(store)["misses"] == 1
    assert len(list(store.read(plan))) == 2
    whole = store.plan([b"h1", b"warm"], leading=True)
    assert (len(whole), whole.hot, whole.ended) == (2, False, False)


def test_a_chain_ends_before_what_was_lost_on_the_disk(store: Store) -> None:
    plan = store.plan([b"h1", b"cold", b"h2"], leading=True)
    store.delete(b"cold")
    assert [hit.key for hit in store.read(plan)] == [b"h1"]


VERBS: dict[str, Callable[[Store], object]] = {
    "stats": lambda store: store.stats(),
    "put": lambda store: store.put(b"new", chunk(9)),
    "put_many": lambda store: store.put_many([(b"new", chunk(9))], chain=True),
    "get": lambda store: store.get(b"absent"),
    "plan": lambda store: store.plan([b"absent"]),
    "match": lambda store: store.match([b"hot"]),
    "locate": lambda store: store.locate([b"hot"]),
    "touch": lambda store: store.touch([b"absent"]),
    "delete": lambda store: store.delete(b"absent"),
    "evict": lambda store: store.evict(b"absent"),
    "pin": lambda store: store.pin(b"absent"),
    "unpin": lambda store: store.unpin(b"absent"),
    "demote": lambda store: store.demote(b"absent"),
    "promote": lambda store: store.promote(b"absent"),
    "inspect": lambda store: store.inspect(b"hot"),
    "explain": lambda store: store.explain(b"hot"),
    "entries": lambda store: list(store.entries()),
    "tenants": lambda store: store.tenants(),
    "maintain": lambda store: store.maintain(),
    "settle": lambda store: store.settle(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_sees_the_store_without_the_gets_that_were_answered_before_it(store: Store, verb: str) -> None:
    plan = store.plan([b"h1", b"hot"], count_later=True)
    assert (plan.hot, store._r.index[Key(b"hot")].hits) == (True, 0)
    VERBS[verb](store)
    assert store._r.index[Key(b"hot")].hits == 1
    assert store._r.counters.gets - (verb in ("get", "plan")) == 2


def test_what_is_not_all_in_hot_is_counted_at_once_even_if_it_could_be_later(store: Store) -> None:
    store.plan([b"hot", b"warm"], count_later=True)
    assert store._r.index[Key(b"hot")].hits == 1


def test_the_lock_is_free_again_after_a_count_that_failed(store: Store) -> None:
    store._r.lock.owed.append(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        store.stats()
    assert store._r.lock.acquire(blocking=False)
    store._r.lock.release()
    assert store.stats().values["gets"] == 0


def test_locating_counts_nothing_and_leaves_what_has_expired_for_a_get_to_count(store: Store) -> None:
    store._r.clock.advance(101)
    assert store.locate([b"hot", b"absent"]) == [None, None]
    assert counted(store)["gets"] == 0
    assert store.get(b"hot") is None
    assert counted(store)["misses_expired"] == 1
