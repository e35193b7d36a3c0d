"""What is on the disk: each record of a batch, what is said to be written, and after a crash no chunk of nobody."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.clock import ManualClock
from kvstore.config import ColdConfig, StoreConfig
from kvstore.disk.reading import read_entry, read_specs
from kvstore.disk.rows import Row, Rows
from kvstore.entries.entry import EncodedTensor, Entry, TensorSpec
from kvstore.errors import RecordCorrupt
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.store import Store
from tests.kvstore.tiers.test_cold import Holder, filled, key


def unwritable(name: Key) -> Entry:
    """Attributes that JSON cannot say."""
    x = torch.zeros(100, dtype=torch.uint8)
    return Entry(name, {"x": EncodedTensor(TensorSpec("uint8", (100,)), "odd", {"": x}, {"no": float("nan")})})


def test_what_cannot_be_written_takes_nothing_else_of_its_batch_along(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    with holder.cold._changed:  # the writer waits: all of it is one batch
        for n in (1, 3):
            holder.put(key(n), n)
            if n == 1:
                holder.metas[key(2)] = holder.metas[key(1)]
                holder.cold.put(unwritable(key(2)))
    holder.cold.flush()
    assert holder.dropped == [(key(2), "write_failed")]
    assert [filled(holder.cold.get(key(n))) for n in (1, 2, 3)] == [1, None, 3]
    holder.reopen()
    assert sorted(holder.cold.keys()) == [key(1), key(3)]
    holder.cold.close()


def test_flush_meta_returns_when_order_and_deadlines_are_written_and_again_the_next_time(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    for n in range(3):
        holder.put(key(n), n)
    holder.cold.flush()
    for turn in range(1, 4):
        holder.metas[key(0)].expires_at += 100
        holder.cold.touch([key(0)])
        assert holder.cold._records._writer.dirty
        holder.cold.flush_meta()
        assert not holder.cold._records._writer.dirty
        row = holder.cold._records._rows.get(key(0))
        assert row is not None
        assert row.meta.expires_at == holder.metas[key(0)].expires_at, f"turn {turn}"
    holder.cold.flush_meta()
    holder.cold.close()


def test_a_deletion_that_was_waited_for_is_on_the_disk(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    holder.put(key(1), 1)
    holder.put(key(2), 2)
    holder.cold.flush()
    assert holder.cold.remove(key(1))
    assert not holder.cold.remove(key(9))
    holder.cold.flush()
    assert holder.cold._records._rows.get(key(1)) is None
    assert holder.cold._records._rows.get(key(2)) is not None
    assert key(1) not in holder.cold
    holder.cold.close()


def test_a_chunk_whose_parent_a_crash_lost_is_forgotten_at_the_start(tmp_path: Path) -> None:
    config = StoreConfig(cold=ColdConfig(str(tmp_path)))
    value = {"k": torch.ones(64, 64)}
    with Store.open(config, clock=ManualClock(), background=False) as store:
        store.put_many([(b"a", value), (b"b", value), (b"c", value)], chain=True)
        store.put(b"other", value)
        store.drain()
    rows = Rows(tmp_path / "index", 1 << 20)
    rows.write({}, [Key(b"b")])
    rows.close()
    with Store.open(config, clock=ManualClock(), background=False) as store:
        assert [at is not None for at in store.locate([b"a", b"b", b"c", b"other"])] == [True, False, False, True]
        assert store.explain(b"c")[0].state == "orphaned"
        store.drain()
    with Store.open(config, clock=ManualClock(), background=False) as store:
        assert store.explain(b"c")[0].state == "never put", "it is gone from the disk, too"


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {"head_nbytes": row.head_nbytes + 8, "place": row.place._replace(nbytes=row.place.nbytes + 8)},
        lambda row: {"place": row.place._replace(nbytes=row.place.nbytes + 8)},
        lambda row: {"head_nbytes": row.head_nbytes + 8},
        lambda row: {"meta": replace(row.meta, value_nbytes=999)},
    ],
    ids=["the head and the record", "the record", "the head", "the value"],
)
def test_a_record_of_another_size_than_its_row_says_is_damaged(tmp_path: Path, change: Any) -> None:
    holder = Holder(tmp_path / "cold")
    holder.put(key(1), 1)
    holder.put(key(2), 2)
    holder.cold.flush()
    row = holder.cold._records._rows.get(key(1))
    assert isinstance(row, Row)
    assert filled(read_entry(holder.cold._records._segments, key(1), row)) == 1
    wrong = replace(row, **change(row))
    for read in (read_entry, read_specs):
        with pytest.raises(RecordCorrupt, match="its row says"):
            read(holder.cold._records._segments, key(1), wrong)
    unknown = replace(row, meta=replace(row.meta, value_nbytes=0))
    assert filled(read_entry(holder.cold._records._segments, key(1), unknown)) == 1
    holder.cold.close()


def test_a_record_that_ends_early_is_damaged(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    holder.put(key(1), 1, nbytes=10_000)
    holder.cold.flush()
    row = holder.cold._records._rows.get(key(1))
    assert row is not None
    segment = next((tmp_path / "cold").glob("**/*.seg"))
    with segment.open("r+b") as file:
        file.truncate(row.place.offset + row.place.nbytes - 1)
    with pytest.raises(RecordCorrupt, match="ends early"):
        read_entry(holder.cold._records._segments, key(1), row)
    assert holder.cold.get(key(1)) is None
    assert holder.dropped == [(key(1), "corrupt")]
    holder.cold.close()


def test_metas_are_those_that_were_held(tmp_path: Path) -> None:
    holder = Holder(tmp_path / "cold")
    holder.put(key(1), 1, sliding=False, pinned=True, pinned_until=5e9, exact=True, lossy=True, encoding="nf4", hits=7,
               last_hit_at=3.0)  # fmt: skip
    before = replace(holder.metas[key(1)])
    holder.reopen()
    found: Meta = holder.metas[key(1)]
    assert replace(found, owner=before.owner) == before
    holder.cold.close()


def test_times_that_take_turns_come_back_each_to_its_own_key(tmp_path: Path) -> None:
    """Equal ones that follow each other are made one object at a start; others are not."""
    holder = Holder(tmp_path / "cold")
    for n, ttl_s in enumerate((100.0, 300.0, 100.0, 100.0, 200.0, 100.0)):
        holder.put(key(n), n, ttl_s=ttl_s, last_hit_at=ttl_s)
    before = {name: (meta.ttl_s, meta.expires_at, meta.last_hit_at) for name, meta in holder.metas.items()}
    holder.reopen()
    assert {name: (meta.ttl_s, meta.expires_at, meta.last_hit_at) for name, meta in holder.metas.items()} == before
    assert gc.isenabled(), "it is off only while rows are read"
    holder.cold.close()
