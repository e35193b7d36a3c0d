"""Several hosts over one server in memory, with a clock that tests move."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, SharedConfig, StoreConfig, WarmConfig
from kvstore.prefix import Namespace
from kvstore.store import Store
from tests.kvstore.shared.memory import MemoryEngine, MemoryServer

CHUNK = 4
IDENTITY: dict[str, Any] = {
    "model": "m", "revision": "1", "dtype": "float32", "layers": 2, "kv_heads": 2, "head_dim": 64, "layout": "lthd",
}  # fmt: skip


def prefix(chunks: int, *, seed: int = 0, tail: int = 0) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Token ids, k and v of so many chunks."""
    tokens = chunks * CHUNK + tail
    made = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 2, tokens, 2, 64, generator=made)
    return [seed * 1000 + i for i in range(tokens)], k, v


class Hosts:
    """Makes stores over one server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = ManualClock()
        self.server = MemoryServer(self.clock)
        self.secret = directory / "share.key"
        self.seal = directory / "seal.key"
        for path, digit in ((self.secret, "1"), (self.seal, "2")):
            path.write_text(digit * 64)
            path.chmod(0o600)
        self.stores: list[Store] = []

    def config(self, **shared: Any) -> SharedConfig:
        plain = SharedConfig(
            url="valkey://nowhere:1", secret_file=str(self.secret), key_files={"*": str(self.seal)}, tokens_min=0
        )
        return replace(plain, **shared)

    def open(
        self, *, cold: Path | None = None, hot: int = 64 << 20, warm: int = 64 << 20, engine: Any = MemoryEngine,
        background: bool = False, clock: Any = None, store: dict[str, Any] | None = None, tenants: Any = None,
        **shared: Any,
    ) -> Store:  # fmt: skip
        config = StoreConfig(
            hot=HotConfig(hot), warm=WarmConfig(warm), shared=self.config(**shared),
            cold=ColdConfig(path=None if cold is None else str(cold)), **(store or {}),
        )  # fmt: skip
        made = Store.open(
            config, clock=clock or self.clock, background=background, engine=engine(self.server), tenants=tenants
        )
        self.stores.append(made)
        return made

    @staticmethod
    def namespace(store: Any, **other: Any) -> Namespace:
        return store.namespace(chunk_tokens=CHUNK, **{**IDENTITY, **other})

    def published(self, chunks: int, *, seed: int = 0, **how: Any) -> Store:
        """A host that has put and published a prefix."""
        store = self.open(**how)
        self.namespace(store).put_prefix(*prefix(chunks, seed=seed))
        store.maintain()
        return store

    def trips_of(self, call: Callable[[], Any]) -> int:
        """Round trips of a call."""
        before = self.server.total()
        call()
        return self.server.total() - before


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    for store in made.stores:
        store.close()
