"""What an entry is counted as must be what it takes, or a budget is a wish."""

import gc
import tracemalloc

import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

COUNT = 4000


def measured(warm: bool) -> tuple[float, float]:
    """Bytes an entry takes beside its torch storage, as Python allocated them, and bytes it was counted as."""
    config = StoreConfig(HotConfig(1 << 30), WarmConfig(1 << 30))
    x = torch.randn(8192)
    with Store.open(config, clock=ManualClock(), background=False) as store:

        def put(i: int, parent: bytes | None) -> bytes:
            key = i.to_bytes(32, "big")
            store.put(key, {"kv": x}, parent=parent)
            if warm:
                store.demote(key)
            return key

        parent = put(0, None)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        counted = store._r.hot.used_nbytes + store._r.warm.used_nbytes
        for i in range(1, COUNT):
            parent = put(i, parent)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        return grown / COUNT, (store._r.hot.used_nbytes + store._r.warm.used_nbytes - counted) / COUNT


def test_a_packed_entry_is_counted_as_what_python_allocates_for_it() -> None:
    taken, counted = measured(warm=True)
    assert 0.95 * taken <= counted <= 1.15 * taken


def test_a_raw_entry_is_counted_as_no_less_than_python_allocates_beside_its_storage() -> None:
    taken, counted = measured(warm=False)
    assert counted - 8192 * 4 >= 0.95 * taken
