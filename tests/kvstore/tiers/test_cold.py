"""The cold tier: what it keeps, what it forgets, and that it never lies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig
from kvstore.disk import SystemDisk
from kvstore.disk.reading import read_entry
from kvstore.disk.writer import ROW_NBYTES
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import Described, EncodedTensor, Entry
from kvstore.errors import ConfigError, OverQuota, RecordCorrupt, TierUnavailable
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.tiers.cold import Cold

MIB = 1 << 20


class Holder:
    """A store's part: Metas by key, and what was dropped."""

    def __init__(self, path: Path, clock: ManualClock | None = None, **config: object) -> None:
        self.path = path
        self.clock = clock or ManualClock()
        self.config = replace(ColdConfig(capacity_nbytes=64 * MIB, write_buffer_nbytes=8 * MIB), **config)
        self.disk = SystemDisk()
        self.metas: dict[Key, Meta] = {}
        self.dropped: list[tuple[Key, str]] = []
        self.cold = self.open()

    def open(self) -> Cold:
        self.cold = Cold.open(
            self.path, self.config, self.clock,
            meta_of=self._meta_of, on_drop=lambda *args: self.dropped.append(args), disk=self.disk,
        )  # fmt: skip
        found = self.cold.recovered()
        self.metas = {found.keys[row]: found.resting.meta(row) for row in found.order.tolist()}
        return self.cold

    def _meta_of(self, key: Key) -> Meta | None:
        return self.metas.get(key)  # `metas` is another dictionary after each opening

    def reopen(self) -> Cold:
        self.cold.close()
        return self.open()

    def put(self, key: Key, fill: int = 0, nbytes: int = 1000, ttl_s: float = 3600.0, **meta: object) -> Entry:
        now = self.clock.now()
        entry = Entry(key, {"x": raw(torch.full((nbytes,), fill, dtype=torch.uint8))})
        self.metas[key] = Meta(now, now + ttl_s, ttl_s, nbytes, **meta)
        self.cold.displace(entry)
        self.cold.put(entry)
        return entry

    def forget(self, key: Key) -> None:
        self.metas.pop(key, None)
        self.cold.wait(self.cold.queue_removal(key))


def raw(x: torch.Tensor) -> EncodedTensor:
    return EncodedTensor(TensorSpec(str(x.dtype).removeprefix("torch."), tuple(x.shape)), "raw", {"": x})


def key(n: int) -> Key:
    return Key(b"%032d" % n)


def filled(entry: Entry | None) -> int | None:
    """The one value an entry is filled with."""
    if entry is None:
        return None
    values = entry.tensors["x"].parts[""].unique()
    assert values.numel() == 1
    return int(values)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "cold")
    yield holder
    holder.cold.close()


def test_a_value_is_readable_before_and_after_it_is_written(holder: Holder) -> None:
    holder.put(key(1), 7)
    assert filled(holder.cold.get(key(1))) == 7
    holder.cold.flush()
    assert filled(holder.cold.get(key(1))) == 7
    assert key(1) in holder.cold
    assert holder.cold.get(key(2)) is None
    assert holder.cold.specs_of(key(1)) == {"x": Described(TensorSpec("uint8", (1000,)), "raw", 0.0)}


def test_what_was_seen_here_and_has_left_since_is_a_miss_and_no_damage(holder: Holder) -> None:
    """A get that found a key reads it without asking again whether it is held."""
    for n in (1, 2):
        holder.put(key(n), n)
    holder.cold.flush()
    assert filled(holder.cold.get(key(1), seen=True)) == 1
    with holder.cold._changed:  # the writer waits
        ticket = holder.cold.queue_removal(key(1))
        assert holder.cold.get(key(1), seen=True) is None
        holder.put(key(2), 22)
        assert filled(holder.cold.get(key(2), seen=True)) == 22
    holder.cold.wait(ticket)
    holder.cold.flush()
    assert holder.cold.get(key(1), seen=True) is None
    assert filled(holder.cold.get(key(2), seen=True)) == 22
    assert (holder.cold.corrupt_total, holder.dropped) == (0, [])


