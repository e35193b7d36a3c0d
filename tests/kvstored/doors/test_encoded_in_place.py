"""What warm holds encoded is leased from where it lies: copied to shared memory once, not for each get."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import encode
from kvstore.hit import Hit
from kvstore.packed import PackedTensor
from kvstore.shm.arena import Place
from kvstored_client import Client
from tests.conftest import wait_until
from tests.kvstored.inside import InsideDaemon, daemon_inside

SHAPE = (4, 256, 8, 64)
"""k and v of one chunk: 4 MiB in float32, 550 KiB in 4 bits."""
KEY, OTHER = b"key", b"other"


@pytest.fixture
def inside() -> Iterator[InsideDaemon]:
    with daemon_inside(outside={"promote_after": 0}) as inside:
        yield inside


@pytest.fixture
def client(inside: InsideDaemon) -> Client:
    return inside.client()


def tensors(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPE, generator=g) for name in ("k", "v")}


def in_warm(inside: InsideDaemon, client: Client, key: bytes, seed: int = 1) -> None:
    client.put(key, {name: x.numpy() for name, x in tensors(seed).items()})
    assert client.get(key) is not None  # it has arrived
    inside.store.demote(key)
    assert inside.store.locate([key])[0].tier == "warm"


def bytes_of(hit: Hit | None) -> dict[str, bytes]:
    assert hit is not None
    assert hit.tier == "warm"
    found: dict[str, bytes] = {}
    for name, x in hit.tensors.items():
        assert isinstance(x, PackedTensor)
        found |= {f"{name}.{suffix}": np.asarray(part).tobytes() for suffix, part in x.parts.items()}
    return found


def in_ordinary_memory(inside: InsideDaemon, key: bytes, seed: int = 1) -> None:
    """As what came from the disk or another host."""
    inside.store.put(key, encode(tensors(seed)))
    assert inside.store.locate([key])[0].tier == "warm"


def place_of(inside: InsideDaemon, key: bytes) -> Place:
    entry = inside.store._r.warm.get(key)  # type: ignore[arg-type]
    assert entry is not None
    assert isinstance(entry.block, Place)
    return entry.block


@pytest.mark.parametrize("how", ["it sank", "it was put packed", "it was asked for twice"])
def test_it_is_leased_where_it_lies(inside: InsideDaemon, client: Client, how: str) -> None:
    if how == "it sank":
        in_warm(inside, client, KEY)
    elif how == "it was put packed":
        client.put(KEY, encode(tensors(1)))
    else:
        in_ordinary_memory(inside, KEY)
        assert client.get(KEY, packed=True) is not None
        assert client.get(KEY, packed=True) is not None
    due = bytes_of(inside.store.get(KEY, packed=True))
    assert bytes_of(client.get(KEY, packed=True)) == due
    place, used = place_of(inside, KEY), inside.daemon._encoded.used_nbytes
    assert used > 500_000
    made = inside.arena._generation, inside.daemon._encoded._generation
    for _ in range(3):
        assert bytes_of(client.get(KEY, packed=True)) == due
        assert bytes_of(inside.client().get(KEY, packed=True)) == due
    assert (inside.arena._generation, inside.daemon._encoded._generation) == made, "no block was made for any of them"
    assert place_of(inside, KEY) == place


def test_its_room_is_free_when_it_left(inside: InsideDaemon, client: Client) -> None:
    in_warm(inside, client, KEY)
    in_warm(inside, client, OTHER, seed=2)
    with client.lease(KEY, packed=True) as hit:
        seen = bytes_of(hit)
        del hit
        assert client.get(OTHER, packed=True) is not None
        one = inside.daemon._encoded.used_nbytes // 2
        inside.store.delete(KEY)
        assert inside.daemon._encoded.used_nbytes == 2 * one, "who leased it reads it"
    assert bytes_of(client.get(OTHER, packed=True)) != seen  # the lease is given back with a call
    assert inside.daemon._encoded.used_nbytes == one


def test_another_user_gets_a_copy(inside: InsideDaemon, client: Client) -> None:
    """Its processes may not map the first one's segments, and the entry does not move to and fro."""
    in_warm(inside, client, KEY)
    due = bytes_of(client.get(KEY, packed=True))
    place = place_of(inside, KEY)
    place.segment.owner = "another user's"
    assert bytes_of(client.get(KEY, packed=True)) == due
    assert place_of(inside, KEY) == place
    assert inside.daemon._encoded.gauges()["arena_segments"] == 1


def test_it_sinks_and_comes_back_as_it_was(inside: InsideDaemon, client: Client) -> None:
    in_warm(inside, client, KEY)
    due = bytes_of(client.get(KEY, packed=True))
    inside.store.demote(KEY)
    inside.store.drain()
    assert inside.store.locate([KEY])[0].tier == "cold"
    hit = client.get(KEY, packed=True)
    assert hit is not None
    assert hit.tier == "cold"
    # The thread that wrote it to the disk may let go of it a moment after it said that it is done.
    wait_until(lambda: inside.daemon._encoded.used_nbytes == 0, "the block of what sank was not given back")
    inside.store.promote(KEY)
    found = inside.store.get(KEY, packed=True)
    assert found is not None
    assert {f"{n}.{s}": np.asarray(p).tobytes() for n, x in hit.tensors.items() for s, p in x.parts.items()} == due


def test_without_room_it_is_copied_each_time(inside: InsideDaemon, client: Client) -> None:
    inside.daemon._encoded.limit_nbytes = 1000
    in_warm(inside, client, KEY)
    due = bytes_of(inside.store.get(KEY, packed=True))
    for _ in range(3):
        assert bytes_of(client.get(KEY, packed=True)) == due
    entry = inside.store._r.warm.get(KEY)  # type: ignore[arg-type]
    assert entry is not None
    assert entry.block is None
