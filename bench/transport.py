"""Put, get and view against Redis, memcached, Mooncake and a bare copy: `bench/transport.py [--json]`.

At two paces. `rotation`: every subject of a size makes one call in each round, so that each finds its code and data
gone cold and its server asleep, as a worker does that computes between two calls. `steady`: in each round every subject
makes its calls one after the other, as a worker does that loads a prefix. At both a busy moment of the machine hits all
alike. Ratios are the baseline's p50 over ours, of the same pace in that same run: above 1 means faster than it.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import data_port, empty_call, empty_packet
from rivals import (
    MIB,
    Servers,
    Subject,
    environment,
    memcached_subject,
    mooncake_subject,
    payloads,
    redis_subject,
    servers,
)

from kvstored_client import Client
from kvstored_client.decoding import Decode
from kvstored_client.shm.mapping import Copier

SIZES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
ROTATION_NBYTES = 256 * MIB
"""Distinct payloads in rotation, so that no cache of the CPU holds them: 8 times its L3."""
SECONDS_A_SIZE = 6.0
STEADY_ROUNDS = 8
STEADY_CALLS, STEADY_S = 200, 0.1
"""Calls in a row, and how long they may take: a round of the largest payloads would last minutes."""
PACKED_ROW = 2 * 4 * 2 * 64
"""Floats a token: k and v, 4 layers, 2 heads of 64."""
PACKED: tuple[tuple[str, str, Decode], ...] = (
    ("nf4", "tcp", "client"),
    ("nf4.by_daemon", "tcp", "daemon"),
    ("nf4", "unix", "client"),
    ("nf4.by_daemon", "unix", "daemon"),
)
NAMES = {
    ("kvstored", "get.out", "tcp"): "get.tcp.raw",
    ("kvstored", "nf4", "tcp"): "get.tcp.nf4",
    ("kvstored", "nf4.by_daemon", "tcp"): "get.tcp.nf4.by_daemon",
    ("kvstored", "nf4", "unix"): "get.nf4",
    ("kvstored", "nf4.by_daemon", "unix"): "get.nf4.by_daemon",
    ("port", "get.out", "tcp"): "get.tcp.port",
}
"""What a row is called; get.tcp.port is not kvstored but a plain TCP socket, as a data port would be."""


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_SIZE, help="for each size")
    parser.add_argument("--mib", type=float, nargs="+", help="these sizes only, and nothing but them")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def show(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        if args.json:
            print(*map(json.dumps, found), sep="\n", flush=True)

    torch.set_num_threads(1)
    with servers() as up:
        if args.mib:
            for mib in args.mib:
                show(measure(up, int(mib * MIB), args.seconds))
            if not args.json:
                print_table(rows)
            return
        show(floors(up))
        for nbytes in SIZES:
            show(measure(up, nbytes, args.seconds))
        show(batches(up))
        show(many_clients(up, 16 * MIB, 2.0))
        show(killed(up))
    if not args.json:
        print_table(rows)


def floors(up: Servers) -> list[dict[str, Any]]:
    """What an exchange costs here with nothing in it."""
    redis = {path: redis_subject(up, path) for path in ("unix", "tcp")}
    with empty_packet() as packet:
        actions: dict[str, Callable[[int], object]] = {"packet": lambda _: packet()}
        grpc_call = empty_call(up.kvstored_tcp)
        actions["grpc"] = lambda _: grpc_call()
        for path, subject in redis.items():
            if subject is not None:
                subject.put(b"one byte", np.zeros(1, np.uint8))
                actions[f"redis.{path}"] = lambda _, s=subject: s.get(b"one byte")
        times = take_turns(actions, 200, 2.0)
    return [row("empty", {"exchange": name, "nbytes": 0, "clients": 1}, taken) for name, taken in times.items()]


def measure(up: Servers, nbytes: int, seconds: float) -> list[dict[str, Any]]:
    """One size: all verbs over all paths, the rivals beside them, one client each."""
    count = max(2, min(16, ROTATION_NBYTES // nbytes))
    values = payloads(nbytes, count)
    keys = [b"%d-%d" % (nbytes, i) for i in range(count)]
    actions: dict[tuple[str, str, str], Callable[[int], object]] = {}
    out = {"x": np.zeros(nbytes // 4, dtype=np.float32)}
    near, far = client_of(up, "unix"), client_of(up, "tcp")
    for system, path, subject in subjects(up):
        # One system's calls stand together: who comes after another system's finds his own code and data gone cold.
        x = [value.tobytes() for value in values] if system == "memcached" else values
        actions[system, "put", path] = lambda i, s=subject, x=x: s.put(keys[i], x[i])
        actions[system, "get", path] = lambda i, s=subject: s.get(keys[i])
        if (system, path) == ("kvstored", "unix"):
            actions["kvstored", "get.out", "unix"] = lambda i: found(near.get(keys[i], out=out))
            actions["kvstored", "view", "unix"] = lambda i: view(near, keys[i])
        elif system == "kvstored":
            actions["kvstored", "get.out", "tcp"] = lambda i: found(far.get(keys[i], out=out))
    source, target = [torch.from_numpy(value) for value in values], torch.zeros(nbytes // 4)
    actions["memcpy", "copy", ""] = lambda i: target.copy_(source[i])
    for name, path, decode in PACKED:
        actions["kvstored", name, path] = packed_get(up, path, decode, keys, values)
    with data_port(values) as port:
        actions["port", "get.out", "tcp"] = lambda i: port(i, out["x"])
        paces = {"rotation": take_turns(actions, count, seconds), "steady": in_rows(actions, count)}
        cpu = {name: cpu_of(up.kvstored_pid, actions[name], count, nbytes) for name in actions if name[0] == "kvstored"}
    return [found for pace, times in paces.items() for found in rows_of(pace, nbytes, times, cpu)]


def rows_of(
    pace: str, nbytes: int, times: dict[tuple[str, str, str], np.ndarray], cpu: dict[tuple[str, str, str], float]
) -> list[dict[str, Any]]:
    """Our rows of one size at one pace, beside the others'."""
    rows = []
    for (system, verb, path), taken in times.items():
        if system not in ("kvstored", "port"):
            continue
        rival = "put" if verb == "put" else "get"
        # Over shared memory the fair Redis is the faster of its two sockets; over TCP it is TCP.
        redis = [times[key] for key in (("redis", rival, "tcp"), ("redis", rival, "unix")) if key in times]
        rows.append(
            row(
                NAMES.get((system, verb, path), verb),
                {"path": path, "nbytes": nbytes, "clients": 1, "pace": pace},
                taken,
                redis=min(redis[: 1 if path == "tcp" else 2], key=np.median) if redis else None,
                memcached=times.get(("memcached", rival, "unix")),
                mooncake=times.get(("mooncake", rival, "shm")) if path == "unix" else None,
                memcpy=times["memcpy", "copy", ""],
            )
        )
        if system == "kvstored":
            rows[-1]["daemon_cpu_s_per_gb"] = round(cpu[system, verb, path], 4)
    return rows


