"""Chunks from Valkey against our own disk and against redis-py; the presence of keys against our own index.

Run: .venv/bin/python bench/shared.py [--json] [--rounds 60]
It starts a Valkey server and a Cluster of six processes. Ratios are of one run, its rounds interleaved, so that a busy
machine slows both sides: `cold`: time of ours from Valkey over time from our cold tier, page cache warm (at most 1.3 is
due); `redis_py`: time of redis-py with hiredis over ours (at least 1.5 for one chunk); `index`: time of a lookup on the
Cluster over a match in our own index; `calls`: time of as many single calls of redis-py over ours (at least 20).

What any client takes: `bare`: time of ours over one `recv` a value into memory that is there already, parsed by nobody;
`bare_awake`: over the same that never sleeps; `server`: the processor time of the server alone over time from our cold
tier. The server has a core of its own, as another host has: else it is by chance that it shares the client's.
"""

import argparse
import ctypes
import json
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import redis
import torch
import xxhash
from redis.cluster import ClusterNode, RedisCluster

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.shared_herd import herd
from bench.shared_hosts import fleet, local
from bench.shared_loop import loop
from bench.shared_rows import Row, medians
from kvstore.clock import SystemClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.record import pack
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.shared.addresses import parse_url
from kvstore.shared.guarded import Guarded
from kvstore.shared.link import Login
from kvstore.shared.names import PREFIX
from kvstore.shared.valkey import Valkey
from kvstore.store import Store
from kvstore.tiers.cold import Cold
from tests.kvstore.shared.engines.servers import Servers

CHUNK_NBYTES = 1_612_000
"""The codes of 256 tokens of SmolLM2-135M in nf4-kv: a record of 1.54 MiB."""
CHUNKS = (1, 16)
LOOKED_UP = 100
TIMEOUT_S = 20.0
META = Meta(1e9, 4e9, 3e9, 0)


@contextmanager
def engine_over(servers: Servers) -> Iterator[Guarded]:
    """As `open_engine` makes it."""
    inner = Valkey(parse_url(servers.url).seeds, Login(), SystemClock())
    engine = Guarded(inner, SystemClock(), state=inner.nodes.breaker, punctual=True)
    try:
        yield engine
    finally:
        engine.close()


def entry_of(n: int) -> Entry:
    """Codes that no compression shortens, as a chunk's."""
    codes = torch.frombuffer(bytearray(os.urandom(CHUNK_NBYTES)), dtype=torch.uint8)
    spec = TensorSpec("float32", (2 * CHUNK_NBYTES,))
    return Entry(Key(b"%032d" % n), {"kv": EncodedTensor(spec, "nf4", {"": codes})})


