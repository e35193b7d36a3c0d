"""What the question in front of a `put_prefix` costs, and what it saves: `bench/put_prefix.py [--json]`.

`put_prefix` asks which chunks are held (one touch) and then sends the others, but not where a lookup has missed them:
`missed` is such a put, after an untimed `get_prefix`. `blind` sends all chunks at once, without the question, and the
daemon puts them over what it has. Each round makes one call of every kind, every other round in
the opposite order, so a busy moment of the machine hits all alike; a prefix is three chunks, over the lease socket. The
daemon copies a put after its reply, and the connection's next call waits for that: an untimed question before each call
takes that wait, or a call would be charged for the one before it. `copied` is that wait after the call: what another
call at once would have paid. `value` is the median in ms.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client"), str(ROOT / "bench")]

from rivals import MIB, servers  # noqa: E402 - found by the line above

from kvstored_client import Client  # noqa: E402 - as above

CHUNKS, CHUNK_TOKENS = 3, 16
SIZES = (MIB // 4, MIB, 16 * MIB)
"""Bytes of a prefix."""
ROUNDS = {MIB // 4: 300, MIB: 200, 16 * MIB: 40}


def measure(client: Client, nbytes: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    tokens = CHUNKS * CHUNK_TOKENS
    head_dim = nbytes // (2 * 4 * 4 * tokens)
    space = client.namespace(
        model=f"put_prefix {nbytes}", revision="1", dtype="float32", layers=4, kv_heads=1, head_dim=head_dim,
        layout="lthd", chunk_tokens=CHUNK_TOKENS,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 4, tokens, 1, head_dim), dtype=np.float32)

    def blind(prompt: list[int]) -> int:
        cuts = [slice(i * CHUNK_TOKENS, (i + 1) * CHUNK_TOKENS) for i in range(CHUNKS)]
        chunks = [{"k": k[:, cut], "v": v[:, cut]} for cut in cuts]
        return client.put_many(list(zip(space.keys(prompt), chunks, strict=True)), chain=True, namespace=space.name)

    def fresh(i: int, kind: int) -> list[int]:
        return [kind, i, *range(tokens - 2)]

    held = fresh(0, 9)
    space.put_prefix(held, k, v)
    ways: dict[str, Callable[[int], int]] = {
        "new.asked": lambda i: space.put_prefix(fresh(i, 1), k, v),
        "new.missed": lambda i: space.put_prefix(fresh(i, 3), k, v),
        "new.blind": lambda i: blind(fresh(i, 2)),
        "held.asked": lambda _: space.put_prefix(held, k, v),
        "held.blind": lambda _: blind(held),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    copied: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(ROUNDS[nbytes]):
        for name, way in ways.items() if i % 2 else reversed(ways.items()):
            if name == "new.missed":
                space.get_prefix(fresh(i, 3))
            client.match([b"settled"])
            began = time.perf_counter()
            stored = way(i)
            taken[name].append((time.perf_counter() - began) * 1e3)
            client.match([b"settled"])
            copied[name].append((time.perf_counter() - began) * 1e3 - taken[name][-1])
            if stored != (0 if name == "held.asked" else CHUNKS):
                raise AssertionError(f"{name} stored {stored} chunks")
        for kind in (1, 2, 3):
            space.forget(fresh(i, kind))
    return [row(name, nbytes, taken[name][5:], copied[name][5:]) for name in ways]


def row(name: str, nbytes: int, times: list[float], copied: list[float]) -> dict[str, Any]:
    """One line of the results."""
    found = np.array(times)
    return {
        "name": name,
        "params": {"nbytes": nbytes, "chunks": CHUNKS, "calls": len(times)},
        "value": round(float(np.median(found)), 4),
        "unit": "ms",
        "p90": round(float(np.quantile(found, 0.9)), 4),
        "copied": round(float(np.median(copied)), 4),
    }


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    with servers() as up, Client(up.kvstored_unix, framework="numpy", on_error="raise") as client:
        for nbytes in SIZES:
            for found in measure(client, nbytes):
                if args.json:
                    print(json.dumps(found), flush=True)
                else:
                    times = [found[kind] for kind in ("value", "p90", "copied")]
                    print(f"{nbytes:9} {found['name']:12}", *(f"{ms:8.3f}" for ms in times))


if __name__ == "__main__":
    main()
