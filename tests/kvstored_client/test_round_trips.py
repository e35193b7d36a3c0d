"""How many questions a verb of prefixes asks the daemon: each costs a round trip, whatever is answered."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore.errors import InvalidEntry
from kvstore.keys import CHUNK_TOKENS_MAX
from kvstore.lookup import MISSES_MAX, Misses
from kvstore.prefix import Namespace
from kvstored_client import Client, aio
from kvstored_client.aio.lease import LoopConnection
from kvstored_client.shm.connection import Connection
from kvstored_client.wire.messages import GetOptions
from tests.conftest import DaemonProcess

CHUNK = 16
IDENTITY: dict[str, Any] = {
    "model": "round trips", "revision": "1", "dtype": "float32", "layers": 2, "kv_heads": 1, "head_dim": 4,
    "layout": "lthd",
}  # fmt: skip


def kv(tokens: int) -> tuple[Any, Any]:
    k = np.arange(2 * tokens * 4, dtype=np.float32).reshape(2, tokens, 1, 4)
    return k, -k


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each exchange over the lease socket."""
    found: list[int] = []
    exchange = Connection.exchange

    def counted(self: Connection, data: bytes, timeout_s: float) -> Any:
        found.append(len(data))
        return exchange(self, data, timeout_s)

    monkeypatch.setattr(Connection, "exchange", counted)
    return found


