"""Lines that keep the law only when two things happen at once: each held still at the point where it matters.

Each of them could be removed with every other test green.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch

import kvstore.residency.transcode
from kvstore.clock import ManualClock
from kvstore.codecs import encode_entry
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.entries.entry import Entry
from kvstore.keys import Key
from kvstore.metadata.owner import NO_LIMITS, Owner
from kvstore.store import Store
from kvstore.tiers.order import Order
from tests.kvstore.power import PowerCuts
from tests.kvstore.tiers.test_cold import Holder, filled, key

MIB = 1 << 20


def open_store(path: Path, hot: int = 8 * MIB, cold: int = 64 * MIB) -> Store:
    config = StoreConfig(hot=HotConfig(hot), warm=WarmConfig(0), cold=ColdConfig(str(path), capacity_nbytes=cold))
    return Store.open(config, clock=ManualClock(), background=False)


def value(fill: float) -> dict[str, torch.Tensor]:
    return {"k": torch.full((64, 64), float(fill))}


def first(store: Store, name: bytes) -> float | None:
    hit = store.get(name)
    return None if hit is None else float(hit.tensors["k"][0, 0])


def while_encoding(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something, once, after an entry was found and before its encoded form is put anywhere."""

    def encode(entry: Entry, codec: Any, hints: Any) -> Entry:
        monkeypatch.undo()
        act()
        return encode_entry(entry, codec, hints)

    monkeypatch.setattr(kvstore.residency.transcode, "encode_entry", encode)


@pytest.mark.parametrize("fidelity", ["auto", "exact"])
def test_a_key_put_during_a_drain_never_gets_its_old_value_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fidelity: str
) -> None:
    with open_store(tmp_path) as store:
        store.put(b"k", value(1))
        while_encoding(monkeypatch, lambda: store.put(b"k", value(2), fidelity=fidelity))
        store.drain()
        assert first(store, b"k") == 2
        store.demote(b"k")  # what lies below now answers
        assert first(store, b"k") == pytest.approx(2, abs=0.1)
    with open_store(tmp_path) as store:
        assert first(store, b"k") == pytest.approx(2, abs=0.1)


def test_a_key_deleted_during_a_drain_is_not_on_the_disk_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        store.put(b"k", value(1))
        while_encoding(monkeypatch, lambda: store.delete(b"k"))
        assert store.drain() == 0
        assert not store._r.in_cold(Key(b"k"))
    with open_store(tmp_path) as store:
        assert first(store, b"k") is None


READS: dict[str, Callable[[Store, list[bytes]], object]] = {
    "get_many": lambda store, keys: store.get_many(keys, leading=True),
    "plan": lambda store, keys: store.plan(keys),
    "plan, counted later": lambda store, keys: [store.plan(keys, count_later=True), store.settle()],
    "touch": lambda store, keys: store.touch(keys),
}


@pytest.mark.parametrize("read", READS)
def test_what_leaves_the_disk_first_of_a_chain_that_was_read_is_its_end(tmp_path: Path, read: str) -> None:
    """The cold tier's order knows no chains: a root that left first would take the whole prefix along."""
    chain = [b"chunk%d" % i for i in range(6)]
    large = {"k": torch.randn(1024, 64)}  # which no compression makes small
    with open_store(tmp_path, cold=2 * MIB) as store:
        store.put_many([(name, large) for name in chain], chain=True, fidelity="exact")
        store.drain()
        assert all(store._r.in_cold(Key(name)) for name in chain)
        READS[read](store, chain)
        for name in chain:
            assert store._r.hot.remove(Key(name))  # from here on only the disk holds them
        for i in range(4):
            store.put(b"new%d" % i, large, fidelity="exact")
            store.drain()
        left = [at is not None for at in store.locate(chain)]
        assert 0 < sum(left) < 6
        assert left == sorted(left, reverse=True), "the leading chunks are those that are left"


def test_a_place_is_freed_only_when_no_power_cut_can_bring_back_the_row_that_names_it(tmp_path: Path) -> None:
    """Whenever places are freed the power is cut, in a copy: at most the last change is missing, nothing is damaged."""
    holder = Holder(tmp_path / "cold")
    cuts = PowerCuts(holder.cold, holder.path, tmp_path)
    for fill in range(3):
        for n in range(3):
            holder.put(key(n), fill * 10 + n, nbytes=5000)
        holder.cold.flush()
        holder.cold.flush_meta()
    holder.cold.remove(key(0))
    holder.cold.flush()
    holder.forget(key(1))
    holder.cold.close()
    assert len(cuts.copies) > 3
    for copy in cuts.copies:
        found = Holder(copy)
        assert found.cold.stats().quarantined is None
        assert len(found.cold) > 0
        for name in list(found.cold.keys()):
            assert filled(found.cold.get(name)) is not None, "a row names bytes that were given back"
        assert found.cold.corrupt_total == 0
        found.cold.close()


def test_the_double_loses_the_last_transaction_and_no_other(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    cuts = PowerCuts(holder.cold, holder.path, tmp_path)
    holder.put(key(1), 1)
    holder.cold.flush()
    holder.cold._records._rows.sync()
    holder.put(key(2), 2)
    holder.cold.flush()
    copy = cuts.cut(durable=False)
    with lmdb.open(str(copy / "index"), max_dbs=4, readonly=True, lock=False) as index:
        assert index.info()["last_txnid"] == holder.cold._records._rows._opened[0].info()["last_txnid"] - 1
    found = Holder(copy)
    assert list(found.cold.keys()) == [key(1)]
    found.cold.close()
    holder.cold.close()


def owner(name: str) -> Owner:
    return Owner(name, "", name, NO_LIMITS, NO_LIMITS)


def test_between_tenants_that_hold_alike_the_one_that_brings_something_gives_way() -> None:
    """Without the newcomer's bytes the first of the two in the table would lose whoever comes."""
    a, b = owner("a"), owner("b")
    owners = {Key(b"a"): a, Key(b"b"): b}
    order = Order(owner_of=owners.__getitem__)
    for name, whose in owners.items():
        order.track(name, 100, owner=whose)
    assert order.victim(a, 50) == b"a"
    assert order.victim(b, 50) == b"b"


def test_between_namespaces_of_a_tenant_the_one_that_brings_something_gives_way() -> None:
    x, y = (Owner("a", name, f"a/{name}", NO_LIMITS, NO_LIMITS) for name in "xy")
    owners = {Key(b"x"): x, Key(b"y"): y}
    order = Order(owner_of=owners.__getitem__)
    for name, whose in owners.items():
        order.track(name, 100, owner=whose)
    assert order.victim(x, 50) == b"x"
    assert order.victim(y, 50) == b"y"


def test_a_tenant_of_several_namespaces_gives_way_where_it_brings_what_makes_it_the_largest() -> None:
    b, x, y = owner("b"), *(Owner("a", name, f"a/{name}", NO_LIMITS, NO_LIMITS) for name in "xy")
    owners = {Key(b"b"): b, Key(b"x"): x, Key(b"y"): y}
    order = Order(owner_of=owners.__getitem__)
    for name, nbytes in ((b"b", 100), (b"x", 50), (b"y", 50)):
        order.track(Key(name), nbytes, owner=owners[Key(name)])
    assert order.victim(x, 50) == b"x"
    assert order.victim(b, 50) == b"b"
