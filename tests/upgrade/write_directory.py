"""Write a cold directory with an older version of kvstored: run in its checkout, by `make_fixtures.py`.

    PYTHONPATH=OLD:OLD/daemon:OLD/client python tests/upgrade/write_directory.py FORMAT DIRECTORY SEAL_KEY_FILE

Prints the SHA-256 of every tensor as that version read it back, as JSON: a lossy value is what it decoded, no less.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from contents import (
    BEGAN_AT,
    BLUE,
    SHORT_S,
    TENANT,
    TENANT_PREFIX,
    TTL_MAX_S,
    TTL_S,
    Written,
    of_format,
)

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, StoreConfig, WarmConfig
from kvstore.store import Store


def config(number: int, path: str, codec: str, seal_key: str) -> StoreConfig:
    """Of a store that demotes with one codec; the last one seals."""
    warm, cold = WarmConfig(), ColdConfig(path=path, capacity_nbytes=1 << 30)
    if codec == "layers":
        from kvstore.config import LayerCodec

        warm = WarmConfig(layers={"0": LayerCodec(codec="int8"), "1": LayerCodec(codec="nf4-kv")})
    elif codec in ("int8", "nf4-kv"):
        warm = WarmConfig(codec=codec)
    if number > 1:
        cold = replace(cold, key_files={"*": seal_key} if codec == "sealed" else {"nobody": seal_key})
    return StoreConfig(warm=warm, cold=cold, ttl_s=TTL_S, ttl_max_s=TTL_MAX_S)


def open_store(number: int, path: str, codec: str, seal_key: str, clock: ManualClock) -> Store:
    """With the tenant known."""
    chosen = config(number, path, codec, seal_key)
    if number > 1:
        return Store.open(chosen, clock=clock, framework="numpy", background=False, tenants={TENANT: [TENANT_PREFIX]})
    store = Store.open(chosen, clock=clock, framework="numpy", background=False)
    store.register_tenant(TENANT, [TENANT_PREFIX])
    return store


def put(store: Store, name: bytes, written: Written, parent: str | None = None) -> None:
    """Put, and demote through warm to the disk: a codec encodes on the way what may be encoded."""
    before = None if parent is None else parent.encode()
    assert store.put(name, written.make(), parent=before, **written.options)
    if written.lossy:
        assert store.demote(name) == 1


def write(store: Store, entries: dict[str, Written]) -> None:
    """The entries of one codec."""
    for name, written in entries.items():
        put(store, name.encode(), written, written.parent)
    store.drain()


def write_absent(store: Store, clock: ManualClock) -> None:
    """What a restart must not bring back."""
    x = {"x": torch.arange(100)}
    store.put(b"replaced", x)
    store.put(b"deleted", x)
    store.put(b"deleted root", x)
    store.put(b"deleted with its parent", x, parent=b"deleted root")
    store.put(b"expired", x, ttl_s=SHORT_S)
    store.put(b"pin lapsed", x, ttl_s=SHORT_S)
    store.pin(b"pin lapsed", ttl_s=2 * SHORT_S)
    store.drain()
    assert store.delete(b"deleted", b"deleted root") == 2
    clock.advance(1.0)


def digests(store: Store, names: list[str]) -> dict[str, dict[str, str]]:
    """SHA-256 of each tensor's bytes, as the store gives them out."""
    found = {}
    for name in names:
        hit = store.get(name.encode())
        assert hit is not None, name
        found[name] = {tensor: hashlib.sha256(x.tobytes()).hexdigest() for tensor, x in hit.tensors.items()}
    return found


def main() -> None:
    """From the command line."""
    number, path, seal_key = int(sys.argv[1]), str(Path(sys.argv[2])), sys.argv[3]
    clock, entries = ManualClock(BEGAN_AT), of_format(number)
    for codec in dict.fromkeys(written.codec for written in entries.values()):
        chosen = {name: written for name, written in entries.items() if written.codec == codec}
        with open_store(number, path, codec, seal_key, clock) as store:
            if codec == "auto":
                write_absent(store, clock)
                put(store, TENANT_PREFIX + b"kinds", BLUE)
            write(store, chosen)
    with open_store(number, path, "auto", seal_key, clock) as store:
        json.dump(digests(store, list(entries)), sys.stdout)


if __name__ == "__main__":
    main()