@pytest.mark.parametrize("into", [False, True])
def test_a_prefix_takes_one_round_trip_and_only_a_tail_that_is_held_a_second(
    shared_daemon: DaemonProcess, asked: list[int], into: bool
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        assert isinstance(client, Client)
        space = client.namespace(chunk_tokens=CHUNK, **IDENTITY)
        prompt = list(range(3 * CHUNK + 5))
        k, v = kv(len(prompt))
        space.put_prefix(prompt[: 3 * CHUNK], k[:, : 3 * CHUNK], v[:, : 3 * CHUNK])

        def trips(tokens: list[int], expected: int) -> int:
            out = kv(len(tokens)) if into else None
            asked.clear()
            n, got_k, got_v = space.get_prefix(tokens, out=out)
            assert n == expected
            if n:
                assert np.array_equal(got_k, k[:, :n])
                assert np.array_equal(got_v, v[:, :n])
            return len(asked)

        assert trips(prompt[: 3 * CHUNK], 3 * CHUNK) == 1
        assert trips(prompt, 3 * CHUNK) == 1, "it asks for a tail, too, and there is none"
        space.put_prefix(prompt, k, v)
        assert trips(prompt, len(prompt)) == 2, "the second fetches it"
        assert trips([*prompt, 7, 8], len(prompt)) == 2
        inside = [*prompt[: 2 * CHUNK], *[9] * CHUNK, 1]
        assert trips(inside, 2 * CHUNK) == 2, "behind another chunk than the last one it is asked for by itself"
        assert trips([9] * CHUNK, 0) == 2
        assert trips([], 0) == 0
        space.forget(prompt)


def test_a_tail_is_found_where_it_is_not_asked_for_with_the_chunks(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a daemon that does not know of tails, and behind what is no chunk of this namespace."""
    prompt = list(range(3 * CHUNK + 5))
    k, v = kv(len(prompt))
    with shared_daemon.client(framework="numpy") as client:
        space = client.namespace(chunk_tokens=CHUNK, **IDENTITY)
        space.put_prefix(prompt, k, v)
        monkeypatch.setattr(GetOptions, "asking_for", lambda how, _tails: how.rest)
        assert space.get_prefix([*prompt, 7])[0] == len(prompt)
        monkeypatch.undo()
        client.put(space.keys(prompt)[2], {"x": k})
        n, got_k, _ = space.get_prefix(prompt)
        assert n == 2 * CHUNK
        assert np.array_equal(got_k, k[:, :n])
        space.forget(prompt)


@pytest.mark.parametrize("tier", ["hot", "warm"])
def test_the_hits_of_a_lease_say_which_tail_is_the_first_held_if_all_keys_are(
    shared_daemon: DaemonProcess, tier: str
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        x = {"x": np.zeros((4, 64), np.float32)}
        client.put_many([(b"tails: root", x), (b"tails: leaf", x), (b"tails: tail", x)], chain=True)
        if tier == "warm":
            assert client.demote(b"tails: root", b"tails: leaf")

        def first(*tails: bytes, keys: tuple[bytes, ...] = (b"tails: root", b"tails: leaf")) -> int | None:
            with client.lease_many(keys, leading=True, tails=tails) as hits:
                assert len([hit for hit in hits if hit]) == len([key for key in keys if key != b"tails: absent"])
                return hits.first_tail  # type: ignore[attr-defined,no-any-return]

        assert first() is None
        assert first(b"tails: tail") == 0
        assert first(b"tails: none", b"tails: tail", b"tails: other") == 1
        assert first(b"tails: none", b"tails: other") == 2
        assert first(b"tails: tail", keys=(b"tails: root", b"tails: absent")) is None
        with pytest.raises(InvalidEntry, match=f"at most {CHUNK_TOKENS_MAX} tails, got {CHUNK_TOKENS_MAX + 1}"):
            first(*(b"%d" % n for n in range(CHUNK_TOKENS_MAX + 1)))
        client.delete(b"tails: root", b"tails: leaf", b"tails: tail")


@pytest.fixture
def space(shared_daemon: DaemonProcess) -> Iterator[Namespace]:
    """A namespace whose connection is there and has room for puts; empty before and after."""
    with shared_daemon.client(framework="numpy") as client:
        space = client.namespace(chunk_tokens=CHUNK, **IDENTITY)
        client.put(b"room", {"x": np.zeros(1 << 16, np.uint8)})
        yield space
        client.delete(b"room")
        for first in range(10):
            space.forget([first, *range(5 * CHUNK)])


def test_a_prefix_that_is_held_is_put_with_one_round_trip_and_an_unknown_new_one_with_two(
    space: Namespace, asked: list[int]
) -> None:
    prompt = [5, *range(4 * CHUNK)]
    k, v = kv(len(prompt))
    three = 3 * CHUNK
    for chunks, trips in ((3, 2), (0, 1)):
        asked.clear()
        assert space.put_prefix(prompt[:three], k[:, :three], v[:, :three]) == chunks
        assert len(asked) == trips
    asked.clear()
    assert space.put_prefix(prompt, k, v) == 2
    assert len(asked) == 3
    assert space.match_prefix(prompt) == 5


@pytest.mark.parametrize("lookup", ["get_prefix", "match_prefix", "get_prefix_hits"])
def test_what_a_lookup_has_missed_is_put_with_one_round_trip_once(
    space: Namespace, asked: list[int], lookup: str
) -> None:
    prompt = [6, *range(4 * CHUNK)]
    k, v = kv(len(prompt))
    three = 3 * CHUNK
    look = getattr(space, lookup)
    look(prompt[:three])
    asked.clear()
    assert space.put_prefix(prompt[:three], k[:, :three], v[:, :three]) == 3
    assert len(asked) == 1, "nothing of it was held"
    asked.clear()
    assert space.put_prefix(prompt[:three], k[:, :three], v[:, :three]) == 0
    assert len(asked) == 1, "told once: it is asked again what is held"
    look(prompt)
    asked.clear()
    assert space.put_prefix(prompt, k, v) == 2, "what was held is not sent again"
    assert len(asked) == 1
    n, got_k, got_v = space.get_prefix(prompt)
    assert n == len(prompt)
    assert np.array_equal(got_k, k)
    assert np.array_equal(got_v, v)


def test_what_left_after_the_lookup_is_put_again(space: Namespace, asked: list[int]) -> None:
    prompt = [7, *range(4 * CHUNK)]
    k, v = kv(len(prompt))
    space.put_prefix(prompt[: 3 * CHUNK], k[:, : 3 * CHUNK], v[:, : 3 * CHUNK])
    assert space.get_prefix(prompt)[0] == 3 * CHUNK
    space.forget(prompt)
    asked.clear()
    assert space.put_prefix(prompt, k, v) == 5, "refused behind a chunk that is not held, then asked and put whole"
    assert len(asked) == 3
    n, got_k, _ = space.get_prefix(prompt)
    assert n == len(prompt)
    assert np.array_equal(got_k, k)


def test_what_another_worker_has_put_after_the_lookup_is_replaced_by_the_same(
    space: Namespace, shared_daemon: DaemonProcess
) -> None:
    prompt = [8, *range(3 * CHUNK)]
    k, v = kv(len(prompt))
    assert space.get_prefix(prompt)[0] == 0
    with shared_daemon.client() as client:
        assert client.namespace(chunk_tokens=CHUNK, **IDENTITY).put_prefix(prompt, k, v) == 4
    assert space.put_prefix(prompt, k, v) == 4
    assert space.match_prefix(prompt) == 4


@pytest.mark.parametrize("how", [{"pin": True}, {"ttl_s": 50.0}])
def test_what_a_put_asks_of_chunks_that_are_held_is_done_after_a_lookup_too(
    space: Namespace, shared_daemon: DaemonProcess, how: dict[str, Any]
) -> None:
    prompt = [9, *range(3 * CHUNK)]
    k, v = kv(len(prompt))
    space.put_prefix(prompt[:CHUNK], k[:, :CHUNK], v[:, :CHUNK], ttl_s=20.0)
    assert space.get_prefix(prompt)[0] == CHUNK
    assert space.put_prefix(prompt, k, v, **how) == 3
    with shared_daemon.client() as client:
        infos = [client.inspect(key) for key in space.keys(prompt)]
    assert all(info is not None for info in infos)
    assert all(info.pinned if "pin" in how else info.ttl_left_s > 30 for info in infos if info is not None)
    space.unpin_prefix(prompt)


def test_misses_are_remembered_up_to_a_count_and_the_oldest_forgotten() -> None:
    misses = Misses()
    for i in range(MISSES_MAX + 10):
        misses.note(b"%d" % i)
    assert misses.take([b"none", b"9"]) is None
    assert misses.take([b"none", b"10", b"11"]) == 1
    assert misses.take([b"none", b"10", b"11"]) == 2
    assert misses.take([b"none", b"10", b"11"]) is None


def test_an_asyncio_client_puts_what_it_missed_with_one_round_trip(
    shared_daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    ask = LoopConnection.ask

    async def counted(self: LoopConnection, data: bytes, timeout_s: float) -> Any:
        found.append(len(data))
        return await ask(self, data, timeout_s)

    prompt = [4, *range(3 * CHUNK)]
    k, v = kv(len(prompt))

    async def run() -> None:
        async with aio.Client(shared_daemon.address.split(",")[0], framework="numpy") as client:
            space = client.namespace(chunk_tokens=CHUNK, **IDENTITY)
            await client.put(b"room", {"x": np.zeros(1 << 16, np.uint8)})
            assert (await space.get_prefix(prompt))[0] == 0
            monkeypatch.setattr(LoopConnection, "ask", counted)
            assert await space.put_prefix(prompt, k, v) == 4
            assert len(found) == 1
            found.clear()
            assert (await space.get_prefix([*prompt[: 3 * CHUNK], 7]))[0] == 3 * CHUNK
            assert len(found) == 1
            assert (await space.get_prefix([*prompt, 7]))[0] == len(prompt)
            assert len(found) == 3
            await client.delete(b"room")
            await space.forget(prompt)

    asyncio.run(run())
