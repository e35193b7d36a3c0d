"""Calls over the limit of keys mean what one call would, over an embedded store, a daemon and a guard."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.errors import OverQuota
from kvstore.keys import KEYS_PER_CALL_MAX
from kvstore.pieces import Pieces, in_pieces
from kvstore.prefix import Namespace
from kvstore.store import Store
from kvstored_client.integrations.guard import Guard
from tests.conftest import DaemonProcess

N = 10_000
DOOR_N = {"store": 5_000, "daemon": 10_000, "guard": 5_000}
IDENTITY: dict[str, Any] = {
    "model": "m", "revision": "r", "dtype": "float32", "layers": 1, "kv_heads": 1, "head_dim": 2, "layout": "lthd",
}  # fmt: skip


@contextmanager
def embedded() -> Iterator[Any]:
    with Store.open() as store:
        yield store


@pytest.fixture(scope="module")
def value() -> dict[str, Any]:
    return {"x": np.zeros(1, dtype=np.float32)}


@pytest.fixture(params=list(DOOR_N))
def door(request: pytest.FixtureRequest, shared_daemon: DaemonProcess) -> Iterator[tuple[Any, int]]:
    """A cache and how many keys it is asked with."""
    n = DOOR_N[request.param]
    if request.param == "store":
        with embedded() as store:
            yield in_pieces(store), n
        return
    client = shared_daemon.client()
    guarded = Guard(client, lookup_timeout_s=60, fetch_timeout_s=60)
    yield (guarded if request.param == "guard" else in_pieces(client)), n


def chain(door: str, n: int = N) -> list[bytes]:
    return [f"{door}/{i:05}".encode() for i in range(n)]


def test_any_number_of_keys_is_put_matched_got_touched_pinned_and_deleted(
    door: tuple[Any, int], value: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    cache, n = door
    keys, held = chain(request.node.name, n), n - 500
    assert cache.put_many([(key, value) for key in keys[:held]], chain=True) == held
    assert cache.match(keys) == held
    assert cache.match([*keys[:4_200], b"another", *keys[4_200:]]) == 4_200
    assert [at is not None for at in cache.locate(keys)] == [True] * held + [False] * 500
    assert len(cache.get_many(keys, leading=True)) == held
    found = cache.get_many([b"another", *keys])
    assert [hit is not None for hit in found] == [False] + [True] * held + [False] * 500
    assert found[1 + 4_200].key == keys[4_200]
    with cache.lease_many(keys, leading=True) as hits:
        assert sum(hit is not None for hit in hits) == held
    assert cache.touch(keys) == held
    assert cache.pin(*keys) == held
    assert cache.unpin(*keys) == held
    assert cache.delete(*reversed(keys)) == held
    assert cache.match(keys) == 0


class Recording:
    """A cache that says yes, and which keys each call named."""

    def __init__(self, stored: int | None = None) -> None:
        self.calls: list[tuple[str, list[bytes], dict[str, Any]]] = []
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        def verb(*args: Any, **how: Any) -> Any:
            given = list(args) if name in ("pin", "unpin", "delete") else list(args[0])
            keys = [key for key, _ in given] if name == "put_many" else given
            self.calls.append((name, keys, how))
            if name == "put_many" and self._stored is not None:
                return min(len(keys), self._stored)
            return keys if name == "get_many" else len(keys)

        return verb


def test_a_chain_is_put_root_first_each_piece_on_the_one_before_and_its_root_ends_most_recent() -> None:
    keys, cache = chain("c"), Recording()
    assert Pieces(cache).put_many([(key, {}) for key in keys], chain=True, parent=b"before") == N
    puts = [(call[1][0], call[2]["parent"]) for call in cache.calls[:3]]
    assert puts == [(keys[0], b"before"), (keys[4096], keys[4095]), (keys[8192], keys[8191])]
    assert [(name, found[0]) for name, found, _ in cache.calls[3:]] == [("touch", keys[4096]), ("touch", keys[0])]


def test_a_chain_ends_with_the_piece_that_was_not_stored_in_full() -> None:
    cache = Recording(stored=4000)
    assert Pieces(cache).put_many([(key, {}) for key in chain("c")], chain=True) == 4000
    assert [name for name, _, _ in cache.calls if name == "put_many"] == ["put_many"]


@pytest.mark.parametrize("verb", ["touch", "pin", "unpin", "get_many"])
def test_the_deepest_piece_goes_first(verb: str) -> None:
    keys, cache = chain("c"), Recording()
    call = getattr(Pieces(cache), verb)
    found = call(*keys) if verb in ("pin", "unpin") else call(keys)
    assert found == (keys if verb == "get_many" else N)
    assert [call[1][0] for call in cache.calls] == [keys[8192], keys[4096], keys[0]]


def test_a_leading_get_of_pieces_leaves_the_root_most_recent() -> None:
    keys, cache = chain("c"), Recording()
    assert Pieces(cache).get_many(keys, leading=True) == keys
    assert [(name, found[0]) for name, found, _ in cache.calls[3:]] == [("touch", keys[4096]), ("touch", keys[0])]


def test_a_call_within_the_limit_goes_through_as_it_is() -> None:
    cache, keys = Recording(), chain("c", KEYS_PER_CALL_MAX)
    pieces = in_pieces(in_pieces(cache))
    pieces.match(keys)
    pieces.delete(*keys, keep_shared=True)
    assert cache.calls == [("match", keys, {}), ("delete", keys, {"keep_shared": True})]


def test_a_pinned_chain_over_the_quota_leaves_nothing_pinned() -> None:
    class Full(Recording):
        def pin(self, *keys: bytes, **_: Any) -> int:
            raise OverQuota(f"{len(keys)}")

    cache = Full()
    with pytest.raises(OverQuota):
        Pieces(cache).pin(*chain("c"))
    assert not cache.calls


@pytest.mark.parametrize("where", ["store", "daemon"])
def test_a_prefix_of_more_chunks_than_a_call_has_keys_is_kept_and_given_back(
    where: str, shared_daemon: DaemonProcess
) -> None:
    n = 4_200
    tokens = list(range(n))
    k, v = torch.randn(2, 1, n, 1, 2).unbind()
    with embedded() as store:
        client = store if where == "store" else shared_daemon.client(timeout_s=60, framework="torch")
        space = client.namespace(**{**IDENTITY, "model": f"long {where}"}, chunk_tokens=1)
        assert isinstance(space, Namespace)
        assert space.put_prefix(tokens[:4_150], k[:, :4_150], v[:, :4_150]) == 4_150
        assert space.put_prefix(tokens, k, v) == 50
        assert space.match_prefix(tokens) == n
        assert space.pin_prefix(tokens) == n
        assert space.unpin_prefix(tokens) == n
        found, k_got, v_got = space.get_prefix(tokens)
        assert found == n
        assert torch.equal(k_got, k) and torch.equal(v_got, v)
        assert space.get_prefix_hits(tokens)[0] == n
        assert space.forget(tokens) == n
        assert space.match_prefix(tokens) == 0