def found(hit: Any) -> Any:
    """A hit that must be one."""
    assert hit is not None
    return hit


def packed_get(
    up: Servers, path: str, decode: Decode, keys: list[bytes], values: list[np.ndarray]
) -> Callable[[int], object]:
    """Gets into existing tensors of the same float32, held as nf4-kv in warm; decode: by whom."""
    tokens = values[0].size // PACKED_ROW
    client = Client(
        up.kvstored_unix if path == "unix" else up.kvstored_tcp, framework="numpy", on_error="raise", decode=decode
    )
    own = [b"packed-" + key for key in keys]
    for key, value in zip(own, values, strict=True):
        k, v = value.reshape(2, 4, tokens, 2, 64)
        client.put(key, {"k": k, "v": v})
        client.demote(key)
    # As torch makes a worker's tensors: on a cache line's boundary, which numpy's are not.
    out = {name: torch.zeros((4, tokens, 2, 64)).numpy() for name in ("k", "v")}

    def get(i: int) -> None:
        torch.set_num_threads(2)  # what a worker's torch has here by default; copies of this bench have one
        found(client.get(own[i], out=out))
        torch.set_num_threads(1)

    return get


def cpu_of(pid: int, action: Callable[[int], object], count: int, nbytes: int) -> float:
    """CPU seconds of the daemon for each GB of float32 moved: half a second of nothing but this."""
    before, start, calls = cpu_s(pid), time.perf_counter(), 0
    while time.perf_counter() - start < 0.5 or calls < 2:
        action(calls % count)
        calls += 1
    return (cpu_s(pid) - before) / (calls * nbytes / 1e9)


def subjects(up: Servers) -> list[tuple[str, str, Subject]]:
    """Who takes part: (system, path, subject)."""
    found: list[tuple[str, str, Subject | None]] = []
    for path in ("unix", "tcp"):
        found += [("kvstored", path, kvstored_subject(up, path)), ("redis", path, redis_subject(up, path))]
    found.append(("memcached", "unix", memcached_subject(up)))
    found.append(("mooncake", "shm", mooncake_subject(up)))
    return [(system, path, subject) for system, path, subject in found if subject is not None]


