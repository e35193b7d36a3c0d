"""What is refused, before a byte is copied, and what a put leaves behind."""

from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from kvstore.arrays import CheckedSpecs, describe
from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.entries.entry import Entry
from kvstore.errors import EntryTooLarge, InvalidEntry, OverQuota
from kvstore.keys import Key
from kvstore.options import PutOptions
from kvstore.residency.transcode import made_entry
from kvstore.store import Store

MIB = 1 << 20
VALUE = {"k": torch.ones(64, 64)}


def open_store(**settings: Any) -> Store:
    config = StoreConfig(hot=HotConfig(MIB), warm=WarmConfig(MIB), **settings)
    return Store.open(config, clock=ManualClock(), background=False)


REFUSED: dict[str, dict[str, Any]] = {
    "fidelity": {"fidelity": "lossy"},
    "priority": {"priority": "urgent"},
    "a namespace": {"namespace": "x" * 97},
    "ttl_s must be over 0": {"ttl_s": 0},
    "at most": {"ttl_s": 1e12},
    "got nan": {"ttl_s": float("nan")},
}


@pytest.mark.parametrize("word", REFUSED)
def test_an_option_that_means_nothing_is_refused_and_nothing_is_stored(word: str) -> None:
    with open_store() as store:
        with pytest.raises(InvalidEntry, match=word):
            store.put(b"k", VALUE, **REFUSED[word])
        with pytest.raises(InvalidEntry, match=word):
            store.put_many([(b"k", VALUE)], chain=True, **REFUSED[word])
        assert store.stats().values["entries"] == 0


def test_a_ttl_may_be_as_long_as_configured() -> None:
    with open_store(ttl_max_s=1000.0, ttl_s=100.0) as store:
        store.put(b"k", VALUE, ttl_s=1000.0)
        with pytest.raises(InvalidEntry, match="at most"):
            store.put(b"k", VALUE, ttl_s=1000.1)
        assert store._r.index[b"k"].ttl_s == 1000.0  # type: ignore[index]
        store.put(b"k", VALUE)
        assert store._r.index[b"k"].ttl_s == 100.0  # type: ignore[index]


@pytest.mark.parametrize("tensors", [[("k", torch.ones(1))], None, torch.ones(1)])
def test_tensors_are_a_mapping(tensors: Mapping[str, Any]) -> None:
    with open_store() as store, pytest.raises(InvalidEntry, match="mapping"):
        store.put(b"k", tensors)