def test_everything_is_found_again_after_a_restart(holder: Holder) -> None:
    for n in range(20):
        holder.put(key(n), n, hits=n, exact=n % 2 == 0, lossy=n % 3 == 0, encoding="nf4")
    before = dict(holder.metas)
    cold = holder.reopen()
    assert holder.metas == before
    assert [filled(cold.get(key(n))) for n in range(20)] == list(range(20))


def test_order_and_deadlines_survive_a_restart_without_a_write_on_each_get(holder: Holder) -> None:
    for n in range(6):
        holder.put(key(n), n)
    holder.cold.flush()
    written = holder.cold.stats().counters.commits
    holder.clock.advance(1000)
    for n in (4, 1):
        holder.metas[key(n)].refresh(holder.clock.now())
    holder.cold.touch([key(4), key(1)])
    assert holder.cold.stats().counters.commits == written
    holder.cold.flush_meta()
    cold = holder.reopen()
    assert list(cold.keys()) == [key(n) for n in (0, 2, 3, 5, 4, 1)]
    assert list(holder.metas) == list(cold.keys())
    assert holder.metas[key(1)].expires_at == holder.clock.now() + 3600
    holder.clock.advance(2601)
    assert set(holder.reopen().keys()) == {key(4), key(1)}


def test_a_deadline_of_a_wrong_clock_is_clamped_to_its_ttl(holder: Holder) -> None:
    holder.put(key(1), ttl_s=100.0)
    holder.cold.close()
    holder.clock = ManualClock(holder.clock.now() - 30 * 86400)
    holder.open()
    assert holder.metas[key(1)].expires_at == holder.clock.now() + 100


def test_expired_entries_are_gone_after_a_restart(holder: Holder) -> None:
    holder.put(key(1), ttl_s=10.0)
    holder.put(key(2), ttl_s=10.0, pinned=True)
    holder.clock.advance(11)
    cold = holder.reopen()
    assert list(holder.metas) == [key(2)]
    assert key(1) not in cold


def test_the_least_recently_used_leave_first_and_pinned_ones_stay(holder: Holder) -> None:
    holder.put(key(0), pinned=True, nbytes=MIB)
    for n in range(1, 100):
        holder.put(key(n), nbytes=MIB)
        holder.cold.touch([key(1)])
        assert holder.cold.used_nbytes <= holder.cold.capacity_nbytes
    held = set(holder.cold.keys())
    assert {key(0), key(1), key(99), key(98)} <= held
    assert [k for k, reason in holder.dropped if reason == "evicted"] == [
        key(n) for n in range(2, 100) if key(n) not in held
    ]
    holder.cold.flush()
    assert holder.cold.disk_nbytes() <= 1.1 * holder.cold.capacity_nbytes


def test_nothing_left_to_evict_is_over_quota(holder: Holder) -> None:
    for n in range(60):
        holder.put(key(n), nbytes=MIB, pinned=True)
    with pytest.raises(OverQuota, match="pinned"):
        holder.put(key(60), nbytes=5 * MIB)
    with pytest.raises(OverQuota, match="do not fit"):
        holder.put(key(61), nbytes=100 * MIB)


def test_pins_are_limited_to_their_share(holder: Holder) -> None:
    for n in range(40):
        holder.put(key(n), nbytes=MIB)
    for n in range(31):
        holder.cold.pin(key(n))
    with pytest.raises(OverQuota, match="limit is"):
        holder.cold.pin(key(31))
    holder.cold.unpin(key(0))
    holder.cold.pin(key(31))


def test_a_replaced_value_never_comes_back(holder: Holder) -> None:
    for fill in range(10):
        holder.put(key(1), fill)
        if fill % 3 == 0:
            holder.cold.flush()
        assert filled(holder.cold.get(key(1))) == fill
    assert filled(holder.reopen().get(key(1))) == 9


