"""The implementations of the one API, each behind the same handle."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.device.deferred import Deferred
from kvstore.store import Store
from kvstored.server import Daemon
from kvstored.settings import ServerSettings
from kvstored_client import Client, aio

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


class Blocking:
    """An asyncio client, or a namespace of one, whose verbs are called as the blocking ones are."""

    def __init__(self, of: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.of = of
        self._loop = loop

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.of, name)
        return (lambda *args, **how: self._answer(verb(*args, **how))) if callable(verb) else verb

    def _answer(self, answer: Any) -> Any:
        if hasattr(answer, "__aiter__"):
            return iter(self.run(_all_of(answer)))
        if hasattr(answer, "__aenter__"):
            return self._entered(answer)
        if asyncio.iscoroutine(answer):
            return self.run(answer)
        return answer if isinstance(answer, list) else Blocking(answer, self._loop)

    @contextmanager
    def _entered(self, lease: Any) -> Iterator[Any]:
        # Not `async with`: the block runs here, in the test's own thread, as what is leased is looked at there.
        found = self.run(lease.__aenter__())
        try:
            yield found
        except BaseException as error:
            del found
            self.run(lease.__aexit__(type(error), error, error.__traceback__))
            raise
        else:
            del found
            self.run(lease.__aexit__(None, None, None))


async def _all_of(answers: Any) -> list[Any]:
    return [answer async for answer in answers]


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="contract-loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def blocking(address: str) -> Iterator[Blocking]:
    """An asyncio client of a daemon, for tests of what blocks."""
    with event_loop() as loop:
        client = Blocking(aio.Client(address, on_error="raise"), loop)
        try:
            yield client
        finally:
            client.close()


ON_A_GPU = ["gpu", "gpu client"] if torch.cuda.is_available() else []


@pytest.fixture(params=["memory", "disk", "client", "aio", "device", "device client", *ON_A_GPU])
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    """A store in memory, a store with a disk, a client of a daemon, and an asyncio client of one.

    device: the hot tier is in the memory of a device that copies as late as it may (`kvstore.device.deferred`).
    gpu: where there is one, the same in its memory, by CUDA.
    """
    clock = ManualClock()
    config = config_for(tmp_path / "cold" if request.param == "disk" else None)
    device = {"device": "cuda:1", "gpu": "cuda:0"}.get(request.param.removesuffix(" client"))
    if device is not None:
        config = replace(config, hot=replace(config.hot, device=device))
    driver = Deferred() if device == "cuda:1" else None
    with Store.open(config, clock=clock, background=False, driver=driver) as store:
        if request.param in ("memory", "disk", "device", "gpu"):
            yield Harness(store, clock, config.hot.capacity_nbytes, config.entry_max_nbytes)
            return
        address = f"unix:{tmp_path / 'kv.sock'}"
        kind = blocking if request.param == "aio" else partial(Client, on_error="raise")
        with serving(store, address, tmp_path), kind(address) as client:
            yield Harness(client, clock, config.hot.capacity_nbytes, config.entry_max_nbytes)
