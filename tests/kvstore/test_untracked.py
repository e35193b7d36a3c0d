"""What the store holds is freed without the garbage collector, which does not look at it."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store
from kvstore.untracked import untrack

ENTRIES = 2000


@pytest.fixture
def store() -> Iterator[Store]:
    config = StoreConfig(HotConfig(1 << 28), WarmConfig(1 << 28))
    with Store.open(config, clock=ManualClock(), background=False) as found:
        yield found


def put(store: Store, count: int) -> None:
    for i in range(count):
        store.put(b"%d" % i, {"k": torch.randn(2, 16, 2, 4), "v": torch.randn(2, 16, 2, 4)})


@pytest.mark.parametrize("tier", ["hot", "warm"])
def test_a_collection_looks_at_nothing_that_is_held(store: Store, tier: str) -> None:
    looked_at = []
    for count in (ENTRIES // 2, ENTRIES):  # the first fill the dictionaries that keys are spread over
        put(store, count)
        if tier == "warm":
            for i in range(count):
                store.demote(b"%d" % i)
        gc.collect()
        looked_at.append(len(gc.get_objects()))
    assert looked_at[1] - looked_at[0] < ENTRIES / 20


def test_what_is_deleted_is_freed_at_once(store: Store) -> None:
    put(store, 3)
    entry = store._r.hot.get(b"1")
    assert entry is not None
    parts = [weakref.ref(part) for tensor in entry.tensors.values() for part in tensor.parts.values()]
    del entry
    gc.disable()
    try:
        store.delete(b"1")
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


def test_what_the_collector_never_knew_stays_as_it_is() -> None:
    for x in (1, b"bytes", (), {}):
        untrack(x)
        assert not gc.is_tracked(x)
    untrack(circle := {"self": []})
    assert not gc.is_tracked(circle)