def test_an_entry_that_no_tier_could_hold_is_refused_by_its_size() -> None:
    """Encoded it may take a seventh, so what must stay exact is refused sooner."""
    with open_store(entry_max_nbytes=64 * MIB) as store:
        more = {"k": torch.ones(MIB // 4 + 1)}
        with pytest.raises(EntryTooLarge, match="fits no tier"):
            store.put(b"k", more, fidelity="exact")
        store.put(b"k", more)
        assert store.locate([b"k"])[0].tier == "warm"  # type: ignore[union-attr]
        with pytest.raises(EntryTooLarge, match="fits no tier"):
            store.put(b"k", {"k": torch.ones(9 * MIB // 4 + 1)})


def test_a_tensor_is_copied_unless_it_is_handed_over() -> None:
    with open_store() as store:
        for own in (False, True):
            x = torch.ones(64, 64)
            store.put(b"k", {"k": x}, own=own)
            with store.lease(b"k") as hit:
                assert hit is not None
                assert (hit.tensors["k"].data_ptr() == x.data_ptr()) == own


def test_a_chunk_whose_parent_leaves_while_the_chain_is_put_is_not_kept() -> None:
    """The parent is deleted after it was looked for, before the last chunk is in: nothing may hang below it."""
    with open_store() as store:
        store.put(b"parent", VALUE)

        class Deletes(UserDict[str, Any]):
            def __iter__(self) -> Iterator[str]:
                store.delete(b"parent")
                return super().__iter__()

        stored = store.put_many([(b"a", Deletes(VALUE)), (b"b", VALUE)], chain=True, parent=b"parent")
        assert stored == 0
        assert store.stats().values["entries"] == 0
        assert store._r.chains.awaited == {}
        assert store.put(b"c", VALUE, parent=b"parent") is False


def chain_of(names: str, value: Mapping[str, torch.Tensor] = VALUE) -> list[Entry]:
    """Entries as a door makes them, root first."""
    specs = CheckedSpecs({name: describe(name, x) for name, x in value.items()})
    return [made_entry(Key(name.encode()), specs, {n: x.clone() for n, x in value.items()}) for name in names]


def count_holds(store: Store) -> Any:
    """A lock in place of the store's, which counts how often it is taken (`holds`)."""
    lock = store._r.lock

    class Counting(type(lock)):  # type: ignore[misc]
        holds = 0

        def __enter__(self) -> bool:
            self.holds += 1
            return super().__enter__()

    store._r.lock = counting = Counting()
    return counting


def test_a_new_chain_that_fits_is_taken_in_one_hold_of_the_lock() -> None:
    with open_store() as store:
        lock = count_holds(store)
        assert store.put_entries(chain_of("abcdef"), PutOptions(), chain=True) == 6
        assert lock.holds == 1
        assert int(store.match(list(map(bytes, zip(b"abcdef"))))) == 6
        assert store._r.chains.awaited == {}
        assert store._r.hot.keys_now() == [b"f", b"e", b"d", b"c", b"b", b"a"]
        # What continues it later continues a rooted chain, in one hold and one more for its use.
        assert store.put_entries(chain_of("gh"), PutOptions(), chain=True, parent=Key(b"f")) == 2
        assert int(store.match([b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"])) == 8
        assert store._r.hot.keys_now()[0] == b"h"
        store.delete(b"c")
        assert store.stats().values["entries"] == 2


@pytest.mark.parametrize("why", ["replaces", "no room", "no parent"])
def test_a_chain_that_is_not_new_or_does_not_fit_is_taken_as_any_other(why: str) -> None:
    value = VALUE if why != "no room" else {"k": torch.ones(MIB // 12)}
    with open_store() as store:
        parent = Key(b"p") if why == "no parent" else None
        if why == "replaces":
            store.put(b"b", {"k": torch.zeros(8, 8)})
        stored = store.put_entries(chain_of("abcd", value), PutOptions(), chain=True, parent=parent)
        assert stored == (0 if parent else 4)
        values = store.stats().values
        assert values["entries"] == stored
        assert values["puts"] == stored + (why == "replaces")
        r = store._r
        assert r.hot.used_nbytes == sum(r.hot.get(key).nbytes for key in r.hot.keys_now())  # type: ignore[union-attr]
        assert sum(owner.entries for owner in r.tenants) == stored
        for name in "abcd" if stored else "":
            hit = store.get(name.encode())
            assert hit is not None
            assert hit.tensors["k"].shape == value["k"].shape
        assert store._r.chains.awaited == {}


def test_new_entries_that_continue_nothing_are_taken_in_one_hold_of_the_lock() -> None:
    with open_store() as store:
        assert store.put_entries([], PutOptions()) == 0
        lock = count_holds(store)
        assert store.put_entries(chain_of("abc"), PutOptions(pin=True)) == 3
        assert lock.holds == 1 + 3, "and one for each pin"
        assert [store._r.index[Key(key)].pinned for key in (b"a", b"b", b"c")] == [True] * 3
        assert all(meta.parent is None for meta in store._r.index.values())
        lock.holds = 0
        assert store.put_entries(chain_of("defg"), PutOptions()) == 4
        assert lock.holds == 1
        assert store._r.hot.keys_now()[:4] == [b"g", b"f", b"e", b"d"]
        assert store.put_entries(chain_of("fgh"), PutOptions()) == 3, "two of them are held"
        assert store.stats().values["entries"] == 8
        assert store.stats().values["puts"] == 10


def test_entries_of_several_owners_in_one_batch_are_each_their_own() -> None:
    prefixes = {"x": b"x" * 16, "y": b"y" * 16}
    with open_store() as store:
        for name, prefix in prefixes.items():
            store.register_tenant(name, [prefix])
        names = [prefixes["x"] + b"1", prefixes["y"] + b"1", b"z", prefixes["x"] + b"2"]
        specs = CheckedSpecs({name: describe(name, x) for name, x in VALUE.items()})
        entries = [made_entry(Key(name), specs, {n: x.clone() for n, x in VALUE.items()}) for name in names]
        assert store.put_entries(entries, PutOptions(namespace="n")) == 4
        assert [store._r.index[Key(name)].owner.name for name in names] == ["x/n", "y/n", "n", "x/n"]
        assert {owner.name: owner.entries for owner in store._r.tenants} == {"x/n": 2, "y/n": 1, "n": 1}
        assert set(store.tenants()["hot"]) == {"", "x", "y"}


def test_a_pinned_chain_is_pinned_whole_and_what_may_not_be_pinned_is_not_kept() -> None:
    with open_store() as store:
        assert store.put_entries(chain_of("ab"), PutOptions(pin=True), chain=True) == 2
        assert all(store._r.index[Key(key)].pinned for key in (b"a", b"b"))
        large = {"k": torch.ones(MIB // 12)}
        with pytest.raises(OverQuota):
            store.put_entries(chain_of("xyz", large), PutOptions(pin=True), chain=True)
        assert int(store.match([b"a", b"b"])) == 2
        assert store._r.chains.awaited == {}
        for key in store._r.keys_now():
            assert key in {b"a", b"b", b"x", b"y", b"z"}
            assert store._r.index[key].parent is None or store._r.index[key].parent in store._r.index
