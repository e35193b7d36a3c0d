"""Tensors whose bytes are still being copied: nobody sees anything but the copy, and it is made once."""

import threading

import pytest
import torch

from kvstore.arrays import CheckedSpecs
from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import ArrivingTensors, Entry
from kvstore.errors import CodecError
from kvstore.hit import Fidelity
from kvstore.keys import Key
from kvstore.options import PutOptions
from kvstore.residency.transcode import raw_entry
from kvstore.store import Store

SPECS = CheckedSpecs({"x": TensorSpec("float32", (64,))})


class Source:
    """A sender's memory, which the sender may change at any time. copies: how often it was read."""

    def __init__(self) -> None:
        self.x = torch.full((64,), 1.0)
        self.copies = 0

    def copy(self) -> dict[str, torch.Tensor]:
        self.copies += 1
        return {"x": self.x.clone()}

    def arriving(self) -> ArrivingTensors:
        return ArrivingTensors(SPECS, self.copy)


def put(store: Store, arriving: ArrivingTensors, fidelity: Fidelity = "auto") -> int:
    return store.put_entries([Entry(Key(b"k"), arriving)], PutOptions(fidelity=fidelity))


def opened(path: object = None) -> Store:
    cold = ColdConfig() if path is None else ColdConfig(path=str(path), capacity_nbytes=64 << 20)
    config = StoreConfig(HotConfig(1 << 20), WarmConfig(1 << 20), cold)
    return Store.open(config, clock=ManualClock(), background=False)


def test_the_first_look_copies_and_later_changes_of_the_source_are_not_seen() -> None:
    source = Source()
    with opened() as store:
        assert put(store, source.arriving()) == 1
        assert source.copies == 0, "a put does not wait for the copy"
        first = store.get(b"k")
        source.x.fill_(2.0)
        second = store.get(b"k")
    assert source.copies == 1
    assert first is not None
    assert second is not None
    assert torch.equal(first.tensors["x"], torch.full((64,), 1.0))
    assert torch.equal(second.tensors["x"], first.tensors["x"])


@pytest.mark.parametrize("way", ["demote", "drain", "lease", "inspect", "pin"])
def test_whatever_a_store_does_with_it_uses_one_copy(tmp_path: object, way: str) -> None:
    source = Source()
    with opened(tmp_path) as store:
        put(store, source.arriving(), "exact")
        if way == "lease":
            with store.lease(b"k") as hit:
                assert hit is not None
                assert torch.equal(hit.tensors["x"], torch.full((64,), 1.0))
        else:
            {"demote": store.demote, "inspect": store.inspect, "pin": store.pin}.get(way, lambda _: store.drain())(b"k")
        assert source.copies <= 1
        kept = store.get(b"k")
        source.x.fill_(2.0)
        assert source.copies == 1
        assert kept is not None
        assert torch.equal(kept.tensors["x"], torch.full((64,), 1.0))
        assert store.drain() >= 0
        store.demote(b"k")
        again = store.get(b"k")
        assert again is not None
        assert torch.equal(again.tensors["x"], kept.tensors["x"]), "what was written is the copy"


def test_two_readers_at_once_wait_for_one_copy() -> None:
    begun, go_on = threading.Event(), threading.Event()
    copies = []

    def copy() -> dict[str, torch.Tensor]:
        begun.set()
        assert go_on.wait(60)
        copies.append(torch.ones(64))
        return {"x": copies[-1]}

    arriving = ArrivingTensors(SPECS, copy)
    seen: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: seen.append(arriving["x"].parts[""])) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert not seen
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(copies) == 1
    assert seen[0] is seen[1] is copies[0]


def test_a_copy_that_fails_is_an_entry_that_cannot_be_decoded_and_never_the_source_read_later() -> None:
    source = Source()

    def copy() -> dict[str, torch.Tensor]:
        raise MemoryError

    arriving = ArrivingTensors(SPECS, copy)
    with pytest.raises(MemoryError):
        arriving.arrive()
    with pytest.raises(CodecError, match="could not be copied"):
        arriving["x"]
    with opened() as store:
        put(store, arriving)
        assert store.get(b"k") is None
        assert store.get(b"k") is None
    assert source.copies == 0


def test_it_counts_and_describes_itself_as_the_tensors_it_will_be() -> None:
    entry = Entry(Key(b"k"), Source().arriving())
    whole = raw_entry(Key(b"k"), {"x": torch.zeros(64)})
    for name in ("nbytes", "value_nbytes", "encoding", "specs", "receipt", "lossy"):
        assert getattr(entry, name) == getattr(whole, name), name
    assert list(entry.encodings) == list(whole.encodings)
