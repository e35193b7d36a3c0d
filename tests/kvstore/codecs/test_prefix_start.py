"""A codec is told which chunk begins a prompt: its first tokens are attention sinks, those of later chunks are not."""

import torch

from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store
from kvstored.calls.puts import incoming, put_ready
from kvstored_client.puts import PutOptions, outgoing
from kvstored_client.wire._pb import cache_pb2 as pb
from kvstored_client.wire.frames import put_header

KEYS = [b"first", b"second", b"third"]
K = torch.randn(2, 64, 2, 16, generator=torch.Generator().manual_seed(1))


def opened() -> Store:
    return Store.open(StoreConfig(HotConfig(1 << 24), WarmConfig(1 << 24)), clock=ManualClock(), background=False)


def kept(store: Store, key: bytes) -> object:
    """The tokens that nf4-kv2 kept in 16 bits: the first where a prompt begins, sinks and outliers further on."""
    store.demote(key)
    entry = store._r.warm.get(key)  # type: ignore[arg-type]
    assert entry is not None
    return entry.tensors["k"].attrs["kept"]


def test_only_the_first_chunk_of_a_chain_keeps_its_first_token_whole() -> None:
    with opened() as store:
        store.put_many([(key, {"k": K}) for key in KEYS[:2]], chain=True)
        store.put_many([(KEYS[2], {"k": K})], chain=True, parent=KEYS[1])
        store.put(b"alone", {"k": K})
        assert [kept(store, key) for key in reversed(KEYS)] == ["", "", "0"]
        assert kept(store, b"alone") == "0"  # nobody said where it lies: in case


def test_a_put_over_the_wire_says_which_chunk_is_the_first() -> None:
    for count in (1, 3):
        with opened() as store:
            ready = []
            parents = [None, *KEYS]
            for key, parent in zip(KEYS[:count], parents, strict=False):
                sent = outgoing([(key, {"k": K}, parent)], PutOptions(), root=True)[0]
                (entry,) = incoming(
                    [pb.PutHeader.FromString(put_header(sent.key, sent.parent, sent.described))], 1 << 24
                )
                entry.begin(lambda _: None)
                entry.tensors["k"].copy_(K)
                ready.append(entry)
            assert put_ready(store, ready) == count
            assert [kept(store, key) for key in reversed(KEYS[:count])] == [*[""] * (count - 1), "0"]
