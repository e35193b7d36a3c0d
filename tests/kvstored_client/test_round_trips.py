"""How many questions a verb of prefixes asks the daemon: each costs a round trip, whatever is answered."""

from typing import Any

import numpy as np
import pytest

from kvstored_client import Client
from kvstored_client.shm.connection import Connection
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
def test_a_prefix_takes_one_round_trip_and_a_tail_one_or_two_more(
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
        assert trips(prompt, 3 * CHUNK) == 2, "the second asks for a tail, and there is none"
        space.put_prefix(prompt, k, v)
        assert trips(prompt, len(prompt)) == 3, "the third fetches it"
        assert trips([*prompt, 7, 8], len(prompt)) == 3
        assert trips([9] * CHUNK, 0) == 2
        assert trips([], 0) == 0
        space.forget(prompt)


def test_a_prefix_that_is_held_is_put_with_one_round_trip_and_a_new_one_with_two(
    shared_daemon: DaemonProcess, asked: list[int]
) -> None:
    with shared_daemon.client(framework="numpy") as client:
        space = client.namespace(chunk_tokens=CHUNK, **IDENTITY)
        client.match([b"connected"])
        prompt = [5, *range(4 * CHUNK)]
        k, v = kv(len(prompt))
        three = 3 * CHUNK
        for chunks, trips in ((3, 2), (0, 1)):
            asked.clear()
            assert space.put_prefix(prompt[:three], k[:, :three], v[:, :three]) == chunks
            segments = sum(nbytes < 16 for nbytes in asked)  # the first put asks for an ingest segment
            assert len(asked) - (segments if chunks else 0) == trips
        asked.clear()
        assert space.put_prefix(prompt, k, v) == 2
        assert len(asked) == 3
        assert space.match_prefix(prompt) == 5
        space.forget(prompt)
