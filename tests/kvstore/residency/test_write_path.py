"""What is refused, before a byte is copied, and what a put leaves behind."""

from collections import UserDict
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.errors import EntryTooLarge, InvalidEntry
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
        assert store._r.chains.awaited == 0
        assert store.put(b"c", VALUE, parent=b"parent") is False
