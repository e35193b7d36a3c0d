"""How long an event loop stands still while the asyncio client gets 16 MiB: `bench/aio.py [--json]`.

A task takes every turn of the loop and notes the longest time between two of its turns, for each call. Beside it, what
is no fault of the client's: the same with nothing else on the loop, which is the machine's own noise, and the same with
the blocking client in a thread for each get. `value` is the median over the calls of the longest stall of each; `max`
is the longest of all, which one interrupt of the machine decides; `over` calls stalled it for over 2 ms. `alone_max` is
the longest of the calls in which no thread of this process waited for a processor for longer than 0.1 ms, `alone` of
them: the others say what the kernel did.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client"), str(ROOT / "bench")]

from rivals import MIB, servers  # noqa: E402 - found by the line above

from kvstored_client import Client, aio  # noqa: E402

NBYTES = 16 * MIB
GETS = 600
DUE_MS = 2
ALONE_MS = 0.1
KEYS = [b"aio-%d" % i for i in range(8)]
"""More than the last cache of the CPU holds, in rotation."""


class Waits:
    """What the kernel lets the threads of this process wait for a processor, all of them together."""

    def __init__(self) -> None:
        tasks = Path("/proc/self/task").iterdir()
        self._files = [os.open(task / "schedstat", os.O_RDONLY) for task in tasks]

    def seconds(self) -> float:
        """So far."""
        return sum(int(os.pread(file, 99, 0).split()[1]) for file in self._files) / 1e9

    def close(self) -> None:
        """Of its files."""
        for file in self._files:
            os.close(file)


async def stalls(call: Callable[[int], Awaitable[object]]) -> np.ndarray[Any, Any]:
    """For each call the longest time between two turns of the loop and what its process waited for a processor, ms."""
    longest = 0.0
    over = False
    waits = Waits()

    async def beat() -> None:
        nonlocal longest
        before = time.perf_counter()
        while not over:
            await asyncio.sleep(0)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now

    found = []
    beating = asyncio.ensure_future(beat())
    for i in range(GETS):
        waited = waits.seconds()
        await asyncio.sleep(0)
        longest = 0.0
        await call(i)
        found.append((longest, waits.seconds() - waited))
    over = True
    await beating
    waits.close()
    return np.array(found) * 1e3


async def measure(address: str) -> list[dict[str, Any]]:
    """A row for each way."""
    rng = np.random.default_rng(1)
    out = {"x": np.zeros(NBYTES, np.uint8)}
    with Client(address, framework="numpy", on_error="raise") as near:
        async with aio.Client(address, framework="numpy", on_error="raise") as client:
            for key in KEYS:
                await client.put(key, {"x": rng.integers(0, 256, NBYTES, np.uint8)})

            async def idle(_: int) -> None:
                await asyncio.sleep(0.004)

            ways: dict[str, Callable[[int], Awaitable[object]]] = {
                "aio.stall": lambda i: client.get(KEYS[i % len(KEYS)]),
                "aio.stall.out": lambda i: client.get(KEYS[i % len(KEYS)], out=out),
                "aio.stall.put": lambda i: client.put(KEYS[i % len(KEYS)], out),
                "to_thread.stall": lambda i: asyncio.to_thread(near.get, KEYS[i % len(KEYS)]),
                "idle.stall": idle,
            }
            for call in ways.values():
                for i in range(len(KEYS)):
                    await call(i)
            return [row(name, await stalls(call)) for name, call in ways.items()]


def row(name: str, found: np.ndarray[Any, Any]) -> dict[str, Any]:
    """One line of the results."""
    found, waited = found.T
    alone = found[waited < ALONE_MS]
    return {
        "name": name,
        "params": {"nbytes": NBYTES, "gets": GETS},
        "value": round(float(np.median(found)), 3),
        "unit": "ms",
        "p90": round(float(np.quantile(found, 0.9)), 3),
        "max": round(float(found.max()), 3),
        "over": int((found > DUE_MS).sum()),
        "alone": len(alone),
        "alone_max": round(float(alone.max(initial=0)), 3),
    }


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    with servers() as up:
        for found in asyncio.run(measure(up.kvstored_unix)):
            if args.json:
                print(json.dumps(found), flush=True)
            else:
                told = f"{found['value']:8.3f} ms, p90 {found['p90']:8.3f}, max {found['max']:8.3f}"
                told += f", {found['over']} over {DUE_MS} ms; {found['alone']} alone, max {found['alone_max']:.3f}"
                print(f"{found['name']:18} {told}")


if __name__ == "__main__":
    main()