def test_a_removed_key_is_gone_at_once_and_after_a_restart(holder: Holder) -> None:
    holder.put(key(1))
    holder.cold.flush()
    holder.put(key(2))
    for n in (1, 2):
        holder.forget(key(n))
        assert holder.cold.get(key(n)) is None
    cold = holder.reopen()
    assert len(cold) == 0
    assert cold.used_nbytes == 0
    assert cold.remove(key(1)) is False


def test_used_bytes_end_as_what_lies_on_disk(holder: Holder) -> None:
    for n in range(50):
        holder.put(key(n % 20), n, nbytes=1000 * n + 1)
        if n % 7 == 0:
            holder.forget(key(n % 5))
    holder.cold.flush()
    used = holder.cold.used_nbytes
    assert holder.reopen().used_nbytes == used
    assert used == sum(map(holder.cold.nbytes_of, holder.cold.keys()))


def segment_files(path: Path) -> list[Path]:
    return sorted((path / "segments").glob("*.seg"))


def flip(path: Path, marker: bytes) -> None:
    """Flip a bit inside every place where `marker` is: LMDB leaves old copies of a page behind."""
    data = bytearray(path.read_bytes())
    at = data.find(marker)
    assert at >= 0
    while at >= 0:
        data[at + len(marker) // 2] ^= 4
        at = data.find(marker)
    path.write_bytes(data)


def test_a_corrupt_byte_is_a_miss_counted_and_named(holder: Holder, caplog: pytest.LogCaptureFixture) -> None:
    holder.put(key(1), 0x5A)
    holder.put(key(2), 0x5B)
    holder.cold.flush()
    flip(segment_files(holder.path)[0], b"\x5a" * 500)
    assert holder.cold.get(key(1)) is None
    assert filled(holder.cold.get(key(2))) == 0x5B
    assert holder.cold.stats().counters.corrupt_total == 1
    assert holder.dropped == [(key(1), "corrupt")]
    assert key(1).hex() in caplog.text
    assert key(1) not in holder.cold
    assert list(holder.reopen().keys()) == [key(2)]


def test_a_truncated_segment_is_a_miss(holder: Holder) -> None:
    holder.put(key(1), nbytes=100_000)
    holder.cold.flush()
    os.truncate(segment_files(holder.path)[0], 50_000)
    assert holder.cold.get(key(1)) is None
    assert holder.dropped == [(key(1), "corrupt")]


def test_a_damaged_row_is_a_miss_at_the_next_start(holder: Holder) -> None:
    for n in range(3):
        holder.put(key(n), n, hits=0x41424344 + (n == 1))
    holder.cold.close()
    flip(holder.path / "index" / "data.mdb", b"ECBA")
    cold = holder.open()
    assert list(cold.keys()) == [key(0), key(2)]
    assert cold.stats().counters.corrupt_total == 1


@pytest.mark.parametrize("clean", [True, False])
def test_a_truncated_index_is_quarantined_and_the_tier_starts_empty(holder: Holder, clean: bool) -> None:
    for n in range(500):
        holder.put(key(n))
    holder.cold.close()
    if not clean:
        (holder.path / "STATE").write_text(json.dumps({"format": 1, "clean": False, "boot_id": "x"}))
    data = holder.path / "index" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2 // 4096 * 4096)
    cold = holder.open()
    assert len(cold) == 0
    assert cold.stats().quarantined is not None
    assert len(list((holder.path / "quarantine").iterdir())) == 1
    assert segment_files(holder.path) == []
    holder.put(key(1), 5)
    assert filled(holder.reopen().get(key(1))) == 5


@pytest.mark.parametrize("clean", [True, False])
def test_an_index_that_was_being_made_when_the_power_was_cut_is_made_anew(holder: Holder, clean: bool) -> None:
    """Power-cut seed 214580465: the engine's file was there and the table of rows was not. Closed in order: damage."""
    holder.cold.close()
    shutil.rmtree(holder.path / "index")
    (holder.path / "index").mkdir()
    lmdb.open(str(holder.path / "index"), max_dbs=4).close()
    (holder.path / "STATE").write_text(json.dumps({"format": 2, "clean": clean, "boot_id": "x"}))
    assert (holder.open().stats().quarantined is None) == (not clean)
    holder.put(key(1), 5)
    assert filled(holder.reopen().get(key(1))) == 5


def test_a_drop_file_means_start_empty_once(holder: Holder) -> None:
    holder.put(key(1))
    holder.cold.close()
    (holder.path / "DROP").touch()
    assert len(holder.open()) == 0
    holder.put(key(2))
    assert len(holder.reopen()) == 1


def test_a_second_opener_is_refused_with_a_sentence(holder: Holder) -> None:
    with pytest.raises(ConfigError, match="in use by another process"):
        Cold.open(holder.path, holder.config, holder.clock, meta_of=holder.metas.get, on_drop=lambda *_: None)


def test_a_newer_format_is_refused_and_left_alone(holder: Holder) -> None:
    holder.put(key(1))
    holder.cold.close()
    state = holder.path / "STATE"
    old = state.read_text()
    state.write_text(json.dumps({"format": 99, "clean": True}))
    with pytest.raises(ConfigError, match="format 99"):
        holder.open()
    state.write_text(old)
    assert len(holder.open()) == 1


def test_a_put_the_store_has_forgotten_is_not_written(holder: Holder) -> None:
    with holder.cold._changed:  # the writer waits
        holder.put(key(1))
        del holder.metas[key(1)]
    holder.cold.flush()
    assert holder.cold._records._rows.get(key(1)) is None


def test_an_unwritable_entry_is_dropped_by_name(holder: Holder) -> None:
    entry = Entry(
        key(1), {"x": EncodedTensor(TensorSpec("float32", (2,)), "odd", {"": torch.ones(1)}, {"bad": float("nan")})}
    )
    holder.metas[key(1)] = Meta(0, 1e12, 10, 8)
    holder.cold.put(entry)
    holder.cold.flush()
    assert holder.dropped == [(key(1), "write_failed")]
    assert holder.cold.get(key(1)) is None
    assert holder.cold.used_nbytes == 0


class FailingDisk(SystemDisk):
    """Writes fail while `broken`."""

    broken = False

    def sync(self, fd: int) -> None:
        if self.broken:
            raise OSError(5, "injected")
        super().sync(fd)


def test_a_failing_disk_loses_nothing_and_recovers_by_itself(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    holder.cold.close()
    holder.disk = FailingDisk()
    holder.open()
    holder.disk.broken = True
    holder.put(key(1), 1)
    while holder.cold.healthy:
        time.sleep(0.01)
    with pytest.raises(TierUnavailable):
        holder.cold.flush(timeout_s=0.2)
    assert filled(holder.cold.get(key(1))) == 1
    entry = Entry(key(2), {"x": raw(torch.zeros(9 * MIB, dtype=torch.uint8))})
    with pytest.raises(TierUnavailable, match="waiting"):
        holder.cold.displace(entry)
    holder.disk.broken = False
    holder.cold.flush()
    assert holder.cold.healthy
    assert holder.cold.stats().counters.write_errors > 0
    assert filled(holder.reopen().get(key(1))) == 1
    holder.cold.close()


def test_the_write_buffer_slows_the_caller_down_and_a_larger_entry_goes_alone(holder: Holder) -> None:
    for n in range(40):
        holder.put(key(n), n, nbytes=MIB)
        assert holder.cold.pending_nbytes <= holder.config.write_buffer_nbytes
    holder.put(key(99), 3, nbytes=20 * MIB)
    holder.cold.flush()
    assert filled(holder.cold.get(key(99))) == 3


def test_threads_never_see_another_value(holder: Holder) -> None:
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            for n in range(8):
                try:
                    seen = filled(holder.cold.get(key(n)))
                except Exception as error:  # noqa: BLE001 - the thread's boundary
                    wrong.append(error)
                    return
                if seen is not None and seen % 8 != n:
                    wrong.append((n, seen))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(400):
        n = i % 8
        if i % 5 == 4:
            holder.cold.remove(key(n))
        holder.put(key(n), (i * 8 + n) % 256, nbytes=20_000)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert holder.cold.stats().counters.corrupt_total == 0


CHILD = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_cold import Holder, key
holder = Holder(Path(sys.argv[1]))
{body}
print("ready", flush=True)
sys.stdin.read()
"""


def killed(path: Path, body: str) -> None:
    """Run `body` in a process of its own and kill -9 it."""
    code = CHILD.format(tests=str(Path(__file__).parent), body=body)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None and child.stdin is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()


def test_kill_9_keeps_what_was_committed_and_a_deleted_key_stays_deleted(tmp_path: Path) -> None:
    body = "for n in range(30): holder.put(key(n), n)\nholder.cold.flush()\nholder.forget(key(3))\n"
    body += "holder.put(key(4), 44)\nholder.cold.flush()"
    killed(tmp_path, body)
    holder = Holder(tmp_path)
    expected = {n: n for n in range(30) if n != 3} | {4: 44}
    assert {n: filled(holder.cold.get(key(n))) for n in range(30) if key(n) in holder.cold} == expected
    assert holder.cold.stats().quarantined is None
    holder.cold.close()


def test_space_left_by_a_crash_is_found_at_the_next_start(tmp_path: Path) -> None:
    # Killed after the records were written and before a row names them.
    body = "for n in range(4): holder.put(key(n), n, nbytes=2 << 20)\nholder.cold.flush()\n"
    body += "holder.cold._records._rows.write = lambda *a: print('ready', flush=True) or __import__('time').sleep(60)\n"
    body += "for n in range(4, 8): holder.put(key(n), n, nbytes=2 << 20)\nholder.cold.flush(60)"
    killed(tmp_path, body)
    holder = Holder(tmp_path)
    assert sorted(holder.cold.keys()) == [key(n) for n in range(4)]
    assert holder.cold.disk_nbytes() < 9 * MIB
    holder.cold.close()


def test_hole_punching_gives_space_back_at_once(holder: Holder) -> None:
    for n in range(16):
        holder.put(key(n), n, nbytes=MIB)
    holder.cold.flush()
    before = holder.cold.disk_nbytes()
    for n in range(0, 16, 2):
        holder.forget(key(n))
    assert holder.cold.disk_nbytes() <= before - 8 * MIB
    assert [filled(holder.cold.get(key(n))) for n in range(1, 16, 2)] == list(range(1, 16, 2))


def test_small_records_share_blocks_and_give_them_back(holder: Holder) -> None:
    for n in range(2000):
        holder.put(key(n), n % 256, nbytes=4300)
    holder.cold.flush()
    records = holder.cold.used_nbytes - 2000 * ROW_NBYTES
    assert holder.cold._records._segments.disk_nbytes() < 1.02 * records < 2000 * 5000
    for n in range(1990):
        holder.cold.queue_removal(key(n))
    holder.forget(key(1990))
    assert holder.cold._records._segments.disk_nbytes() <= 12 * 4300 + 2 * 4096
    assert [filled(holder.cold.get(key(n))) for n in range(1991, 2000)] == [n % 256 for n in range(1991, 2000)]


def until(done: Callable[[], bool]) -> None:
    """Wait for another thread; pytest's own limit ends a wait in vain."""
    while not done():
        time.sleep(0.01)


def sparse(holder: Holder) -> list[int]:
    """Fill two segments with small records, then remove all but every fifth; the numbers left."""
    for n in range(8000):
        holder.put(key(n), n % 256, nbytes=4300)
    for n in range(8000):
        if n % 5:
            holder.cold.queue_removal(key(n))
    holder.cold.flush()
    return list(range(0, 8000, 5))


def test_small_records_alone_in_their_blocks_are_gathered_and_files_stay_near_what_lives(holder: Holder) -> None:
    left = sparse(holder)
    until(lambda: holder.cold._records._segments.disk_nbytes() < holder.cold.used_nbytes / 0.75)
    assert holder.cold.stats().counters.records_moved > 500
    assert [filled(holder.cold.get(key(n))) for n in left] == [n % 256 for n in left]
    cold = holder.reopen()
    assert [filled(cold.get(key(n))) for n in left] == [n % 256 for n in left]
    assert cold.stats().counters.corrupt_total == 0


def test_gathering_asks_the_write_budget_and_leaves_what_it_cannot_read(tmp_path: Path) -> None:
    holder = Holder(tmp_path, write_nbytes_per_day=1)
    left = sparse(holder)
    until(lambda: not holder.cold._records._writer._freed)
    assert holder.cold.stats().counters.records_moved == 0
    holder.cold.close()
    first = segment_files(holder.path)[0]
    os.truncate(first, first.stat().st_size // 2)
    holder.config = replace(holder.config, write_nbytes_per_day=0)
    cold = holder.open()
    until(lambda: cold.stats().counters.records_moved > 500)
    found = {n: filled(cold.get(key(n))) for n in left}
    assert 0 < sum(value is None for value in found.values()) < 800
    assert all(value in (None, n % 256) for n, value in found.items())
    cold.close()


def test_a_row_that_comes_back_finds_no_record(holder: Holder) -> None:
    """Found by a swapped page of the index: a deleted record was still whole in a block that it shared."""
    for n in range(3):
        holder.put(key(n), n, nbytes=500)
    holder.cold.flush()
    row = holder.cold._records._rows.get(key(1))
    assert row is not None
    holder.forget(key(1))
    with pytest.raises(RecordCorrupt):
        read_entry(holder.cold._records._segments, key(1), row)
    assert [filled(holder.cold.get(key(n))) for n in (0, 2)] == [0, 2]


def test_a_directory_of_the_first_format_is_read_and_goes_on(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # in which every record had blocks of its own
        patch.setattr("kvstore.disk.segments.align_of", lambda _: 4096)
        patch.setattr("kvstore.disk.segments.place_nbytes", lambda nbytes: -(-nbytes // 4096) * 4096)
        for n in range(40):
            holder.put(key(n), n, nbytes=3000)
        holder.cold.close()
    (holder.path / "STATE").write_text(json.dumps({"format": 1, "clean": True, "boot_id": "x"}))
    cold = holder.open()
    assert json.loads((holder.path / "STATE").read_text())["format"] == 2
    for n in range(40, 80):
        holder.put(key(n), n, nbytes=3000)
    for n in range(1, 80, 2):
        holder.forget(key(n))
    assert {n: filled(cold.get(key(n))) for n in range(80) if key(n) in cold} == {n: n for n in range(0, 80, 2)}
    assert [filled(holder.reopen().get(key(n))) for n in range(0, 80, 2)] == list(range(0, 80, 2))


def test_the_index_map_grows_while_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.disk.rows.MAP_MIN_NBYTES", 128 << 10)
    holder = Holder(tmp_path, capacity_nbytes=4 * MIB, free_min_fraction=0.0)
    holder.cold._records._rows.grow(128 << 10)
    holder.put(key(0), 7, nbytes=100)
    holder.cold.flush()
    wrong: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if filled(holder.cold.get(key(0))) != 7:
                wrong.append("a miss, or another value")

    reader = threading.Thread(target=read)
    reader.start()
    with holder.cold._changed:  # the writer waits: it begins when all is there, and the map grows in its first commits
        for n in range(1, 2500):
            holder.put(key(n), n % 256, nbytes=100)
        holder.cold.touch([key(0)])
    holder.cold.flush()
    stop.set()
    reader.join()
    assert wrong == []
    assert holder.cold._records._rows.map_nbytes > 256 << 10
    assert len(holder.cold) == 2500
    assert filled(holder.reopen().get(key(2499))) == 2499 % 256
    holder.cold.close()


def test_values_survive_while_segments_come_and_go(holder: Holder) -> None:
    for n in range(200):
        holder.put(key(n), n, nbytes=MIB)
        assert filled(holder.cold.get(key(n))) == n
    held = list(holder.cold.keys())
    holder.cold.flush()
    assert [filled(holder.cold.get(k)) for k in held] == [int(k) for k in held]
    assert holder.cold.disk_nbytes() >= len(held) * MIB
    assert len(segment_files(holder.path)) < 10
