"""The implementations of the one API, each behind the same handle."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

MIB = 1 << 20


@dataclass
class Harness:
    """A cache under test and the clock it lives by."""

    cache: Any
    clock: ManualClock
    hot_nbytes: int
    entry_max_nbytes: int


def config_for(cold: Path | None) -> StoreConfig:
    """Small tiers, so that tests reach their limits."""
    return StoreConfig(
        hot=HotConfig(4 * MIB),
        warm=WarmConfig(2 * MIB),
        cold=ColdConfig(path=None if cold is None else str(cold), capacity_nbytes=16 * MIB),
        entry_max_nbytes=8 * MIB,
    )


@pytest.fixture(params=["memory", "disk"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """A store in memory, a store with a disk, and a client of a daemon."""
    clock = ManualClock()
    config = config_for(None if request.param == "memory" else tmp_path / "cold")
    with Store.open(config, clock=clock, background=False) as store:
        yield Harness(store, clock, config.hot.capacity_nbytes, config.entry_max_nbytes)
