"""Parts of bench/shared.py that run real daemons over a real Cluster of six processes: `local.*` and `fleet.hits`.

`fleet.hits`: four daemons replay the first requests of the Mooncake trace, each sent where the simulation's router of
seed 1 sends it. A request is answered as by an engine: the longest prefix is got, the rest is put. Between two requests
passes what the daemon needs to publish, 0.3 s at most: in the trace it is 0.3 s in the mean. So that it passes in less,
a deletion of nothing wakes the publisher, which else gathers for a second. What a host may hold is 1,000 blocks, in
memory and on disk together (a daemon always has a disk tier, here of its smallest size, 1 MiB).
"""

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import redis

from bench.shared_rows import Row, medians
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.shared.names import PREFIX
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
SLACK = 40
"""Objects that a server may gain between two looks."""
NOTHING = b"a key of nobody".ljust(32)
LOCAL_SHAPE = 4, 256, 3, 64
"""Two tensors of it: 1.5 MiB, a chunk."""
LOCAL_HOT_NBYTES = 4 << 30
GETS_A_PUT = 20
"""Of calls in a row: some seconds of them, so that they outlast the publication of what was put before them."""


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
            if self._shares:
                self.client.delete(NOTHING)
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
    """Keeps each primary at its third of so many objects, by the memory that it may use.

    What it may use is told in bytes, and it needs some for other things than objects: buffers of its clients, and
    claims, of which some 5 % of its keys are there for a while after they have expired. So objects are counted.
    """

    def __init__(self, servers: Servers, objects: int) -> None:
        self._clients = [servers.client(port) for port in servers.ports[:3]]
        self._quota = objects // len(self._clients) - SLACK
        self._limits = [0] * len(self._clients)
        self.held: list[int] = []
        """Objects of all servers together, each time that they were full."""

    def turn(self) -> None:
        """Look. To be called often enough that few objects come between two turns."""
        held = [self._kept(at) for at in range(len(self._clients))]
        if all(self._limits):
            self.held.append(sum(held))

    def _kept(self, at: int) -> int:
        client = self._clients[at]
        if not self._limits[at] and client.dbsize() < self._quota:
            return 0
        held = objects_of(client)
        over = len(held) - self._quota
        if self._limits[at] or over >= 0:
            if not self._limits[at]:
                info = client.info("memory")
                self._limits[at] = info["used_memory"] - info["mem_not_counted_for_evict"]
            nbytes = next(filter(None, map(client.memory_usage, held)))  # None: it has been evicted meanwhile
            self._limits[at] -= over * nbytes
            client.config_set("maxmemory", self._limits[at])
        return len(held)


def objects_of(client: redis.Redis) -> list[bytes]:
    """The names of the objects on a server. A claim's goes on with a letter that is no digit."""
    return list(client.scan_iter(match=f"{PREFIX}[0-9a-f]*", count=10_000))


def fleet(_rounds: int = 0) -> Iterator[Row]:
    """`fleet.hits`: alone, over a store of everything, and over one with room for 20,000 blocks."""
    trace, room = read_trace(TRACE, REQUESTS), room_for(BLOCKS)
    for shared in DUE:
        yield replay(trace, room, shared)


def replay(trace: list[Request], room: str, shared: str, hosts: int = HOSTS) -> Row:
    """A row. room: the settings of each store. shared: "alone", "all", or how many objects the store has room for."""
    servers = Servers(6, cluster=True, options=("--maxmemory", "600mb", "--repl-backlog-size", "1mb"))
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        try:
            table = "" if shared == "alone" else sharing(servers, Path(top)) + "lookup_s = 5\nfetch_s = 20\n"
            limit = Limit(servers, int(shared)) if shared.isdigit() else None
            with daemons([room + table] * hosts) as found:
                return _replayed(shared, [Host(one, shares=bool(table)) for one in found], trace, servers, limit)
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
        "hosts": len(hosts), "shared": shared, "requests": len(trace), "hits": hits, "wrong": wrong,
        "held_most": max([host.most for host in hosts] + [int(of["entries"]) for of in values]),
        "objects": sum(len(objects_of(servers.client(port))) for port in servers.ports[:3]),
        "objects_most": max(limit.held, default=0) if limit is not None else 0,
        "from_shared": int(sum(of.get("shared_hits", 0) for of in values)),
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    percent = 100 * hits / max(1, asked)
    return Row("fleet.hits", params, percent, {"due": percent / DUE.get(shared, 100.0)}, "%")


def local(rounds: int) -> Iterator[Row]:
    """`local.get`, `local.put` of a chunk over the unix socket: sharing on over off, the store up and stopped.

    Calls 50 ms apart, and one right after the other, five times as many. The publisher works once a second or when no
    put came for a quarter of one, some 5 ms of CPU a chunk. `same`: a second daemon without sharing over the first:
    what the ratio is where nothing differs. Hot holds all chunks: one that is full encodes for each put.
    """
    servers = Servers(6, cluster=True)
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        try:
            hot = f"[store.hot]\ncapacity_nbytes = {LOCAL_HOT_NBYTES}\n"
            with daemons([hot, hot, hot + sharing(servers, Path(top))]) as found:
                made = Local(found)
                for store in ("up", "stopped"):
                    if store == "stopped":
                        servers.pause()
                    for apart_s in (0.05, 0.0):
                        for name, ms in made.measured(rounds if apart_s else 5 * rounds, apart_s).items():
                            params = {"store": store, "apart_ms": int(1000 * apart_s)}
                            ratios = {"off": ms["on"] / ms["off"], "same": ms["same"] / ms["off"]}
                            yield Row(f"local.{name}", params, ms["on"], ratios)
        finally:
            servers.resume()
            servers.close()


class Local:
    """Daemons, two with sharing off and one with it on, and a chunk."""

    def __init__(self, found: list[DaemonProcess]) -> None:
        names = ("off", "same", "on")
        self._clients = {of: one.client(framework="numpy") for of, one in zip(names, found, strict=True)}
        k, v = np.random.default_rng(1).standard_normal((2, *LOCAL_SHAPE)).astype(np.float32)
        self._value = {"k": k, "v": v}
        self._put = dict.fromkeys(self._clients, 0)

    def measured(self, rounds: int, apart_s: float) -> dict[str, dict[str, float]]:
        """p50 in ms, by verb and daemon."""
        puts = {of: partial(self._put_one, of) for of in self._clients}
        gets = {of: partial(self._get_one, of) for of in self._clients}
        many = rounds if apart_s else GETS_A_PUT * rounds
        return {"put": medians(rounds, apart_s=apart_s, **puts), "get": medians(many, apart_s=apart_s, **gets)}

    def _put_one(self, of: str) -> None:
        key = block_key(self._put[of], b"local")  # a new one: what is known to be there is not published again
        self._put[of] += 1
        assert self._clients[of].put_many([(key, self._value)], chain=True) == 1

    def _get_one(self, of: str) -> None:
        (hit,) = self._clients[of].get_many([block_key(self._put[of] - 1, b"local")], leading=True)
        assert hit is not None
