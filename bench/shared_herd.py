"""A part of bench/shared.py: eight daemons with eight clients each at one prefix of sixteen chunks, at once.

    put     all eight daemons have computed it: at most two uploads of a chunk are due
    get     none of them has it, another host has: at most one GET of a chunk by each daemon is due

A single Valkey counts: its log of slow commands, of which every one is, says which name was read and written how often.
"""

import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.shared_hosts import daemons, sharing
from bench.shared_rows import Row
from kvstore.prefix import Namespace
from kvstore.shared.names import PREFIX
from kvstored_client import Client
from tests.conftest import DaemonProcess, wait_until
from tests.kvstore.shared.engines.servers import Servers

DAEMONS, CLIENTS, CHUNKS = 8, 8, 16
LAYERS, HEADS, DIM = 4, 3, 64
"""A chunk of 256 tokens is 1.5 MiB."""
UPLOADS_DUE = 2
K, V = np.random.default_rng(2).standard_normal((2, LAYERS, 256 * CHUNKS, HEADS, DIM)).astype(np.float32)
TOKENS = list(range(256 * CHUNKS))
RELATIVE_ERROR_MAX = 0.2
PUBLISHED_S = 120.0


class Counted:
    """What one server was asked for, by command and name of an object."""

    def __init__(self, servers: Servers) -> None:
        self._client = servers.client(servers.ports[0])
        self._client.config_set("slowlog-max-len", 1_000_000)
        self._client.config_set("slowlog-log-slower-than", 0)

    def taken(self) -> dict[str, Counter[bytes]]:
        """Since the last time."""
        found: dict[str, Counter[bytes]] = {"GET": Counter(), "SET": Counter(), "GETRANGE": Counter()}
        for entry in self._client.slowlog_get(-1):
            verb, name, *_ = [*entry["command"].split(b" ", 2), b""]
            if verb.decode() in found and name.startswith(PREFIX.encode()) and b"{" not in name:
                found[verb.decode()][name] += 1
        self._client.slowlog_reset()
        return found


def herd(_rounds: int = 0) -> Iterator[Row]:
    """`shared.herd`: the most uploads of a chunk, and the GETs of all chunks."""
    servers = Servers(options=("--maxmemory", "1gb"))
    with tempfile.TemporaryDirectory(prefix="kvb-") as top:
        try:
            table = sharing(servers, Path(top)) + "lookup_s = 5\nfetch_s = 20\n"
            with daemons([table] * (DAEMONS + 1)) as found:
                yield from _herd(servers, found)
        finally:
            servers.close()


def _herd(servers: Servers, found: Sequence[DaemonProcess]) -> Iterator[Row]:
    *hosts, other = found
    clients = [host.client(framework="numpy") for host in hosts for _ in range(CLIENTS)]
    counted = Counted(servers)
    params: dict[str, object] = {"daemons": DAEMONS, "clients": CLIENTS, "chunks": CHUNKS}

    _at_once([lambda c=client: _space(c, "put").put_prefix(TOKENS, K, V) for client in clients])
    wait_until(lambda: _settled(clients), "the publishers did not settle", PUBLISHED_S)
    uploads = list(counted.taken()["SET"].values())
    told = {"objects": len(uploads), "uploads": sum(uploads)}
    yield Row("shared.herd.put", {**params, **told}, max(uploads), {"due": max(uploads) / UPLOADS_DUE}, "uploads")

    writer = other.client(framework="numpy")
    _space(writer, "get").put_prefix(TOKENS, K, V)
    wait_until(lambda: writer.stats().values["shared_published"] == CHUNKS, "it was not published", PUBLISHED_S)
    counted.taken()
    right = _at_once([lambda c=client: _chunks_right(c) for client in clients])
    asked = counted.taken()
    gets = list(asked["GET"].values())
    told = {"lookups": sum(asked["GETRANGE"].values()), "of_one_most": max(gets), "chunks_least": min(right)}
    yield Row("shared.herd.get", {**params, **told}, sum(gets), {"due": sum(gets) / (DAEMONS * CHUNKS)}, "gets")


def _space(client: Client, revision: str) -> Namespace:
    return client.namespace(
        model="org/herd", revision=revision, dtype="float32", layers=LAYERS, kv_heads=HEADS, head_dim=DIM, layout="lthd"
    )


def _chunks_right(client: Client) -> int:
    """How many chunks of the prefix come, all of them right."""
    n, k, v = _space(client, "get").get_prefix(TOKENS)
    for due, got in ((K[:, :n], k), (V[:, :n], v)):
        assert n == 0 or np.linalg.norm(got - due) < RELATIVE_ERROR_MAX * np.linalg.norm(due), "wrong values"
    return n // 256


def _settled(clients: Sequence[Client]) -> bool:
    """Each daemon has dealt with each chunk: published it, or found that another one has."""
    for client in clients[::CLIENTS]:
        values = client.stats().values
        if values["shared_queue_nbytes"] or values["shared_published"] + values["shared_duplicate_uploads"] < CHUNKS:
            return False
    return True


def _at_once(calls: Sequence[Callable[[], int]]) -> list[int]:
    """What each returns, from a thread of its own, begun together. Raises what any raised."""
    barrier, results = threading.Barrier(len(calls)), list[int | BaseException]([0] * len(calls))

    def one(at: int) -> None:
        barrier.wait()
        try:
            results[at] = calls[at]()
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            results[at] = error

    threads = [threading.Thread(target=one, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, int)]
