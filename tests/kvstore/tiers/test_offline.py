"""What is written, and what an operator does to a directory: admission, budget, floor, scrub, fsck, export."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kvstore.clock import ManualClock
from kvstore.errors import ConfigError
from kvstore.metadata.meta import Meta
from kvstore.tiers.admission import Admission
from kvstore.tiers.offline import Exported, compact, export, fsck, import_files
from tests.kvstore.tiers.test_cold import Holder, filled, flip, key, segment_files

MIB = 1 << 20


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(tmp_path / "cold")
    yield holder
    holder.cold.close()


def meta(**kwargs: object) -> Meta:
    return Meta(0, 1, 1, 1, **kwargs)  # type: ignore[arg-type]


def test_reused_admits_what_was_hit_or_pinned() -> None:
    admission = Admission("reused", 0, ManualClock())
    admission.refused(key(1))
    assert not admission.deserves(key(1), meta())
    assert admission.deserves(key(1), meta(hits=1))
    assert admission.deserves(key(1), meta(pinned=True))


def test_ghost_admits_what_left_and_was_put_again() -> None:
    admission = Admission("ghost", 0, ManualClock())
    assert not admission.deserves(key(1), meta())
    assert not admission.deserves(key(1), meta())
    admission.refused(key(1))
    assert admission.deserves(key(1), meta())


def test_an_empty_write_budget_lets_only_reused_entries_through_until_it_fills_again() -> None:
    clock = ManualClock()
    admission = Admission("all", 86_400, clock)
    assert admission.deserves(key(1), meta())
    admission.wrote(86_410)
    assert not admission.deserves(key(1), meta())
    assert admission.deserves(key(1), meta(hits=1))
    clock.advance(9)
    assert not admission.deserves(key(1), meta())
    clock.advance(2)
    assert admission.deserves(key(1), meta())
    clock.advance(1e6)
    assert admission.left_nbytes == 86_400


def test_what_is_written_is_taken_from_the_budget(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold", write_nbytes_per_day=10 * MIB)
    holder.put(key(1), nbytes=MIB)
    holder.cold.flush()
    assert 9 * MIB - 20_000 < holder.cold.admission.left_nbytes < 9 * MIB
    holder.cold.close()


def test_the_tier_shrinks_when_others_fill_the_disk(holder: Holder) -> None:
    for n in range(10):
        holder.put(key(n), nbytes=MIB)
    holder.cold.flush()
    room = 3 * MIB
    holder.disk.room = lambda _: (room, 100 * MIB)  # type: ignore[method-assign]  # the floor is 2 MiB
    holder.cold.maintain()
    assert len(holder.cold) == 10
    room = 0
    holder.cold.maintain()
    while holder.cold._records._writer.room_due or len(holder.cold) == 10:
        pass
    room = 3 * MIB
    assert sorted(holder.cold.keys()) == [key(n) for n in range(2, 10)]


def test_scrubbing_finds_damage_that_nobody_asked_for(holder: Holder) -> None:
    for n in range(3):
        holder.put(key(n), 0x50 + n)
    holder.cold.flush()
    flip(segment_files(holder.path)[0], b"\x51" * 500)
    holder.cold.maintain()
    assert holder.dropped == [(key(1), "corrupt")]


def test_verify_reports_and_drops(holder: Holder) -> None:
    for n in range(3):
        holder.put(key(n), 0x50 + n)
    holder.cold.flush()
    flip(segment_files(holder.path)[0], b"\x51" * 500)
    told = list(holder.cold.verify())
    assert [(found.checked, found.total) for found in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert told[-1].corrupt == 1
    assert [found.corrupt for found in holder.cold.verify()] == [0, 0, 0]


def test_what_leaves_while_it_is_verified_is_not_called_damaged(holder: Holder) -> None:
    for n in range(3):
        holder.put(key(n), n)
    holder.cold.flush()
    steps = holder.cold.verify()
    next(steps)
    holder.forget(key(1))
    assert list(steps)[-1].corrupt == 0


def test_fsck_compact_export_and_import(holder: Holder, tmp_path: Path) -> None:
    for n in range(2000):
        holder.put(key(n), n % 256, nbytes=100)
    for n in range(3, 2000):
        holder.cold.remove(key(n))
    with pytest.raises(ConfigError, match="in use"):
        fsck(holder.path, holder.clock)
    holder.cold.close()
    flip(segment_files(holder.path)[0], b"\x01" * 90)
    checked = fsck(holder.path, holder.clock)
    assert (checked.entries, checked.corrupt, checked.quarantined) == (3, 1, None)
    before, after = compact(holder.path, holder.clock)
    assert after < before
    assert export(holder.path, tmp_path / "out", holder.clock) == Exported(2, 0)
    files = sorted((tmp_path / "out").iterdir())
    assert torch.equal(safetensors.torch.load_file(files[1])["x"], torch.full((100,), 2, dtype=torch.uint8))
    (tmp_path / "bad").write_bytes(os.urandom(100))
    other = tmp_path / "other"
    assert len(import_files(other, [*files, tmp_path / "bad"], holder.clock, ttl_s=60)) == 1
    again = Holder(other, holder.clock)
    assert [filled(again.cold.get(key(n))) for n in (0, 2)] == [0, 2]
    assert again.metas[key(0)].expires_at == holder.clock.now() + 60
    again.cold.close()
    holder.open()
    assert len(holder.cold) == 2
