"""Calls over the limit of keys mean what one call would, over an embedded store, a daemon and a guard."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import pieces
from kvstore.errors import InvalidEntry, OverQuota
from kvstore.keys import KEYS_PER_CALL_MAX
from kvstore.pieces import Pieces, in_pieces
from kvstore.prefix import Namespace
from kvstore.store import Store
from kvstored_client.integrations.guard import Guard

N = 10_000
DOORS = ("store", "daemon", "guard")
SMALL = 64
"""The length of a piece where every verb is tried: what is cut is the same, and quick."""
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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "KEYS_PER_CALL_MAX", SMALL)


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A cache that takes any number of keys, by one of three ways."""
    if request.param == "store":
        with embedded() as store:
            yield in_pieces(store)
        return
    client = request.getfixturevalue("shared_daemon").client(timeout_s=60)
    yield Guard(client, lookup_timeout_s=60, fetch_timeout_s=60) if request.param == "guard" else in_pieces(client)


def chain(door: str, n: int = N) -> list[bytes]:
    return [f"{door}/{i:05}".encode() for i in range(n)]


@pytest.mark.usefixtures("small")
def test_any_number_of_keys_is_put_matched_got_touched_pinned_and_deleted(
    door: Any, value: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    n, held, within = 3 * SMALL, 3 * SMALL - 20, SMALL + 10
    keys = chain(request.node.name, n)
    assert door.put_many([(key, value) for key in keys[:held]], chain=True) == held
    assert door.match(keys) == held
    assert door.match([*keys[:within], b"another", *keys[within:]]) == within
    assert [at is not None for at in door.locate(keys)] == [True] * held + [False] * 20
    assert len(door.get_many(keys, leading=True)) == held
    found = door.get_many([b"another", *keys])
    assert [hit is not None for hit in found] == [False] + [True] * held + [False] * 20
    assert found[1 + within].key == keys[within]
    with door.lease_many(keys, leading=True) as hits:
        assert sum(hit is not None for hit in hits) == held
    assert door.touch(keys) == held
    assert door.pin(*keys) == held
    assert door.unpin(*keys) == held
    assert door.delete(*reversed(keys)) == held
    assert door.match(keys) == 0


def test_the_real_limit_is_no_limit_of_a_call(door: Any, value: dict[str, Any], request: pytest.FixtureRequest) -> None:
    keys = chain(request.node.name, KEYS_PER_CALL_MAX + 1)
    assert door.put_many([(keys[0], value)]) == 1
    assert door.match(keys) == 1
    assert sum(at is not None for at in door.locate(keys)) == 1
    assert [hit is not None for hit in door.get_many(keys)] == [True] + [False] * KEYS_PER_CALL_MAX
    assert door.touch(keys) == 1
    assert door.delete(*keys) == 1


def test_the_cache_itself_refuses_a_longer_call() -> None:
    with embedded() as store, pytest.raises(InvalidEntry, match="4096"):
        store.locate(chain("c", KEYS_PER_CALL_MAX + 1))


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
    found: Any = Pieces(cache).get_many(keys, leading=True)
    assert found == keys
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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("where", ["store", "daemon"])
def test_a_prefix_of_more_chunks_than_a_call_has_keys_is_kept_and_given_back(
    where: str, request: pytest.FixtureRequest
) -> None:
    n, first = 3 * SMALL, 3 * SMALL - 50
    tokens = list(range(n))
    k, v = torch.randn(2, 1, n, 1, 2).unbind()
    with embedded() as store:
        daemon = None if where == "store" else request.getfixturevalue("shared_daemon")
        cache = store if daemon is None else daemon.client(timeout_s=60, framework="torch")
        space = cache.namespace(**{**IDENTITY, "model": f"long {where}"}, chunk_tokens=1)
        assert isinstance(space, Namespace)
        assert space.put_prefix(tokens[:first], k[:, :first], v[:, :first]) == first
        assert space.put_prefix(tokens, k, v) == n - first
        assert space.match_prefix(tokens) == n
        assert space.pin_prefix(tokens) == n
        assert space.unpin_prefix(tokens) == n
        found, k_got, v_got = space.get_prefix(tokens)
        assert found == n
        assert torch.equal(k_got, k) and torch.equal(v_got, v)
        assert space.get_prefix_hits(tokens)[0] == n
        assert space.forget(tokens) == n
        assert space.match_prefix(tokens) == 0


def test_a_prompt_of_over_4096_chunks_is_looked_up_and_forgotten() -> None:
    n = KEYS_PER_CALL_MAX + 1
    tokens, k = list(range(n)), torch.ones(1, n, 1, 2)
    with embedded() as store:
        space = store.namespace(**IDENTITY, chunk_tokens=1)
        assert space.put_prefix(tokens[:3], k[:, :3], k[:, :3]) == 3
        assert space.match_prefix(tokens) == 3
        assert space.get_prefix(tokens)[0] == 3
        assert space.forget(tokens) == 3
