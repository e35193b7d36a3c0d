"""The embedded store: budgets, movement, promotion, threads; what the contract suite cannot see from outside."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore.residency.transcode
from kvstore import kernels
from kvstore.clock import ManualClock
from kvstore.codecs import encode_entry
from kvstore.config import ColdConfig, HotConfig, QuotaConfig, StoreConfig, WarmConfig
from kvstore.entries.entry import Entry
from kvstore.errors import CodecError, ConfigError, EntryTooLarge, OverQuota, TierUnavailable
from kvstore.store import Store

MIB = 1 << 20


def open_store(
    hot: int = 4 * MIB, warm: int = 2 * MIB, path: Path | None = None, background: bool = False, **settings: Any
) -> Store:
    config = StoreConfig(
        hot=HotConfig(hot), warm=WarmConfig(warm), cold=ColdConfig(path=str(path) if path else None), **settings
    )
    return Store.open(config, clock=ManualClock(), background=background)


def chunk(seed: int, rows: int = 4096) -> torch.Tensor:
    """rows * 256 bytes."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))


def test_a_displaced_entry_sinks_tier_by_tier_in_order_of_use(tmp_path: Path) -> None:
    with open_store(hot=3 * MIB, warm=MIB // 2, path=tmp_path) as store:
        for i in range(10):
            store.put(b"k%d" % i, {"k": chunk(i)})
        tiers = [store.locate([b"k%d" % i])[0] for i in range(10)]
        names = [at.tier if at else "" for at in tiers]
        assert names == ["cold"] * 5 + ["warm"] * 3 + ["hot"] * 2


def test_without_a_disk_what_leaves_warm_is_forgotten() -> None:
    with open_store(hot=2 * MIB + 8192, warm=MIB // 2) as store:
        for i in range(10):
            store.put(b"k%d" % i, {"k": chunk(i)})
        held = [at is not None for at in store.locate([b"k%d" % i for i in range(10)])]
        assert held == [False] * 5 + [True] * 5
        assert store.stats().values["evictions"] == 5


def test_a_get_counted_later_counts_the_same() -> None:
    """Hits, deadlines and the order of leaving, by the next get or `settle`, whichever comes first."""
    with open_store(hot=8 * MIB) as at_once, open_store(hot=8 * MIB) as later:
        for store in (at_once, later):
            for i in range(3):
                store.put(b"k%d" % i, {"k": chunk(i)}, ttl_s=100)
        keys = [b"k0", b"k1"]
        assert at_once.plan(keys).hot
        assert later.plan(keys, count_later=True).hot
        assert list(later._r.hot.keys()) != list(at_once._r.hot.keys())
        assert later.get(b"absent") is at_once.get(b"absent") is None
        assert list(later._r.hot.keys()) == list(at_once._r.hot.keys())
        assert at_once.plan(keys).hot
        assert later.plan(keys, count_later=True).hot
        later.settle()
        found = [store.stats() for store in (at_once, later)]
        assert found[0].values == found[1].values
        assert found[0].tiers["hot"].hits == found[1].tiers["hot"].hits == 4


def test_an_exact_entry_skips_warm(tmp_path: Path) -> None:
    with open_store(path=tmp_path) as store:
        store.put(b"k", {"k": chunk(0)}, fidelity="exact")
        store.demote(b"k")
        hit = store.get(b"k")
        assert hit is not None
        assert (hit.tier, hit.encoding, hit.lossy) == ("cold", "raw", False)
        assert torch.equal(hit.tensors["k"], chunk(0))


def test_an_entry_larger_than_hot_goes_where_it_fits(tmp_path: Path) -> None:
    with open_store(hot=MIB, warm=2 * MIB, path=tmp_path) as store:
        store.put(b"auto", {"k": chunk(0, rows=16384)})
        store.put(b"exact", {"k": chunk(1, rows=16384)}, fidelity="exact")
        auto, exact = store.get(b"auto"), store.get(b"exact")
        assert auto is not None
        assert exact is not None
        assert (auto.tier, exact.tier) == ("warm", "cold")
        assert torch.equal(exact.tensors["k"], chunk(1, rows=16384))


def test_an_entry_that_fits_no_tier_is_refused_and_leaves_nothing() -> None:
    with open_store(hot=MIB, warm=MIB // 4) as store:
        with pytest.raises((EntryTooLarge, OverQuota), match="fits no tier"):
            store.put(b"k", {"k": chunk(0, rows=16384)}, fidelity="exact")
        with pytest.raises(OverQuota, match="fits no tier"):
            store.put(b"k", {"k": chunk(0, rows=16384)})
        assert store.get(b"k") is None
        assert store.stats().values["entries"] == 0


def test_the_second_hit_within_the_window_promotes_and_the_first_does_not() -> None:
    with open_store(promote_window_s=60) as store:
        clock = store._r.clock
        assert isinstance(clock, ManualClock)
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        for wait, tiers in ((0, ("warm",)), (61, ("warm",)), (59, ("hot", "warm"))):
            clock.advance(wait)
            store.get(b"k")
            store.maintain()
            info = store.inspect(b"k")
            assert info is not None
            assert info.tiers == tiers


@pytest.mark.parametrize(("promote_after", "tiers"), [(1, ("hot", "warm")), (0, ("warm",))])
def test_promotion_can_be_at_the_first_hit_or_never(promote_after: int, tiers: tuple[str, ...]) -> None:
    with open_store(promote_after=promote_after) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        for _ in range(1 if promote_after else 5):
            store.get(b"k")
            store.maintain()
        info = store.inspect(b"k")
        assert info is not None
        assert info.tiers == tiers


def test_what_the_pins_of_its_owner_leave_no_quota_for_is_not_promoted() -> None:
    """It met an OverQuota that nobody had asked for: a traceback in the maintainer's log, and an error of `promote`."""
    quota = QuotaConfig(hot_nbytes=4 * MIB)
    with open_store(hot=16 * MIB, warm=4 * MIB, promote_after=1, namespaces={"m": quota}) as store:
        store.put(b"large", {"k": chunk(0, 3 * 4096)}, namespace="m")
        store.demote(b"large")
        store.put(b"pinned", {"k": chunk(1, 2 * 4096)}, namespace="m", pin=True)
        assert store.promote(b"large") == 0
        assert store.get(b"large") is not None
        store.maintain()
        info = store.inspect(b"large")
        assert info is not None
        assert info.tiers == ("warm",)


def test_a_demotion_with_a_clean_copy_encodes_and_writes_nothing(tmp_path: Path) -> None:
    with open_store(path=tmp_path) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        store.demote(b"k")
        store._r.cold.flush()  # type: ignore[union-attr]
        before = store.stats().values
        for _ in range(3):
            assert store.promote(b"k") == 1
            assert store.demote(b"k") == 1
        store._r.cold.flush()  # type: ignore[union-attr]
        after = store.stats().values
        assert after["encodes"] == before["encodes"] == 1
        assert after["cold_bytes_written"] == before["cold_bytes_written"]


def test_when_the_clean_copy_is_evicted_the_lossy_copy_goes_with_it() -> None:
    with open_store(hot=4 * MIB, warm=200_000) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        store.promote(b"k")
        store.put(b"other", {"k": chunk(1)})
        store.demote(b"other")  # warm has room for one of them
        assert store.get(b"k") is None
        assert store.get(b"other") is not None


def test_a_key_deleted_during_promotion_stays_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store() as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        decode = kvstore.residency.transcode.decode_all

        def delete_meanwhile(entry: Entry, out: Any = None) -> dict[str, torch.Tensor]:
            store.delete(b"k")
            return decode(entry, out)

        monkeypatch.setattr(kvstore.residency.transcode, "decode_all", delete_meanwhile)
        assert store.promote(b"k") == 0
        monkeypatch.undo()
        assert store.get(b"k") is None
        assert len(store._r.hot) == 0


def test_a_key_replaced_during_promotion_keeps_the_new_value(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store() as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        decode = kvstore.residency.transcode.decode_all

        def replace_meanwhile(entry: Entry, out: Any = None) -> dict[str, torch.Tensor]:
            monkeypatch.undo()
            store.put(b"k", {"k": chunk(1)})
            store.demote(b"k")
            return decode(entry, out)

        monkeypatch.setattr(kvstore.residency.transcode, "decode_all", replace_meanwhile)
        assert store.promote(b"k") == 0
        assert store.promote(b"k") == 1
        hit = store.get(b"k")
        assert hit is not None
        assert (hit.tensors["k"] - chunk(1)).abs().max() < 1


@pytest.mark.parametrize("verb", ["delete", "put"])
def test_a_key_deleted_or_replaced_during_demotion_is_not_brought_back(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    with open_store() as store:
        store.put(b"k", {"k": chunk(0)})

        def meanwhile(entry: Entry, codec: Any, hints: Any) -> Entry:
            hit = store.get(b"k")  # an entry on its way can be read
            assert hit is not None
            assert torch.equal(hit.tensors["k"], chunk(0))
            if verb == "delete":
                store.delete(b"k")
            else:
                store.put(b"k", {"k": chunk(1)})
            return encode_entry(entry, codec, hints)

        monkeypatch.setattr(kvstore.residency.transcode, "encode_entry", meanwhile)
        store.demote(b"k")
        hit = store.get(b"k")
        if verb == "delete":
            assert hit is None
        else:
            assert hit is not None
            assert torch.equal(hit.tensors["k"], chunk(1))
        assert len(store._r.warm) == 0


def test_one_promotion_a_key_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store() as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        decode = kvstore.residency.transcode.decode_all
        inner: list[int] = []

        def promote_again(entry: Entry, out: Any = None) -> dict[str, torch.Tensor]:
            inner.append(store.promote(b"k"))
            return decode(entry, out)

        monkeypatch.setattr(kvstore.residency.transcode, "decode_all", promote_again)
        assert store.promote(b"k") == 1
        assert inner == [0]


def test_pinned_entries_stay_where_they_are(tmp_path: Path) -> None:
    with open_store(hot=3 * MIB, warm=MIB, path=tmp_path) as store:
        store.put(b"pinned", {"k": chunk(0)}, pin=True)
        assert store.demote(b"pinned") == 0
        for i in range(10):
            store.put(b"k%d" % i, {"k": chunk(i)})
        hit = store.get(b"pinned")
        assert hit is not None
        assert hit.tier == "hot"
        assert torch.equal(hit.tensors["k"], chunk(0))


def test_a_touch_with_a_shorter_life_leaves_a_fixed_deadline_where_it_is_also_after_a_restart(tmp_path: Path) -> None:
    clock = ManualClock()
    config = StoreConfig(cold=ColdConfig(path=str(tmp_path / "cold")))
    with Store.open(config, clock=clock, background=False) as store:
        store.put(b"fixed", {"x": torch.ones(8)}, ttl_s=50, sliding=False)
        store.touch([b"fixed"], ttl_s=20)
    with Store.open(config, clock=clock, background=False) as store:
        clock.advance(49)
        assert store.match([b"fixed"]) == 1
        clock.advance(1)
        assert store.match([b"fixed"]) == 0


def test_a_restart_keeps_everything_with_a_disk(tmp_path: Path) -> None:
    config = StoreConfig(hot=HotConfig(4 * MIB), warm=WarmConfig(MIB), cold=ColdConfig(path=str(tmp_path)))
    clock = ManualClock()
    with Store.open(config, clock=clock, background=False) as store:
        store.put(b"exact", {"k": chunk(0), "empty": torch.empty(0, 3)}, fidelity="exact", ttl_s=100)
        store.put(b"auto", {"k": chunk(1)})
        store.demote(b"auto")
        nf4 = store.get(b"auto")
        store.put(b"pinned", {"k": chunk(2)}, pin=True, ttl_s=10)
        store.put(b"short", {"k": chunk(3)}, ttl_s=10)
    clock.advance(20)
    with Store.open(config, clock=clock, background=False) as store:
        exact, auto, pinned = (store.get(key) for key in (b"exact", b"auto", b"pinned"))
        assert nf4 is not None
        assert exact is not None
        assert auto is not None
        assert pinned is not None
        assert torch.equal(exact.tensors["k"], chunk(0))
        assert exact.tensors["empty"].shape == (0, 3)
        assert exact.age_s == pytest.approx(20)
        assert torch.equal(auto.tensors["k"], nf4.tensors["k"])
        assert auto.lossy
        assert store.get(b"short") is None
        clock.advance(81)
        assert store.get(b"exact") is not None, "the get at 20 s moved its deadline"
        clock.advance(101)
        assert store.get(b"exact") is None


def test_a_closed_store_says_so() -> None:
    store = open_store()
    store.close()
    store.close()
    with pytest.raises(TierUnavailable, match="closed"):
        store.get(b"k")
    with pytest.raises(TierUnavailable, match="closed"):
        store.put(b"k", {"k": chunk(0)})


def test_a_store_opens_from_a_toml_file(tmp_path: Path) -> None:
    file = tmp_path / "store.toml"
    file.write_text(f'ttl_s = 5\n[hot]\ncapacity_nbytes = "2MiB"\n[cold]\npath = "{tmp_path / "cold"}"\n')
    with Store.open(file) as store:
        assert (store.config.ttl_s, store.config.hot.capacity_nbytes) == (5.0, 2 * MIB)
        store.put(b"k", {"k": chunk(0)}, ttl_s=100)
        store.demote(b"k")
    with Store.open(file) as store:
        assert store.get(b"k") is not None
    file.write_text("[hot]\ncapacity = 5\n")
    with pytest.raises(ConfigError, match=r"unknown setting hot.capacity; did you mean hot.capacity_nbytes\?"):
        Store.open(file)


def test_the_background_maintainer_sweeps_and_promotes() -> None:
    done = threading.Event()
    with Store.open(StoreConfig(hot=HotConfig(4 * MIB), sweep_interval_s=0.01)) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        store.get(b"k")
        store.get(b"k")
        store.put(b"short", {"x": torch.ones(4)}, ttl_s=0.05)
        for _ in range(500):
            values, info = store.stats().values, store.inspect(b"k")
            assert info is not None
            if values["expirations"] == 1 and info.tiers == ("hot", "warm"):
                break
            done.wait(0.01)
        else:
            pytest.fail(f"neither swept nor promoted: {values}, {info}")
        assert values["maintainer_errors"] == 0


@pytest.mark.parametrize("disk", [False, True])
def test_many_threads_see_no_wrong_bytes_and_no_deadlock(tmp_path: Path, disk: bool) -> None:
    """Each value says which key and version it is in every row: a mix of two values would show."""
    config = StoreConfig(
        hot=HotConfig(600_000),
        warm=WarmConfig(100_000),
        cold=ColdConfig(path=str(tmp_path) if disk else None, capacity_nbytes=4 * MIB),
        promote_after=1,
        sweep_interval_s=0.005,
    )
    errors: list[BaseException] = []

    def work(store: Store, worker: int) -> None:
        generator = torch.Generator().manual_seed(worker)
        try:
            for step in range(120):
                n = int(torch.randint(0, 24, (1,), generator=generator))
                key, verb = b"k%d" % n, step % 6
                if verb < 2:
                    value = torch.full((8 + n, 64), float(n + 1))
                    store.put(key, {"k": value, "n": torch.full((4,), n)}, fidelity="exact" if n % 3 == 0 else "auto")
                elif verb < 5:
                    hit = store.get(key)
                    if hit is not None:
                        assert hit.tensors["k"].shape == (8 + n, 64)
                        assert hit.tensors["n"].eq(n).all()
                        assert torch.allclose(hit.tensors["k"], torch.tensor(float(n + 1)), rtol=0.01)
                else:
                    [store.demote, store.promote, store.delete, store.touch][n % 4]([key] if n % 4 == 3 else key)  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            errors.append(error)

    with Store.open(config) as store:
        threads = [threading.Thread(target=work, args=(store, i)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
        assert not errors, errors[0]
        stats = store.stats()
        assert stats.values["maintainer_errors"] == 0
        assert stats.values["in_transit"] == 0
        for tier in stats.tiers.values():
            assert tier.used_nbytes <= tier.capacity_nbytes


def test_memory_stays_within_the_budget_and_a_quarter() -> None:
    """Budget 96 MiB, 8 times as much put through: resident memory grows by no more than 1.25 x budget + 64 MiB.

    In a process of its own whose allocator gives large blocks back at once, as the daemon's does: in this one what
    glibc keeps depends on the threads of the tests before it.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PUT_EIGHT_BUDGETS],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert int(done.stdout) <= 1.25 * 96 * MIB + 64 * MIB


_PUT_EIGHT_BUDGETS = """
import psutil, torch
from kvstore.clock import ManualClock
from kvstore.config import HotConfig, StoreConfig, WarmConfig
from kvstore.store import Store

torch.set_num_threads(1)
process, value, peak = psutil.Process(), torch.randn(16384, 64), 0
config = StoreConfig(HotConfig(64 << 20), WarmConfig(32 << 20))
with Store.open(config, clock=ManualClock(), background=False) as store:
    store.put(b"first", {"k": value})
    store.demote(b"first")
    before = process.memory_info().rss
    for i in range(192):
        store.put(b"k%d" % i, {"k": value})
        peak = max(peak, process.memory_info().rss - before)
print(peak)
"""


def test_what_an_entry_costs_beside_its_bytes_is_counted() -> None:
    """Small entries are mostly overhead: what is counted for them covers what Python allocates for them."""
    import tracemalloc

    with open_store(hot=64 * MIB) as store:
        store.put(b"warm-up", {"x": torch.ones(1)})
        tracemalloc.start()
        used = store._r.hot.used_nbytes
        for i in range(5000):
            store.put(b"key-%08d" % i, {"x": torch.ones(4)})
        allocated, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        counted = store._r.hot.used_nbytes - used
        assert 0.5 * counted <= allocated <= 1.1 * counted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_hot_tier_can_live_on_a_gpu(tmp_path: Path) -> None:
    config = StoreConfig(hot=HotConfig(4 * MIB, device="cuda:0"), cold=ColdConfig(path=str(tmp_path)))
    with Store.open(config, clock=ManualClock(), background=False) as store:
        store.put(b"auto", {"k": chunk(0)})
        store.put(b"exact", {"k": chunk(1).cuda()}, fidelity="exact")
        for key, value in ((b"auto", chunk(0)), (b"exact", chunk(1))):
            hit = store.get(key)
            assert hit is not None
            assert hit.tensors["k"].device.type == "cuda"
            assert torch.equal(hit.tensors["k"].cpu(), value)
        assert store.demote(b"auto", b"exact") == 2
        warm = store._r.warm.get(b"auto")  # type: ignore[arg-type]
        assert warm is not None
        assert all(part.device.type == "cpu" for part in warm.tensors["k"].parts.values())
        exact, auto = store.get(b"exact"), store.get(b"auto")
        assert exact is not None
        assert auto is not None
        assert torch.equal(exact.tensors["k"].cpu(), chunk(1))
        assert auto.tensors["k"].device.type == "cuda"


def test_values_that_a_codec_cannot_hold_stay_exact_and_disturb_nobody(tmp_path: Path) -> None:
    """float16 values at the edge of the type: the decoded scale would be infinite."""
    with open_store(path=tmp_path) as store:
        edge = torch.full((128,), 65504.0, dtype=torch.float16)
        edge[64:] = torch.linspace(-60000, 65504, 64)
        store.put(b"edge", {"x": edge})
        for _ in range(2):
            store.demote(b"edge")
        hit = store.get(b"edge")
        assert hit is not None
        assert torch.isfinite(hit.tensors["x"]).all()
        assert hit.lossy or torch.equal(hit.tensors["x"], edge)


def test_a_failure_while_moving_leaves_nothing_in_transit(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store() as store:
        store.put(b"k", {"k": chunk(0)})

        def fail(entry: Entry, codec: Any, hints: Any) -> Entry:
            raise MemoryError

        monkeypatch.setattr(kvstore.residency.transcode, "encode_entry", fail)
        with pytest.raises(MemoryError):
            store.demote(b"k")
        monkeypatch.undo()
        assert store.get(b"k") is None
        assert store.stats().values["in_transit"] == 0
        store.put(b"k", {"k": chunk(1)})
        assert store.get(b"k") is not None


def test_an_entry_that_cannot_be_decoded_is_a_miss_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store() as store:
        for key in (b"a", b"b"):
            store.put(key, {"k": chunk(0)})
            store.demote(key)

        def unknown(entry: Entry, out: Any = None) -> dict[str, torch.Tensor]:
            raise CodecError("unknown encoding")

        monkeypatch.setattr(kvstore.residency.transcode, "decode_all", unknown)
        assert store.get(b"a") is None
        assert store.get_many([b"b"], leading=True) == []
        monkeypatch.undo()
        assert store.inspect(b"a") is None
        assert store.stats().values["misses_corrupt"] == 2


def test_a_drain_keeps_what_admission_would_refuse(tmp_path: Path) -> None:
    config = StoreConfig(cold=ColdConfig(path=str(tmp_path), admission="reused"))
    clock = ManualClock()
    with Store.open(config, clock=clock, background=False) as store:
        store.put(b"never hit", {"k": chunk(0)}, fidelity="exact")
    with Store.open(config, clock=clock, background=False) as store:
        assert store.get(b"never hit") is not None


def test_keys_and_values_are_nf4_kv_and_other_tensors_nf4() -> None:
    with open_store() as store:
        store.put(b"kv", {"k": chunk(0), "v": chunk(1)})
        store.put(b"state", {"ssm": chunk(2)})
        assert store.demote(b"kv", b"state") == 2
        assert [store.get(key).encoding for key in (b"kv", b"state")] == ["nf4-kv2", "nf4"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("bound", "encoding"), [(0.2, "nf4-kv2"), (0.02, "int8"), (0.0001, "raw")])
def test_a_bound_on_the_error_picks_the_cheapest_encoding_that_keeps_it(
    tmp_path: Path, bound: float, encoding: str
) -> None:
    config = StoreConfig(warm=WarmConfig(max_relative_error=bound), cold=ColdConfig(path=str(tmp_path)))
    with Store.open(config, clock=ManualClock(), background=False) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        hit = store.get(b"k")
        assert hit is not None
        assert hit.encoding == encoding
        assert (hit.tensors["k"] - chunk(0)).norm() <= bound * chunk(0).norm()


@pytest.mark.parametrize("codec", ["nf4", "nf4-kv", "nf4-kv2", "int8"])
def test_a_codec_can_be_chosen(codec: str) -> None:
    config = StoreConfig(warm=WarmConfig(codec=codec))
    with Store.open(config, clock=ManualClock(), background=False) as store:
        store.put(b"k", {"k": chunk(0)})
        store.demote(b"k")
        hit = store.get(b"k")
        assert hit is not None
        assert (hit.tier, hit.encoding, hit.lossy) == ("warm", codec, True)


@pytest.mark.parametrize("shape", [(2, 256, 3, 64), (1, 4, 512, 64), (4, 256, 64), (512, 64), (30, 8, 3, 64)])
def test_every_layout_of_keys_is_a_seventh_below_hot(shape: tuple[int, ...]) -> None:
    with open_store(hot=8 * MIB) as store:
        x = torch.randn(shape)
        store.put(b"k", {"k": x})
        store.demote(b"k")
        info, hit = store.inspect(b"k"), store.get(b"k")
        assert info is not None
        assert hit is not None
        assert info.tier_nbytes[0] <= 4 * x.numel() / 6.8 + 2048
        assert (hit.tensors["k"] - x).norm() < 0.12 * x.norm()


def test_the_kernel_is_tried_when_a_store_opens_and_not_by_its_first_put(monkeypatch):
    tried = []
    monkeypatch.setattr(kernels, "best", tried.append)
    kernels._best.cache_clear()
    try:
        Store.open(background=False).close()
        assert len(tried) == 1
    finally:
        kernels._best.cache_clear()
