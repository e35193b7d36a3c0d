"""Parts of bench/shared.py that run real daemons over a real Cluster of six processes: `local.*` and `fleet.hits`.

`fleet.hits`: four daemons replay the first requests of the Mooncake trace, each sent where the simulation's router of
seed 1 sends it. A request is answered as by an engine: the longest prefix is got, the rest is put. Between two requests
passes what the daemon needs to publish, 0.3 s at most: in the trace it is 0.3 s in the mean. What a host may hold is
1,000 blocks, in memory and on disk together (a daemon always has a disk tier, here of its smallest size, 1 MiB).
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.shared_rows import Row, medians
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.simulation.trace import Request, block_key, read_trace
from kvstore.store import Store
from kvstored_client import Client
from tests.conftest import DaemonProcess, factory
from tests.kvstore.shared.engines.servers import Servers

TRACE = Path(__file__).parent.parent / "tests" / "data" / "mooncake_conversation.jsonl.xz"
HOSTS, BLOCKS, REQUESTS, SEED = 4, 1000, 3000, 1
DUE = {"alone": 4.65, "all": 31.0, "20000": 27.0}
"""Percent. Alone: what the simulation has; the others at least."""
PACE_S = 0.3
VALUES = 4096
"""float32 numbers of a block: 16 KiB, 2.3 KB in NF4."""
POOL = np.random.default_rng(0).standard_normal((64, VALUES)).astype(np.float32)
RELATIVE_ERROR_MAX = 0.2
COLD_NBYTES = 1 << 20
LOCAL_SHAPE = 4, 256, 3, 64
"""Two tensors of it: 1.5 MiB, a chunk."""
PUTS_KEPT = 64


@contextmanager
def daemons(stores: list[str]) -> Iterator[list[DaemonProcess]]:
    """Daemons with these tables of settings, up."""
    with factory() as make:
        found = [make(store=store, start=False) for store in stores]
        for host in found:
            host.start(wait=False)
        for host in found:
            host.wait_until_up()
        yield found


def sharing(servers: Servers, directory: Path) -> str:
    """[store.shared] over these servers, with the files it names."""
    for name, digit in (("share", "1"), ("seal", "2")):
        (directory / name).write_text(digit * 64)
        (directory / name).chmod(0o600)
    return (
        f'[store.shared]\nurl = "{servers.url}"\nsecret_file = "{directory}/share"\ntokens_min = 0\n'
        f'key_files = {{ "*" = "{directory}/seal" }}\n'
    )


def block(number: int) -> dict[str, np.ndarray]:
    """The value of a block."""
    return {"x": POOL[number % len(POOL)]}


def is_right(number: int, found: np.ndarray) -> bool:
    """Whether it is that block's, as NF4."""
    due = POOL[number % len(POOL)]
    return bool(np.linalg.norm(found - due) < RELATIVE_ERROR_MAX * np.linalg.norm(due))


def room_for(blocks: int) -> str:
    """Settings with which a store holds so many blocks in NF4 at most, memory and disk together: found by trying."""
    per_block, _ = _filled(1 << 20, 1)
    warm_nbytes = blocks * per_block
    while (held := _filled(warm_nbytes, 2 * blocks)[1]) > blocks and warm_nbytes:
        warm_nbytes = max(0, warm_nbytes - (held - blocks) * per_block)
    return (
        f"promote_after = 0\n[store.hot]\ncapacity_nbytes = 1\n[store.warm]\ncapacity_nbytes = {warm_nbytes}\n"
        f"[store.cold]\ncapacity_nbytes = {COLD_NBYTES}\n"
    )


def _filled(warm_nbytes: int, blocks: int) -> tuple[int, int]:
    """The bytes that the last of so many blocks takes in warm, and the most blocks held at once."""
    held = 0
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        cold = ColdConfig(path=top, capacity_nbytes=COLD_NBYTES)
        config = StoreConfig(hot=HotConfig(1), warm=WarmConfig(warm_nbytes), cold=cold, promote_after=0)
        with Store.open(config, background=False) as store:
            for n in range(blocks):
                store.put(block_key(n), block(n))
                if n % 20 == 19:
                    store.maintain()
                    held = max(held, int(store.stats().values["entries"]))
            info = store.inspect(block_key(blocks - 1))
            assert info is not None
            return info.tier_nbytes[0], held


class Host:
    """A daemon as an engine uses it."""

    def __init__(self, daemon: DaemonProcess, *, shares: bool) -> None:
        self.client: Client = daemon.client(framework="numpy")
        self._shares = shares
        self.most = 0

    def serve(self, blocks: tuple[int, ...]) -> tuple[int, int]:
        """Hits, and how many of them had a wrong value."""
        keys = [block_key(number) for number in blocks]
        hits = [hit for hit in self.client.get_many(keys, leading=True) if hit is not None]
        wrong = sum(not is_right(n, hit.tensors["x"]) for n, hit in zip(blocks, hits, strict=False))
        rest = [(key, block(number)) for key, number in zip(keys[len(hits) :], blocks[len(hits) :], strict=True)]
        if rest:
            before = self._dealt_with() if self._shares else 0.0
            parent = keys[len(hits) - 1] if hits else None
            stored = self.client.put_many(rest, chain=True, parent=parent)
            until = time.monotonic() + PACE_S
            while self._shares and self._dealt_with() < before + stored and time.monotonic() < until:
                time.sleep(0.002)
        return len(hits), wrong

    def _dealt_with(self) -> float:
        """Chunks published, found there or dropped, since start."""
        values = self.client.stats().values
        self.most = max(self.most, int(values["entries"]))
        names = ("shared_published", "shared_duplicate_uploads", "shared_dropped_")
        return sum(value for name, value in values.items() if name.startswith(names))


