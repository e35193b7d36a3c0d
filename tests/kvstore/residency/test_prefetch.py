"""A match that says that gets follow soon: what only the disk holds comes to memory before them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.keys import Key
from kvstore.lookup import Lookup
from kvstore.residency import maintainer
from kvstore.store import Store
from tests.kvstore.residency.test_hits import open_store

KEYS = [b"a", b"b", b"c"]
SOON = Lookup(prefetch=True)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path, promote_after=0) as made:
        yield made


def put_on_disk(store: Store, **how: Any) -> None:
    store.put_many([(key, {"k": torch.randn(64, 64)}) for key in KEYS], chain=True, **how)
    while store._r.hot or store._r.warm:
        store.demote(*KEYS)


def tiers(store: Store) -> list[list[str]]:
    return [list(info.tiers) if (info := store.inspect(key)) is not None else [] for key in KEYS]


@pytest.mark.parametrize("ask", ["match", "locate"])
def test_what_is_on_disk_comes_to_warm_as_it_is_held_there(store: Store, ask: str) -> None:
    put_on_disk(store)
    before = [store.get(key) for key in KEYS]
    getattr(store, ask)(KEYS, lookup=SOON)
    assert tiers(store) == [["cold"]] * 3, "a lookup waits for no disk"
    store.maintain()
    assert tiers(store) == [["warm", "cold"]] * 3
    for key, hit in zip(KEYS, before, strict=True):
        after = store.get(key)
        assert after is not None
        assert hit is not None
        assert (after.tier, after.receipt) == ("warm", hit.receipt)
        assert torch.equal(after.tensors["k"], hit.tensors["k"])
    found = store.stats().tiers
    assert (found["warm"].promotions, found["hot"].promotions) == (3, 0)


def test_what_must_stay_exact_comes_to_hot(store: Store) -> None:
    put_on_disk(store, fidelity="exact")
    store.match(KEYS, lookup=SOON)
    store.maintain()
    assert tiers(store) == [["hot", "cold"]] * 3


def test_only_what_was_found_and_only_where_it_was_asked_for(store: Store) -> None:
    put_on_disk(store)
    for lookup in (None, Lookup(3), Lookup(counted=False)):
        store.match(KEYS, lookup=lookup)
        store.maintain()
    assert store.match([b"a", b"absent", b"c"], lookup=SOON) == 1
    store.maintain()
    assert tiers(store) == [["warm", "cold"], ["cold"], ["cold"]]
    assert store.get(b"absent") is None


def test_it_counts_as_no_use_and_as_the_lookup_that_it_is(store: Store) -> None:
    put_on_disk(store)
    hits = [store.inspect(key).hits for key in KEYS]  # type: ignore[union-attr]
    store.match(KEYS, lookup=Lookup(3, 48, 16, prefetch=True))
    store.maintain()
    assert [store.inspect(key).hits for key in KEYS] == hits  # type: ignore[union-attr]
    values = store.stats().values
    assert (values["lookup_keys"], values["lookup_hit_keys"], values["lookup_tokens"]) == (3, 3, 48)


def test_more_than_may_wait_is_dropped_from_the_deep_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintainer, "PROMOTIONS_MAX", 2)
    put_on_disk(store)
    store.match(KEYS, lookup=SOON)
    assert store.stats().values["promotions_dropped"] == 1
    store.maintain()
    assert tiers(store) == [["warm", "cold"], ["warm", "cold"], ["cold"]]


@pytest.mark.parametrize("fate", ["deleted", "put again", "promoted"])
def test_what_happens_to_a_key_while_it_is_read_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    put_on_disk(store)
    mover = store._mover
    read, other = mover._read_cold, torch.ones(64, 64)

    def late(key: Key) -> Any:
        entry = read(key)
        monkeypatch.setattr(mover, "_read_cold", read)
        if fate == "deleted":
            store.delete(b"c")
        elif fate == "put again":
            store.put(b"c", {"k": other}, fidelity="exact")
        else:
            assert store.promote(b"c") == 0, "it is on its way already"
        return entry

    monkeypatch.setattr(mover, "_read_cold", late)
    assert mover.prefetch(Key(b"c")) is (fate == "promoted")
    hit = store.get(b"c")
    if fate == "deleted":
        assert hit is None
    elif fate == "put again":
        assert hit is not None
        assert torch.equal(hit.tensors["k"], other)
    else:
        assert tiers(store)[2] == ["warm", "cold"]


def test_where_warm_could_never_hold_it_it_comes_to_hot(store: Store) -> None:
    put_on_disk(store)
    store._r.warm.resize(1, 1)
    assert store._mover.prefetch(Key(b"a"))
    assert tiers(store)[0] == ["hot", "cold"]


def test_what_the_disk_lost_meanwhile_stays_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_disk(store)
    monkeypatch.setattr(store._mover, "_read_cold", lambda _: None)
    assert not store._mover.prefetch(Key(b"a"))
    assert not store._mover.prefetch(Key(b"absent"))
