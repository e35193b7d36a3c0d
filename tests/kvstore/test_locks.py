"""Every verb holds the lock of whatever it uses: a `with` left out is noticed without two threads having to meet."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore.residency.state
import kvstore.residency.transcode
from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, HotConfig, QuotaConfig, StoreConfig, WarmConfig
from kvstore.entries.entry import Entry
from kvstore.errors import CodecError, EntryTooLarge, OverQuota
from kvstore.keys import Key
from kvstore.store import Store
from kvstore.tiers.cold import Cold
from tests.kvstore.guarded import Guard, guard_cold, guard_store
from tests.kvstore.tiers.test_cold import Holder, key

KIB = 1 << 10


def value(fill: float = 1.0, rows: int = 64) -> dict[str, torch.Tensor]:
    """rows * 256 bytes that no compression makes fewer."""
    return {"k": torch.randn(rows, 64) + fill}


class Checked:
    """A store with three small tiers, of which nothing may be used without its lock."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.guard = Guard(monkeypatch)
        config = StoreConfig(
            hot=HotConfig(160 * KIB),
            warm=WarmConfig(64 * KIB),
            cold=ColdConfig(str(path), capacity_nbytes=1024 * KIB),
            quotas={"t": QuotaConfig(hot_nbytes=64 * KIB)},
            promote_after=1,
            split="auto",
        )
        self.store = Store.open(config, clock=ManualClock(), background=False)
        self.r = self.store._r
        guard_store(self.guard, self.store)
        self.guard.on = True

    @property
    def clock(self) -> ManualClock:
        assert isinstance(self.r.clock, ManualClock)
        return self.r.clock


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checked]:
    checked = Checked(tmp_path, monkeypatch)
    yield checked
    checked.store.close()
    assert not checked.guard.broken


def fill(store: Store, count: int = 12, **options: Any) -> None:
    for n in range(count):
        store.put(b"fill%d" % n, value(n), **options)


def test_puts_and_what_they_displace(checked: Checked) -> None:
    store = checked.store
    fill(store)
    fill(store, 90, fidelity="exact")
    store.put(b"root", value())
    assert store.put(b"child", value(), parent=b"root", pin=True)
    assert not store.put(b"orphan", value(), parent=b"absent")
    assert store.put_many([(b"a", value()), (b"b", value())], chain=True, parent=b"root") == 2
    assert store.put_many([(b"a", value())], chain=True, parent=b"absent") == 0
    store.put(b"root", value(2))
    store.put(b"large", value(rows=800))
    with pytest.raises(OverQuota):
        store.put(b"pinned", value(rows=300), pin=True)
    with pytest.raises(EntryTooLarge):
        store.put(b"larger", value(rows=5000), fidelity="exact")


def test_gets_from_every_tier(checked: Checked) -> None:
    store = checked.store
    for name in (b"hot", b"warm", b"cold"):
        store.put(name, value())
    store.demote(b"warm", b"cold")
    store.demote(b"cold")
    assert [store.locate([name])[0].tier for name in (b"hot", b"warm", b"cold")] == ["hot", "warm", "cold"]  # type: ignore[union-attr]
    assert store.plan([b"hot"]).at_hand
    assert len(store.match([b"hot", b"warm", b"cold"]).held) == 3
    assert all(store.read(store.plan([b"hot", b"warm"])))
    assert store.plan([b"hot"], count_later=True).hot
    store.settle()
    assert all(store.get_many([b"hot", b"warm", b"cold", b"hot"]))
    assert store.get(b"absent") is None
    assert store.touch([b"hot", b"warm", b"cold"], ttl_s=10) == 3
    store.maintain()
    assert store.promote(b"cold") == 0, "promoted by the turn before"
    for _ in store.entries(tenant="t"):
        pass
    assert len(list(store.entries())) == 3
    assert store.inspect(b"cold") is not None
    assert [at.state for at in store.explain(b"cold", b"absent")] == ["held", "never put"]
    assert store.stats().values["gets"] == 9
    assert "hot" in store.tenants()


