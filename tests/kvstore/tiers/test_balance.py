"""The border between hot and warm moves to where the memory is worth most."""

from pathlib import Path

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.simulation.simulator import Layout, Report, Setup, simulate
from kvstore.simulation.trace import Request, read_trace
from kvstore.store import Store
from kvstore.tiers.balance import Balance

TRACE = Path(__file__).parents[2] / "data" / "mooncake_conversation.jsonl.xz"
BLOCK = Layout(1, 1, 8)
"""8192 values a block: NF4 takes a seventh of the float32 block's memory, all counted."""
RAW_NBYTES = 4 * 8192 + 2 * 864 + 512 + 32


def run(requests: list[Request], blocks: int, hot_fraction: float, split: str) -> Report:
    return simulate(requests, Setup(blocks * RAW_NBYTES, 0, hot_fraction, BLOCK, store=StoreConfig(split=split)))


def test_where_memory_is_short_warm_takes_it_from_a_hot_that_was_set_too_large() -> None:
    requests = read_trace(TRACE, 1200)
    bad, learned = run(requests, 1000, 0.9, "fixed"), run(requests, 1000, 0.9, "auto")
    good = run(requests, 1000, 0.1, "fixed")
    assert learned.hot_fraction < 0.3
    assert learned.hits > 1.2 * bad.hits
    assert learned.hits > 0.85 * good.hits  # it had to learn first


def test_where_everything_fits_hot_takes_what_warm_does_not_need() -> None:
    """20 prompts again and again, more than hot holds at first and far less than the memory holds."""
    requests = [Request(2.0 * turn, tuple(range(1000 * (turn % 20), 1000 * (turn % 20) + 8))) for turn in range(1500)]
    fixed, learned = run(requests, 400, 0.1, "fixed"), run(requests, 400, 0.1, "auto")
    assert fixed.hits == learned.hits
    assert learned.hot_fraction > 0.4
    assert learned.by_tier["hot"] > 2 * max(1, fixed.by_tier["hot"])


def test_the_two_tiers_together_never_take_more_than_their_budgets() -> None:
    value = {"x": torch.randn(2048, generator=torch.Generator().manual_seed(1))}
    config = StoreConfig(HotConfig(300_000), WarmConfig(100_000), split="auto")
    clock = ManualClock()
    with Store.open(config, clock=clock, background=False) as store:
        for i in range(1500):
            key = b"%d" % (i % 120)
            if store.get(key) is None:
                store.put(key, value)
            clock.advance(0.1)
            store.maintain()
            tiers = store.stats().tiers
            assert tiers["hot"].capacity_nbytes + tiers["warm"].capacity_nbytes == 400_000
            assert all(tier.used_nbytes <= tier.capacity_nbytes for tier in (tiers["hot"], tiers["warm"]))
        assert store.hot_budget_nbytes == tiers["hot"].capacity_nbytes < 300_000
        store.set_hot_capacity(5_000)  # as memory pressure does: the border waits until it is over
        store.maintain()
        assert store.hot_capacity_nbytes == 5_000 < store.hot_budget_nbytes


@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.float32, 1 / 7.4), (torch.bfloat16, 1 / 3.7), (torch.float16, 1 / 3.7), (torch.int8, 1.0)],
    ids=str,
)
def test_an_entry_that_leaves_hot_for_good_is_priced_by_its_own_type(
    dtype: torch.dtype, held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All were taken for float32: a larger warm seemed to save twice the 16-bit chunks that it does."""
    left: list[int] = []
    monkeypatch.setattr(Balance, "left", lambda self, key, nbytes: left.append(nbytes))
    value = torch.ones(64, 1024).to(dtype)
    with Store.open(StoreConfig(HotConfig(3 * value.nbytes), WarmConfig(0), split="auto"), background=False) as store:
        for i in range(6):
            store.put(b"%d" % i, {"x": value})
    assert left
    assert all(nbytes == pytest.approx(held * value.nbytes, rel=0.02) for nbytes in left)


@pytest.mark.parametrize(("dtype", "density"), [(torch.float32, 7.4), (torch.bfloat16, 3.7)], ids=str)
def test_a_hit_in_warm_is_priced_by_what_the_entry_takes_in_hot(
    dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Balance, "hit", lambda self, tier, idle_s, density=1.0: seen.append(density))
    value = torch.randn(2, 256, 4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with Store.open(StoreConfig(HotConfig(8 << 20), WarmConfig(8 << 20), split="auto"), background=False) as store:
        store.put(b"k", {"k": value})
        store.demote(b"k")
        store.get(b"k")
    assert seen == [pytest.approx(density, rel=0.1)]