class Bare:
    """Values of known lengths over one connection, parsed by nobody: what any client takes at least."""

    def __init__(self, port: int, *, awake: bool) -> None:
        """awake: it does not sleep until they are there."""
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._socket.setblocking(not awake)
        self._rooms: dict[int, memoryview] = {}

    def get(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Receive and check each, all of them asked for at once."""
        self._socket.sendall(b"".join(b"GET %b\r\n" % name.encode() for name in names))
        for at, size in enumerate(sizes):
            before = len(b"$%d\r\n" % size)
            room = self._room(at, before + size + 2)
            missing = len(room)
            while missing:
                with suppress(BlockingIOError):
                    missing -= self._socket.recv_into(room[-missing:], 0, socket.MSG_WAITALL)
            xxhash.xxh3_64_intdigest(room[before:-2])

    def _room(self, at: int, nbytes: int) -> memoryview:
        if len(self._rooms.get(at, b"")) != nbytes:
            self._rooms[at] = memoryview(bytearray(nbytes))
        return self._rooms[at]

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


@contextmanager
def apart(servers: Servers) -> Iterator[None]:
    """The one server and this process on cores of their own, where there are two."""
    mine = os.sched_getaffinity(0)
    first, *others = sorted(mine)
    (process,) = servers.processes.values()
    threads = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
    try:
        if others:
            os.sched_setaffinity(0, others)
            for thread in threads:
                os.sched_setaffinity(thread, {first})
        yield
    finally:
        os.sched_setaffinity(0, mine)


def server_ms(servers: Servers, call: Callable[[], None], rounds: int = 30) -> float:
    """What the one server's first thread runs for a call, p50."""
    (process,) = servers.processes.values()
    stat = Path(f"/proc/{process.pid}/schedstat")
    took = []
    for _ in range(rounds):
        before = int(stat.read_text().split()[0])
        call()
        took.append((int(stat.read_text().split()[0]) - before) / 1e6)
    return statistics.median(took)


def gets(rounds: int) -> Iterator[Row]:
    """`shared.get`: a chunk and sixteen, received and checked, from a standalone server."""
    servers = Servers(options=("--maxmemory", "1gb"))
    entries = [entry_of(n) for n in range(max(CHUNKS))]
    records = {PREFIX + entry.key.hex(): pack(entry, META).to_bytes() for entry in entries}
    with tempfile.TemporaryDirectory(prefix="kvb-") as top, engine_over(servers) as engine, apart(servers):
        cold = Cold.open(
            Path(top),
            ColdConfig(capacity_nbytes=1 << 30),
            SystemClock(),
            meta_of=lambda _: META,
            on_drop=lambda *_: None,
        )
        client = redis.Redis(port=servers.ports[0])
        bares = {name: Bare(servers.ports[0], awake=name == "bare_awake") for name in ("bare", "bare_awake")}
        try:
            for entry in entries:
                cold.put(entry)
            cold.flush()
            engine.put([(name, [value]) for name, value in records.items()], 3600, TIMEOUT_S)
            for n in CHUNKS:
                names, keys = list(records)[:n], [entry.key for entry in entries[:n]]
                sizes = [len(records[name]) for name in names]

                def ours(names: list[str] = names, sizes: list[int] = sizes) -> None:
                    for value in engine.get(names, sizes, TIMEOUT_S):
                        assert value is not None
                        xxhash.xxh3_64_intdigest(value)

                def theirs(names: list[str] = names) -> None:
                    for value in client.mget(names) if len(names) > 1 else [client.get(names[0])]:
                        xxhash.xxh3_64_intdigest(value)

                def disk(keys: list[Key] = keys) -> None:
                    for key in keys:
                        assert cold.get(key) is not None

                found = medians(
                    rounds if n == 1 else rounds // 3,
                    ours=ours,
                    redis_py=theirs,
                    cold=disk,
                    **{name: partial(bare.get, names, sizes) for name, bare in bares.items()},
                )
                ratios = {of: found["ours"] / found[of] for of in ("cold", *bares)}
                ratios["server"] = server_ms(servers, ours) / found["cold"]
                ratios["redis_py"] = found["redis_py"] / found["ours"]
                yield Row("shared.get", {"chunks": n}, found["ours"], ratios)
        finally:
            cold.close()
            for bare in bares.values():
                bare.close()
            client.close()
            servers.close()


def lookups(rounds: int) -> Iterator[Row]:
    """`shared.lookup`: which of 100 keys are there, half of them are, on a Cluster."""
    servers = Servers(6, cluster=True)
    keys = [Key(b"%032d" % n) for n in range(LOOKED_UP)]
    names = [PREFIX + key.hex() for key in keys]
    config = StoreConfig(hot=HotConfig(1 << 30), warm=WarmConfig(0))
    with engine_over(servers) as engine, Store.open(config, background=False) as store:
        client = RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", port) for port in servers.ports])
        try:
            for key in keys[::2]:
                store.put(key, {"kv": torch.zeros(16)})
            engine.put([(name, [bytes(200)]) for name in names[::2]], 3600, TIMEOUT_S)
            asked = [bytes(key) for key in keys]
            found = medians(
                rounds // 2,
                ours=lambda: engine.heads(names, TIMEOUT_S),
                index=lambda: store.locate(asked),
                calls=lambda: [client.exists(name) for name in names],
            )
            yield Row(
                "shared.lookup",
                {"keys": LOOKED_UP},
                found["ours"],
                {"index": found["ours"] / found["index"], "calls": found["calls"] / found["ours"]},
            )
        finally:
            client.close()
            servers.close()


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {
    "get": gets,
    "lookup": lookups,
    "loop": loop,
    "local": local,
    "fleet": fleet,
    "herd": herd,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--part", choices=list(PARTS), help="one of them; default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with suppress(AttributeError):  # as the daemon does: freed memory is used again, not given back
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 64 << 20)):
            mallopt(option, value)
    for part, measure in PARTS.items():
        if args.part in (None, part):
            for row in measure(args.rounds):
                line = {
                    "name": row.name,
                    "params": row.params,
                    "value": row.value,
                    "unit": row.unit,
                    "ratios": row.ratios,
                }
                print(json.dumps(line) if args.json else row.text(), flush=True)


if __name__ == "__main__":
    main()