class Limit:
    """Gives each primary, once it has its third of so many objects, no more memory than it has then."""

    def __init__(self, servers: Servers, objects: int) -> None:
        self._clients = [servers.client(port) for port in servers.ports[:3]]
        self._quota = objects // len(self._clients)
        for client in self._clients:
            client.config_set("maxmemory-samples", 10)

    def turn(self) -> None:
        """Look. To be called often enough that few objects come between two turns."""
        for client in list(self._clients):
            held = client.dbsize()
            if held >= self._quota:
                info = client.info("memory")
                used = info["used_memory"] - info["mem_not_counted_for_evict"]
                sample = client.randomkey()
                client.config_set("maxmemory", used - (held - self._quota) * client.memory_usage(sample))
                self._clients.remove(client)


def fleet(
    _rounds: int = 0, *, requests: int = REQUESTS, blocks: int = BLOCKS, hosts: int = HOSTS,
    cases: tuple[str, ...] = tuple(DUE),
) -> Iterator[Row]:  # fmt: skip
    """`fleet.hits`: alone, over a store of everything, and over one with room for 20,000 blocks."""
    trace, room = read_trace(TRACE, requests), room_for(blocks)
    for shared in cases:
        options = ("--maxmemory", "600mb", "--repl-backlog-size", "1mb")
        servers = Servers(6, cluster=True, options=options)
        with tempfile.TemporaryDirectory(prefix="kvb-") as top:
            try:
                table = "" if shared == "alone" else sharing(servers, Path(top)) + "lookup_s = 5\nfetch_s = 20\n"
                limit = Limit(servers, int(shared)) if shared.isdigit() else None
                with daemons([room + table] * hosts) as found:
                    yield _replayed(shared, [Host(one, shares=bool(table)) for one in found], trace, servers, limit)
            finally:
                servers.close()


def _replayed(shared: str, hosts: list[Host], trace: list[Request], servers: Servers, limit: Limit | None) -> Row:
    router, begun = random.Random(SEED), time.monotonic()
    asked = hits = wrong = 0
    for n, request in enumerate(trace):
        got, bad = hosts[router.randrange(len(hosts))].serve(request.blocks)
        asked, hits, wrong = asked + len(request.blocks), hits + got, wrong + bad
        if limit is not None and n % 4 == 0:
            limit.turn()
    values = [host.client.stats().values for host in hosts]
    params = {
        "hosts": len(hosts), "shared": shared, "requests": len(trace), "wrong": wrong,
        "held_most": max([host.most for host in hosts] + [int(of["entries"]) for of in values]),
        "objects": sum(servers.client(port).dbsize() for port in servers.ports[:3]),
        "from_shared": int(sum(of.get("shared_hits", 0) for of in values)),
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    return Row("fleet.hits", params, 100 * hits / asked, {"due": 100 * hits / asked / DUE[shared]}, "%")


def local(rounds: int) -> Iterator[Row]:
    """`local.get`, `local.put` of a chunk over the unix socket: sharing on over off, the store up and stopped."""
    servers = Servers(6, cluster=True)
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        try:
            with daemons(["", sharing(servers, Path(top))]) as found:
                for store in ("up", "stopped"):
                    if store == "stopped":
                        servers.pause()
                    for name, ms in _local(rounds, found).items():
                        ratio = {"off": ms["on"] / ms["off"]}
                        yield Row(f"local.{name}", {"store": store}, ms["on"], ratio)
        finally:
            servers.resume()
            servers.close()


def _local(rounds: int, found: list[DaemonProcess]) -> dict[str, dict[str, float]]:
    k, v = np.random.default_rng(1).standard_normal((2, *LOCAL_SHAPE)).astype(np.float32)
    clients = {name: daemon.client(framework="numpy") for name, daemon in zip(("off", "on"), found, strict=True)}
    made = dict.fromkeys(clients, 0)

    def put(name: str) -> Callable[[], object]:
        def call() -> None:
            # The same keys again after a while: the tiers never fill up, so nothing sinks while it is measured.
            key = block_key(made[name] % PUTS_KEPT, b"local")
            made[name] += 1
            assert clients[name].put_many([(key, {"k": k, "v": v})], chain=True) == 1

        return call

    def get(name: str) -> Callable[[], object]:
        return lambda: clients[name].get_many([block_key(0, b"local")], leading=True)[0].tensors

    return {
        "put": medians(rounds, **{name: put(name) for name in clients}),
        "get": medians(rounds, **{name: get(name) for name in clients}),
    }
