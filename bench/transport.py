"""Put, get and view against Redis, memcached and a bare copy: `bench/transport.py [--json]`.

Every subject of a size takes its turn in each round, so that a busy moment of the machine hits all alike. Ratios are
the baseline's p50 over ours, from that same run: above 1 means faster than the baseline.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rivals import MIB, Servers, Subject, memcached_subject, payloads, redis_subject, servers

from kvstored_client import Client

SIZES = (MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
ROTATION_NBYTES = 256 * MIB
"""Distinct payloads in rotation, so that no cache of the CPU holds them: 8 times its L3."""
SECONDS_A_SIZE = 6.0


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--seconds", type=float, default=SECONDS_A_SIZE, help="for each size")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def show(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        if args.json:
            print(*map(json.dumps, found), sep="\n", flush=True)

    torch.set_num_threads(1)
    with servers() as up:
        for nbytes in SIZES:
            show(measure(up, nbytes, args.seconds))
        show(batch(up))
        show(many_clients(up, 16 * MIB, 2.0))
    if not args.json:
        print_table(rows)


def measure(up: Servers, nbytes: int, seconds: float) -> list[dict[str, Any]]:
    """One size: all verbs over all paths, the rivals beside them, one client each."""
    count = max(2, min(16, ROTATION_NBYTES // nbytes))
    values = payloads(nbytes, count)
    keys = [b"%d-%d" % (nbytes, i) for i in range(count)]
    actions: dict[tuple[str, str, str], Callable[[int], object]] = {}
    for system, path, subject in subjects(up):
        x = [value.tobytes() for value in values] if system == "memcached" else values
        actions[system, "put", path] = lambda i, s=subject, x=x: s.put(keys[i], x[i])
        actions[system, "get", path] = lambda i, s=subject: s.get(keys[i])
    near = client_of(up, "unix")
    out = {"x": np.zeros(nbytes // 4, dtype=np.float32)}
    actions["kvstored", "get.out", "unix"] = lambda i: near.get(keys[i], out=out)
    actions["kvstored", "view", "unix"] = lambda i: view(near, keys[i])
    source, target = [torch.from_numpy(value) for value in values], torch.zeros(nbytes // 4)
    actions["memcpy", "copy", ""] = lambda i: target.copy_(source[i])
    times = take_turns(actions, count, seconds)
    rows = []
    for system, verb, path in actions:
        if system != "kvstored":
            continue
        rival = "put" if verb == "put" else "get"
        # Over shared memory the fair Redis is the faster of its two sockets; over TCP it is TCP.
        redis = [times[key] for key in (("redis", rival, "tcp"), ("redis", rival, "unix")) if key in times]
        rows.append(
            row(
                "get.tcp.raw" if (verb, path) == ("get", "tcp") else verb,
                {"path": path, "nbytes": nbytes, "clients": 1},
                times[system, verb, path],
                redis=min(redis[: 1 if path == "tcp" else 2], key=np.median) if redis else None,
                memcached=times.get(("memcached", rival, "unix")),
                memcpy=times["memcpy", "copy", ""],
            )
        )
    # Also under the plain name, as every path's get.
    rows += [{**r, "name": "get"} for r in rows if r["name"] == "get.tcp.raw"]
    return rows


def subjects(up: Servers) -> list[tuple[str, str, Subject]]:
    """Who takes part: (system, path, subject)."""
    found: list[tuple[str, str, Subject | None]] = []
    for path in ("unix", "tcp"):
        found += [("kvstored", path, kvstored_subject(up, path)), ("redis", path, redis_subject(up, path))]
    found.append(("memcached", "unix", memcached_subject(up)))
    return [(system, path, subject) for system, path, subject in found if subject is not None]


def client_of(up: Servers, path: str) -> Client:
    """A client that raises rather than misses."""
    return Client(up.kvstored_unix if path == "unix" else up.kvstored_tcp, framework="numpy", on_error="raise")


def view(client: Client, key: bytes) -> None:
    """A leased hit, looked at and let go."""
    with client.lease(key) as hit:
        assert hit is not None, key


def kvstored_subject(up: Servers, path: str) -> Subject:
    """Our client, into fresh numpy arrays: shared memory on the unix socket, the stream on TCP."""
    client = client_of(up, path)

    def get(key: bytes) -> object:
        hit = client.get(key)
        assert hit is not None, key
        return hit

    return Subject(lambda key, x: client.put(key, {"x": x}), get)


def many_clients(up: Servers, nbytes: int, seconds: float) -> list[dict[str, Any]]:
    """The same get into existing tensors by one process and by eight at once: bytes a second in all."""
    with client_of(up, "unix") as client:
        for i, value in enumerate(payloads(nbytes, 8)):
            client.put(b"many-%d" % i, {"x": value})
    context = multiprocessing.get_context("spawn")
    totals: dict[int, float] = {}
    cpu: dict[int, float] = {}
    for clients in (1, 8):
        results: multiprocessing.Queue[float] = context.Queue()
        barrier = context.Barrier(clients + 1)
        workers = [
            context.Process(target=pull, args=(up.kvstored_unix, nbytes, seconds, barrier, results))
            for _ in range(clients)
        ]
        for worker in workers:
            worker.start()
        barrier.wait(120)
        before = cpu_s(up.kvstored_pid)
        totals[clients] = sum(results.get() for _ in workers)
        cpu[clients] = (cpu_s(up.kvstored_pid) - before) / (totals[clients] * seconds)
        for worker in workers:
            worker.join()
    return [
        {
            "name": "get.out",
            "params": {"path": "unix", "nbytes": nbytes, "clients": clients, "measure": "throughput"},
            "value": round(total, 3),
            "unit": "GB/s",
            "daemon_cpu_s_per_gb": round(cpu[clients], 4),
            "ratios": {"one_client": round(total / totals[1], 3)},
        }
        for clients, total in totals.items()
    ]


def pull(address: str, nbytes: int, seconds: float, barrier: Any, results: Any) -> None:
    """One process of `many_clients`."""
    out = {"x": np.zeros(nbytes // 4, dtype=np.float32)}
    moved = 0
    with Client(address, framework="numpy", on_error="raise") as client:
        for i in range(8):
            client.get(b"many-%d" % i, out=out)
        barrier.wait(120)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            client.get(b"many-%d" % (moved % 8), out=out)
            moved += 1
        results.put(moved * nbytes / (time.perf_counter() - start) / 1e9)


def batch(up: Servers) -> list[dict[str, Any]]:
    """One view of 100 keys of 64 KiB beside one of one key."""
    keys = [b"batch-%d" % i for i in range(100)]
    client = client_of(up, "unix")
    client.put_many([(key, {"x": np.zeros(1 << 14, dtype=np.float32)}) for key in keys])

    def views(n: int) -> None:
        with client.lease_many(keys[:n]) as hits:
            assert len(hits) == n

    times = take_turns({n: lambda _, n=n: views(n) for n in (1, 100)}, 50, 2.0)
    params = {"path": "unix", "nbytes": 100 << 16, "clients": 1, "keys": 100}
    return [row("view", params, times[100], one_key=times[1])]


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


def row(name: str, params: dict[str, Any], times: np.ndarray, **baselines: np.ndarray | None) -> dict[str, Any]:
    """One result: value is the p50 in milliseconds."""
    p50 = float(np.percentile(times, 50))
    nbytes = params["nbytes"]
    return {
        "name": name,
        "params": params,
        "value": round(p50 * 1e3, 4),
        "unit": "ms",
        "p99": round(float(np.percentile(times, 99)) * 1e3, 4),
        "gb_s": round(nbytes / p50 / 1e9, 3),
        "ratios": {
            rival: round(float(np.percentile(taken, 50)) / p50, 3)
            for rival, taken in baselines.items()
            if taken is not None
        },
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, for people."""
    print(f"{'name':12} {'params':44} {'p50 ms':>9} {'p99 ms':>9} {'GB/s':>7}  ratios (above 1: better than)")
    for r in rows:
        params = " ".join(f"{k}={v / MIB:g}MiB" if k == "nbytes" else f"{k}={v}" for k, v in r["params"].items())
        ratios = "  ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items())
        if r["unit"] == "ms":
            print(f"{r['name']:12} {params:44} {r['value']:9.3f} {r['p99']:9.3f} {r['gb_s']:7.2f}  {ratios}")
        else:
            cpu = f"daemon {r['daemon_cpu_s_per_gb']:.4f} CPU s/GB"
            print(f"{r['name']:12} {params:44} {'':9} {'':9} {r['value']:7.2f}  {ratios}  {cpu}")


if __name__ == "__main__":
    main()