def client_of(up: Servers, path: str) -> Client:
    """A client that raises rather than misses."""
    return Client(up.kvstored_unix if path == "unix" else up.kvstored_tcp, framework="numpy", on_error="raise")


def view(client: Client, key: bytes) -> None:
    """A leased hit, its tensor taken and let go."""
    with client.lease(key) as hit:
        assert found(hit).tensors["x"].size


def kvstored_subject(up: Servers, path: str) -> Subject:
    """Our client, into fresh numpy arrays: shared memory on the unix socket, the stream on TCP."""
    client = client_of(up, path)

    def get(key: bytes) -> object:
        hit = client.get(key)
        assert hit is not None, key
        return hit

    return Subject(lambda key, x: client.put(key, {"x": x}), get)


def many_clients(up: Servers, nbytes: int, seconds: float) -> list[dict[str, Any]]:
    """The same get into existing tensors by one process and by eight at once, beside bare copies: GB a second in all.

    The copies are the client's own, of eight values in shared memory: what two processors and their cache have to give.
    """
    values = payloads(nbytes, 8)
    with client_of(up, "unix") as client:
        for i, value in enumerate(values):
            client.put(b"many-%d" % i, {"x": value})
    rows = []
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as shared:
        shared.write(b"".join(value.tobytes() for value in values))
        shared.flush()
        for name, source in (("get.out", up.kvstored_unix), ("copy", f"file:{shared.name}")):
            totals: dict[int, float] = {}
            for clients in (1, 8):
                before = cpu_s(up.kvstored_pid)
                totals[clients] = together(source, clients, nbytes, seconds)
                row = {
                    "name": name,
                    "params": {"path": "unix", "nbytes": nbytes, "clients": clients, "measure": "throughput"},
                    "value": round(totals[clients], 3),
                    "unit": "GB/s",
                    "ratios": {"one_client": round(totals[clients] / totals[1], 3)},
                }
                if name == "get.out":
                    used_s = cpu_s(up.kvstored_pid) - before
                    row["daemon_cpu_s_per_gb"] = round(used_s / (totals[clients] * seconds), 4)
                rows.append(row)
    return rows


