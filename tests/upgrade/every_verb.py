"""Every verb of a client, checked: the client is whichever version the interpreter that runs this has.

    python tests/upgrade/every_verb.py [shared|stream ADDRESS] ...

Prints JSON: the client's package, and for each door what each verb answered. A value that is not the one put ends it
with an error.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import kvstored_client
from kvstore import errors
from kvstored_client import Client

BIG = 300_000
"""Over the size from which shared memory serves a get in place."""


def tensors(seed: int, nbytes: int) -> dict[str, np.ndarray]:
    """Bytes, keys as bfloat16, and a scalar."""
    rng = np.random.RandomState(seed)
    return {
        "x": rng.randint(0, 256, nbytes).astype(np.uint8),
        "k": rng.standard_normal((2, 8, 2, 4)).astype(ml_dtypes.bfloat16),
        "n": np.array(seed, np.int64),
    }


def check(hit: Any, seed: int, nbytes: int) -> str:
    """The tier of a hit that holds what was put, of the same types. Raises AssertionError."""
    assert hit is not None, f"entry {seed} is missing"
    wanted = tensors(seed, nbytes)
    assert list(hit.tensors) == list(wanted)
    for name, x in wanted.items():
        got = hit.tensors[name]
        assert (got.dtype, got.shape) == (x.dtype, x.shape), (name, got.dtype, got.shape)
        assert got.tobytes() == x.tobytes(), f"{name} of entry {seed} has other bytes"
    assert not hit.lossy
    return str(hit.tier)


def tier_in_time(client: Client, key: bytes, wanted: str) -> str:
    """Where entry 1 is, once it is where it is wanted: `promote` answers 0 where the get before is still at it."""
    ends = time.monotonic() + 30
    while (found := check(client.get(key), 1, BIG)) != wanted and time.monotonic() < ends:
        time.sleep(0.01)
    return found


def leases(client: Client, of_this_door: int) -> int:
    """How many the daemon counts, once it has heard of the last ones that ended."""
    ends = time.monotonic() + 30
    while (found := int(client.stats().values["leases"])) != of_this_door and time.monotonic() < ends:
        time.sleep(0.01)
    return found


def values(client: Client, own: bytes, of_this_door: int) -> dict[str, Any]:
    """Puts and gets: alone, many, a chain, into the caller's memory, leased, and from memory of the daemon's.

    of_this_door: how many leases the daemon counts while one is held here.
    """
    told: dict[str, Any] = {}
    keys = [own + b"%d" % i for i in range(6)]
    sizes = [10, BIG, 2 * BIG, 0, 5000, BIG]
    for i in (0, 1):
        assert client.put(keys[i], tensors(i, sizes[i]), fidelity="exact", ttl_s=600) is True
    chain = [(keys[i], tensors(i, sizes[i])) for i in (2, 3, 4, 5)]
    told["put_many"] = client.put_many(chain, chain=True, fidelity="exact", namespace="model@1")
    told["get"] = [check(client.get(key), i, sizes[i]) for i, key in enumerate(keys)]
    told["get_many"] = [check(hit, i, sizes[i]) for i, hit in enumerate(client.get_many(keys))]
    missing = client.get_many([keys[2], own + b"nothing", keys[3]], leading=True)
    told["leading"] = [hit is not None for hit in missing]
    out = {name: np.zeros_like(x) for name, x in tensors(1, BIG).items()}
    check(client.get(keys[1], out=out), 1, BIG)
    assert out["x"].tobytes() == tensors(1, BIG)["x"].tobytes()
    with client.lease(keys[1]) as hit:
        told["lease"] = check(hit, 1, BIG)
        told["leased"] = leases(client, of_this_door)
    with client.lease_many(keys) as hits:
        told["lease_many"] = [check(hit, i, sizes[i]) for i, hit in enumerate(hits)]
    made = client.empty((BIG,), "uint8")
    made[:] = tensors(7, BIG)["x"]
    assert client.put(own + b"made", {**tensors(7, BIG), "x": made})
    told["empty"] = check(client.get(own + b"made"), 7, BIG)
    for seed in (8, 9):  # one key, put again at once: the later value
        assert client.put(own + b"again", tensors(seed, BIG))
    told["again"] = check(client.get(own + b"again"), 9, BIG)
    return told


def verbs(client: Client, own: bytes) -> dict[str, Any]:
    """The others, an operator's among them."""
    keys = [own + b"%d" % i for i in range(6)]
    told: dict[str, Any] = {"match": int(client.match([*keys[2:], own + b"nothing"]))}
    told["locate"] = [held is not None and held.tier for held in client.locate([*keys[:2], own + b"nothing"])]
    told["touch"] = client.touch(keys, ttl_s=500)
    told["pin"] = client.pin(keys[0], ttl_s=60)
    info = client.inspect(keys[0])
    assert info is not None
    told["inspect"] = [info.pinned, info.fidelity, info.value_nbytes, info.namespace]
    told["namespace"] = client.inspect(keys[2]).namespace  # type: ignore[union-attr]
    told["unpin"] = client.unpin(keys[0])
    told["demote"] = [client.demote(keys[1]), client.demote(keys[1])]
    told["drain"] = client.drain() > 0
    told["cold"] = check(client.get(keys[1]), 1, BIG)
    told["promote"] = [client.promote(keys[1]) in (0, 1), tier_in_time(client, keys[1], "hot")]
    told["verify"] = list(client.verify())[-1].corrupt
    told["entries"] = sorted(entry.key.removeprefix(own).decode() for entry in client.entries(key_prefix=own))
    told["report"] = client.report(prefill_saved_s=0.5)
    told["evict"] = client.evict(own + b"again")
    told["delete"] = [client.delete(keys[2]), client.get(keys[3]) is None, client.delete(own + b"nothing")]
    told["explain"] = [found.state for found in client.explain(keys[0], keys[2], own + b"nothing")]
    return told


def refusals(client: Client, own: bytes) -> list[str]:
    """The kinds of error that bad calls get: an answer in words, not a broken call."""
    calls = (
        lambda: client.put(own + b"bad", tensors(0, 1), ttl_s=1e12),
        lambda: client.put(own + b"bad", tensors(0, 1), namespace="x" * 1000),
        lambda: client.pin(own + b"0", ttl_s=-1),
    )
    found = []
    for call in calls:
        try:
            call()
        except errors.KvstoreError as error:
            found.append(type(error).__name__ if len(str(error).split()) > 3 else str(error))
        else:
            found.append("")
    return found


def main() -> None:
    """From the command line."""
    told = []
    for i, (door, address) in enumerate(zip(sys.argv[1::2], sys.argv[2::2], strict=True)):
        own = b"%d " % i
        # decode="daemon": the client's own decoding needs torch, and a light client has none.
        with Client(
            address, framework="numpy", on_error="raise", timeout_s=60, shared_memory=door == "shared", decode="daemon"
        ) as client:
            data = values(client, own, int(door == "shared"))
            told.append({**data, **verbs(client, own), "refused": refusals(client, own)})
            told[-1]["failures"] = client.failures
    json.dump([str(Path(kvstored_client.__file__).parent), *told], sys.stdout)


if __name__ == "__main__":
    main()