def test_what_leaves(checked: Checked) -> None:
    store = checked.store
    store.put_many([(b"a", value()), (b"b", value())], chain=True)
    store.put_many([(b"x", value()), (b"y", value())], ttl_s=5)
    assert store.pin(b"b", ttl_s=3) == 1
    assert store.unpin(b"b") == 1
    assert store.drain() == 4
    checked.clock.advance(6)
    store.maintain()
    assert store.evict(b"b") == 1
    assert store.delete(b"a", keep_shared=True) == 1
    store.register_tenant("t", [b"0123456789abcdef"])
    fill(store)
    assert store.set_hot_capacity(20 * KIB) > 0
    store.set_hot_capacity(160 * KIB)
    fill(store)
    small = replace(store.config, hot=HotConfig(20 * KIB), cold=replace(store.config.cold, capacity_nbytes=1 << 20))
    for config in (small, replace(small, cold=replace(small.cold, capacity_nbytes=1 << 21))):
        store.reconfigure(config)


def test_what_goes_wrong_on_the_way(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that nobody can decode, an encoder that fails, a disk that takes nothing, a duty that raises."""
    store = checked.store
    store.put(b"k", value())
    store.demote(b"k")

    def fail(*args: object) -> Entry:
        raise CodecError("no such encoding")

    with monkeypatch.context() as patch:
        patch.setattr(kvstore.residency.transcode, "decode_all", fail)
        assert store.promote(b"k") == 0
        store.put(b"k", value())
        store.demote(b"k")
        assert store.get(b"k") is None
        patch.setattr(kvstore.residency.transcode, "encode_entry", fail)
        store.put(b"k", value())
        with pytest.raises(CodecError):
            store.demote(b"k")
    with monkeypatch.context() as patch:
        patch.setattr(Cold, "displace", lambda self, entry: (_ for _ in ()).throw(OverQuota("full")))
        store.put(b"k", value(), fidelity="exact")
        store.demote(b"k")
        assert store.get(b"k") is None
    with monkeypatch.context() as patch:
        patch.setattr(Cold, "flush_meta", lambda self: (_ for _ in ()).throw(OSError("failed")))
        checked.clock.advance(1000)
        store.maintain()
        assert store.stats().values["maintainer_errors"] == 1
    store.put(b"k", value())
    store.demote(b"k")
    store.demote(b"k")
    checked.r.dropped_from_cold(Key(b"k"), "corrupt")  # it is there: nothing happens
    assert checked.r.in_cold(Key(b"k"))


def test_a_border_that_moves(checked: Checked) -> None:
    store, balance = checked.store, checked.r.balance
    assert balance is not None
    fill(store, 8)
    checked.monkeypatch.setattr(balance, "decide", lambda: 32 * KIB)
    store.maintain()
    assert checked.r.hot.capacity_nbytes == 32 * KIB


def test_the_disk_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(tmp_path / "cold", capacity_nbytes=64 * KIB)
    cold = holder.cold
    guard = Guard(monkeypatch)
    guard_cold(guard, cold)
    guard.on = True
    for n in range(20):
        holder.put(key(n), n, nbytes=5000)
    held = list(cold.keys())
    assert len(held) == len(cold) < 20
    assert key(0) not in cold
    cold.flush()
    assert cold.get(held[0]) is not None
    assert cold.specs_of(held[0]) is not None
    cold.pin(held[0])
    cold.touch(held)
    cold.flush_meta()
    cold.unpin(held[0])
    assert cold.nbytes_of(held[0]) > 5000
    holder.put(key(99), nbytes=5000, pinned=True)
    assert cold.remove(held[-1])
    cold.wait(cold.queue_removal(held[-2]))
    cold.take_back(cold.let_go(list(cold.keys())))
    assert cold.tenants()
    cold.maintain()
    segment = next(iter(tmp_path.glob("cold/**/*.seg")))
    segment.write_bytes(bytes(segment.stat().st_size))
    assert cold.get(held[-3]) is None
    with pytest.raises(OverQuota):
        holder.put(key(100), nbytes=100_000)
    assert cold.stats().counters.corrupt_total == 1
    cold.close()
    assert not guard.broken
