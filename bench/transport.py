"""Put and get against Redis: `bench/transport.py [--json]`.

Every subject of a size takes its turn in each round, so that a busy moment of the machine hits all alike. Ratios are
the baseline's p50 over ours, from that same run: above 1 means faster than the baseline.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rivals import MIB, Servers, Subject, payloads, redis_subject, servers

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
    with servers() as up:
        for nbytes in SIZES:
            for row in measure(up, nbytes, args.seconds):
                rows.append(row)
                if args.json:
                    print(json.dumps(row), flush=True)
    if not args.json:
        print_table(rows)


def measure(up: Servers, nbytes: int, seconds: float) -> list[dict[str, Any]]:
    """One size: put and get over unix and TCP, Redis beside each."""
    count = max(2, min(16, ROTATION_NBYTES // nbytes))
    values = payloads(nbytes, count)
    keys = [b"%d-%d" % (nbytes, i) for i in range(count)]
    actions: dict[tuple[str, str, str], Callable[[int], object]] = {}
    for path in ("unix", "tcp"):
        for system, subject in (("kvstored", kvstored_subject(up, path)), ("redis", redis_subject(up, path))):
            if subject is None:
                continue
            actions[system, "put", path] = lambda i, s=subject: s.put(keys[i], values[i])
            actions[system, "get", path] = lambda i, s=subject: s.get(keys[i])
    times = take_turns(actions, count, seconds)
    rows = []
    for path in ("unix", "tcp"):
        for verb in ("put", "get"):
            rival = times.get(("redis", verb, path))
            rows.append(row(verb, {"path": path, "nbytes": nbytes}, times["kvstored", verb, path], redis=rival))
    return rows


def kvstored_subject(up: Servers, path: str) -> Subject:
    """Our client, into fresh numpy arrays."""
    client = Client(up.kvstored_unix if path == "unix" else up.kvstored_tcp, framework="numpy", on_error="raise")

    def get(key: bytes) -> object:
        hit = client.get(key)
        assert hit is not None, key
        return hit

    return Subject(lambda key, x: client.put(key, {"x": x}), get)


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
    print(f"{'name':12} {'params':34} {'p50 ms':>9} {'p99 ms':>9} {'GB/s':>7}  ratios (above 1: faster than)")
    for r in rows:
        params = " ".join(f"{k}={v / MIB:g}MiB" if k == "nbytes" else f"{k}={v}" for k, v in r["params"].items())
        ratios = "  ".join(f"{k} {v:.2f}" for k, v in r["ratios"].items())
        print(f"{r['name']:12} {params:34} {r['value']:9.3f} {r['p99']:9.3f} {r['gb_s']:7.2f}  {ratios}")


if __name__ == "__main__":
    main()
