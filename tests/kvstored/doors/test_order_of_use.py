"""What a door does to the order in which entries leave: a chain stays one, and uses count before what comes next."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore import Store
from kvstored.access.tenant_view import TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.gets import Reading
from kvstored.doors.busy_wait import Waiting
from kvstored.doors.lease_connection import Connection
from kvstored_client import Client
from kvstored_client.wire._pb import cache_pb2 as pb
from tests.contract.conftest import serving

KEYS = [b"root", b"second", b"third", b"fourth"]
X = np.ones(1 << 10, np.float32)


def test_a_chain_read_in_several_lots_leaves_deepest_first() -> None:
    """Lot by lot the first chunks were the least recently used: a full tier lost the root, and all of the chain."""
    with Store.open(background=False) as store:
        for key in KEYS:
            store.put(key, {"x": X})
        budget = Budget(8 * X.nbytes)  # lots of two
        reading = Reading(store, budget, pb.GetRequest(keys=KEYS))
        lots = []
        while not reading.done:
            lots.append(len(reading.next_lot()))
        reading.close()
        assert lots == [2, 2]
        assert list(store._r.hot.keys()) == KEYS[::-1]
        assert budget.used_nbytes == 0


def test_a_chain_read_in_one_lot_is_used_once() -> None:
    with Store.open(background=False) as store:
        store.put(KEYS[0], {"x": X})
        touched: list[Any] = []
        store.touch = touched.append  # type: ignore[assignment,method-assign]
        reading = Reading(store, Budget(8 * X.nbytes), pb.GetRequest(keys=KEYS[:1]))
        assert len(reading.next_lot()) == 1
        reading.close()
        assert touched == []


def test_what_was_answered_counts_as_used_before_the_next_packet_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a put evicts what somebody has just read: another connection's uses, which it has not come to yet."""
    waiting: list[int] = []
    receive, answer = Waiting.receive, Connection.answer

    def received(self: Waiting, packet: memoryview) -> int:
        nbytes = receive(self, packet)
        assert store.resident([b"used"], count_later=True) is not None  # answered just now, by another connection
        return nbytes

    def answered(self: Connection, packet: bytes) -> bytes | None:
        waiting.append(len(store._read_path._due))
        return answer(self, packet)

    monkeypatch.setattr(Waiting, "receive", received)
    monkeypatch.setattr(Connection, "answer", answered)
    address = f"unix:{tmp_path / 'kv.sock'}"
    with Store.open(background=False) as store:
        store.put(b"used", {"x": X})
        with serving(store, address, tmp_path), Client(address, on_error="raise") as client:
            assert client.put(b"new", {"x": X})
    assert len(waiting) >= 2  # the greeting and the put
    assert set(waiting) == {0}


def test_what_was_answered_counts_as_used_before_a_call_over_the_stream() -> None:
    with Store.open(background=False) as store:
        store.put(b"used", {"x": X})
        assert store.resident([b"used"], count_later=True) is not None
        assert store._r.counters.gets == 0
        assert TenantViews(store, bytes(32)).current() is store
        assert store._r.counters.gets == 1


def test_a_tenant_s_chunk_continues_the_tenant_s_own() -> None:
    with Store.open(background=False) as store:
        views = TenantViews(store, bytes(32))
        view = views.of(tenant("a"))
        assert view.put_many([(KEYS[0], {"x": X})], chain=True) == 1
        assert view.put_many([(KEYS[1], {"x": X})], chain=True, parent=KEYS[0]) == 1
        assert views.of(tenant("b")).put_many([(KEYS[1], {"x": X})], chain=True, parent=KEYS[0]) == 0
        view.delete(KEYS[0])
        assert view.match(KEYS[1:2]) == 0


def tenant(name: str) -> Any:
    from kvstored.access.tokens import Identity

    return Identity(name, frozenset({"read", "write"}), name)
