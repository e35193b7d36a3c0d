"""Puts and gets of values that follow from their keys. Without torch: eight processes that import it take minutes."""

from typing import Any

import numpy as np

from kvstored_client import Client


def value_of(key: bytes) -> Any:
    """The one value of a key."""
    seed = int.from_bytes(key, "little")
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, 1000 + seed * 37_003 % 600_000, dtype=np.uint8)


def hammer(client: Client, seed: int, rounds: int) -> tuple[int, int]:
    """(wrong answers, hits)."""
    rng = np.random.default_rng(seed)
    wrong = hits = 0
    for _ in range(rounds):
        key = bytes([int(rng.integers(0, 60))])
        if rng.random() < 0.4:
            client.put(key, {"x": value_of(key)}, fidelity="exact")
        elif rng.random() < 0.1:
            client.delete(key)
        else:
            hit = client.get(key)
            hits += hit is not None
            wrong += hit is not None and not np.array_equal(hit.tensors["x"], value_of(key))
    return wrong, hits


def work(address: str, seed: int, results: Any) -> None:
    """What a process does."""
    with Client(address, framework="numpy", on_error="raise", timeout_s=30) as client:
        results.put(hammer(client, seed, 40))
