"""The implementations of the one API, each behind the same handle."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store
from kvstored.server import Daemon
from kvstored.settings import ServerSettings
from kvstored_client import Client

MIB = 1 << 20

torch.set_num_threads(1)  # as the daemon does: OpenMP barriers cost more than they give on busy machines


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


@contextmanager
def serving(store: Store, address: str, data_dir: Path) -> Iterator[None]:
    """The daemon's own server around a store with a clock of ours, on an event loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="contract-server")
    thread.start()

    async def start() -> Daemon:
        daemon = Daemon(store, ServerSettings(address=address, data_dir=str(data_dir)))
        await daemon.start()
        return daemon

    try:
        daemon = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(daemon.stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(params=["memory", "disk", "client"])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """A store in memory, a store with a disk, and a client of a daemon."""
    clock = ManualClock()
    config = config_for(tmp_path / "cold" if request.param == "disk" else None)
    with Store.open(config, clock=clock, background=False) as store:
        if request.param != "client":
            yield Harness(store, clock, config.hot.capacity_nbytes, config.entry_max_nbytes)
            return
        address = f"unix:{tmp_path / 'kv.sock'}"
        with serving(store, address, tmp_path), Client(address, on_error="raise") as client:
            yield Harness(client, clock, config.hot.capacity_nbytes, config.entry_max_nbytes)
