"""What a door does to the order in which entries leave: a chain stays one, also where it is read in parts."""

from typing import Any

import numpy as np
import torch

from kvstore import Store
from kvstore.arrays import CheckedSpecs
from kvstore.dtypes import TensorSpec
from kvstore.keys import CheckedKeys, Key
from kvstore.options import PutOptions
from kvstore.residency.transcode import made_entry
from kvstored.access.tenant_view import TenantView, TenantViews
from kvstored.calls.budget import Budget
from kvstored.calls.gets import Reading
from kvstored_client.wire._pb import cache_pb2 as pb

KEYS = [b"root", b"second", b"third", b"fourth"]
X = np.ones(1 << 10, np.float32)


def test_a_chain_read_in_several_lots_leaves_deepest_first() -> None:
    """Lot by lot the first chunks were the least recently used: a full tier lost the root, and all of the chain."""
    with Store.open(background=False) as store:
        for key in KEYS:
            store.put(key, {"x": X})
        budget = Budget(8 * X.nbytes)  # lots of two
        reading = Reading(store, budget, pb.GetRequest(), CheckedKeys(KEYS))
        lots = []
        while not reading.done:
            reading.plan()
            lots.append(len(reading.read()))
        reading.close()
        assert lots == [2, 2]
        assert list(store._r.hot.keys()) == KEYS[::-1]
        assert budget.used_nbytes == 0


def test_a_chain_read_in_one_lot_is_used_once() -> None:
    with Store.open(background=False) as store:
        store.put(KEYS[0], {"x": X})
        touched: list[Any] = []
        store.touch = touched.append  # type: ignore[assignment,method-assign]
        reading = Reading(store, Budget(8 * X.nbytes), pb.GetRequest(), CheckedKeys(KEYS[:1]))
        reading.plan()
        assert len(reading.read()) == 1
        reading.close()
        assert touched == []


def test_a_tenant_s_chunk_continues_the_tenant_s_own() -> None:
    with Store.open(background=False) as store:
        views = TenantViews(store, bytes(32))
        view = views["a"]
        assert put(view, KEYS[0], None)
        assert put(view, KEYS[1], KEYS[0])
        assert not put(views["b"], KEYS[1], KEYS[0])
        view.delete(CheckedKeys(KEYS[:1]))
        assert view.match(CheckedKeys(KEYS[1:2])).held == ()


def put(view: TenantView, key: bytes, parent: bytes | None) -> int:
    tensors = {"x": torch.ones(1 << 10)}
    specs = CheckedSpecs({"x": TensorSpec("float32", (1 << 10,))})
    return view.put_entries(
        [made_entry(Key(key), specs, tensors)], PutOptions(), chain=True, parent=None if parent is None else Key(parent)
    )


def tenant(name: str) -> Any:
    from kvstored.access.tokens import Identity

    return Identity(name, frozenset({"read", "write"}), name)