def together(source: str, clients: int, nbytes: int, seconds: float) -> float:
    """GB a second that so many processes read in all."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[float] = context.Queue()
    barrier = context.Barrier(clients)
    workers = [context.Process(target=pull, args=(source, nbytes, seconds, barrier, results)) for _ in range(clients)]
    for worker in workers:
        worker.start()
    total = sum(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def pull(source: str, nbytes: int, seconds: float, barrier: Any, results: Any) -> None:
    """One process of `together`. source: the daemon's address, or a file with the eight values."""
    out = {"x": np.zeros(nbytes // 4, dtype=np.float32)}
    with ExitStack() as closing:
        if source.startswith("file:"):
            values = np.memmap(source.removeprefix("file:"), np.uint8, "r").reshape(8, nbytes)
            copier, target = Copier(), out["x"].view(np.uint8)

            def get(i: int) -> None:
                copier.copy(target, values[i])
        else:
            client = closing.enter_context(Client(source, framework="numpy", on_error="raise"))

            def get(i: int) -> None:
                found(client.get(b"many-%d" % i, out=out))

        for i in range(8):
            get(i)
        barrier.wait(120)
        moved, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            get(moved % 8)
            moved += 1
        results.put(moved * nbytes / (time.perf_counter() - start) / 1e9)


def batches(up: Servers) -> list[dict[str, Any]]:
    """Each verb with 100 keys of 64 KiB beside one key."""
    # As long as the keys of chunks are.
    keys = [b"batch-%026d" % i for i in range(100)]
    x = np.zeros(1 << 14, dtype=np.float32)
    client = client_of(up, "unix")
    client.put_many([(key, {"x": x}) for key in keys])

    def views(n: int) -> None:
        with client.lease_many(keys[:n]) as hits:
            assert len(hits) == n
            assert found(hits[n - 1])

    verbs: dict[str, Callable[[int], object]] = {
        "view": views,
        "get": lambda n: client.get_many(keys[:n]),
        "put": lambda n: client.put_many([(key, {"x": x}) for key in keys[:n]]),
    }
    times: dict[Any, np.ndarray] = {}
    for verb, f in verbs.items():
        times |= take_turns({(verb, n): lambda _, f=f, n=n: f(n) for n in (1, 100)}, 100, 1.0)
    # The first look at entries that were just put: what is said of each has to be worked out.
    fresh = {"put": verbs["put"], "view.fresh": views}
    times |= take_turns({(verb, 100): lambda _, f=f: f(100) for verb, f in fresh.items()}, 50, 1.0)
    times["view.fresh", 1] = times["view", 1]
    params = {"path": "unix", "nbytes": 100 << 16, "clients": 1, "keys": 100}
    return [row(verb, params, times[verb, 100], one_key=times[verb, 1]) for verb in (*verbs, "view.fresh")]


HOLDER = """
import sys, time
from kvstored_client import Client
cache = Client(sys.argv[1], framework="numpy", on_error="raise")
blocks = [cache.lease(b"batch-%026d" % i) for i in range(100)]
assert all(block.__enter__() is not None for block in blocks)
print("holding", flush=True)
time.sleep(60)
"""


def killed(up: Servers) -> list[dict[str, Any]]:
    """How long after the SIGKILL of a client its 100 leases are gone, seen through the statistics (1 ms a look)."""
    watcher = client_of(up, "unix")
    times = []
    for _ in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, up.kvstored_unix], stdout=subprocess.PIPE, env=environment()
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holding\n"
            assert watcher.stats().values["leases"] >= 100
            start = time.perf_counter()
            holder.kill()
            while watcher.stats().values["leases"]:
                time.sleep(0)
            times.append(time.perf_counter() - start)
    return [row("killed", {"path": "unix", "nbytes": 0, "clients": 1, "leases": 100}, np.array(times))]


def cpu_s(pid: int) -> float:
    """CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def take_turns(actions: dict[Any, Callable[[int], object]], count: int, seconds: float) -> dict[Any, np.ndarray]:
    """Seconds of each call of each action: round by round, the first two rounds thrown away."""
    times: dict[Any, list[float]] = {name: [] for name in actions}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < count + 5 or (time.perf_counter() < end and turn < 400):
        for name, action in actions.items():
            start = time.perf_counter()
            action(turn % count)
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: np.array(taken[2:]) for name, taken in times.items()}


def in_rows(actions: dict[Any, Callable[[int], object]], count: int) -> dict[Any, np.ndarray]:
    """Seconds of each call of each action, its calls one after the other; the first two of each row thrown away."""
    times: dict[Any, list[float]] = {name: [] for name in actions}
    for _ in range(STEADY_ROUNDS):
        for name, action in actions.items():
            taken: list[float] = []
            while len(taken) < 5 or (len(taken) < STEADY_CALLS and sum(taken) < STEADY_S):
                start = time.perf_counter()
                action(len(taken) % count)
                taken.append(time.perf_counter() - start)
            times[name] += taken[2:]
    return {name: np.array(taken) for name, taken in times.items()}


def row(name: str, params: dict[str, Any], times: np.ndarray, **baselines: np.ndarray | None) -> dict[str, Any]:
    """One result: value is the p50 in milliseconds."""
    p50 = float(np.percentile(times, 50))
    return {
        "name": name,
        "params": params,
        "value": round(p50 * 1e3, 4),
        "unit": "ms",
        "p99": round(float(np.percentile(times, 99)) * 1e3, 4),
        "gb_s": round(params["nbytes"] / p50 / 1e9, 3),
        "ratios": {
            rival: round(float(np.percentile(taken, 50)) / p50, 3)
            for rival, taken in baselines.items()
            if taken is not None
        },
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, for people."""
    print(
        f"{'name':22} {'params':50} {'p50 ms':>9} {'p99 ms':>9} {'GB/s':>7} {'CPU s/GB':>8}  ratios (above 1: better)"
    )
    for r in rows:
        params = " ".join(f"{k}={v / MIB:g}MiB" if k == "nbytes" else f"{k}={v}" for k, v in r["params"].items())
        ratios = "  ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items())
        cpu = f"{r['daemon_cpu_s_per_gb']:8.4f}" if "daemon_cpu_s_per_gb" in r else " " * 8
        times = f"{r['value']:9.3f} {r['p99']:9.3f}" if r["unit"] == "ms" else " " * 19
        gb_s = r["gb_s"] if r["unit"] == "ms" else r["value"]
        print(f"{r['name']:22} {params:50} {times} {gb_s:7.2f} {cpu}  {ratios}")


if __name__ == "__main__":
    main()
