"""Small records as LMDB values against shared blocks of segment files: the measurement behind decision 0010.

Run: python bench/small_records.py [--path DIR] [--nbytes 2048,4800,16384,49152] [--mib 64] [--rounds 3] [--trace FILE]
Both keep the same rows in LMDB, pack and check the same records and sync every batch; they differ in where a record's
bytes are. LMDB gets no tier, queue or thread of ours around it, and neither do the segments. The rounds alternate; what
is printed is the median of each. Not measured cold: both read the page cache.
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
import xxhash

from kvstore.disk import SystemDisk
from kvstore.disk.gathering import Gatherer
from kvstore.disk.reading import read_entry
from kvstore.disk.rows import Row, Rows, pack_row, parse_row
from kvstore.disk.segments import Place, Segments
from kvstore.disk.writer import BATCH_MAX, BATCH_NBYTES, BEHIND
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.record import assemble, pack, parse_head
from kvstore.keys import Key
from kvstore.metadata.meta import Meta

MIB = 1 << 20
META = Meta(1e9, 4e9, 3e9, 0)
CHURN = 2
"""How often everything is replaced, one record at a time, in random order."""


def entry_of(n: int, nbytes: int, data: torch.Tensor) -> Entry:
    """Codes that nothing compresses."""
    part = data[n % 1024 :][:nbytes]
    return Entry(Key(b"%032d" % n), {"k": EncodedTensor(TensorSpec("float32", (2 * nbytes,)), "nf4", {"": part})})


class InSegments:
    """As the tier keeps them: records in segment files, small ones in shared blocks, gathered when sparse."""

    def __init__(self, path: Path) -> None:
        (path / "segments").mkdir(parents=True, exist_ok=True)
        self._path = path
        self._rows = Rows(path / "index", 1 << 34)
        self._segments = Segments(path / "segments", SystemDisk(), 64 * MIB)
        self._gatherer = Gatherer(self._rows, self._segments, lambda _nbytes: True)
        self._freed: list[Place] = []
        self.gathered_nbytes = 0

    def write(self, entries: list[Entry], remove: list[Key], live_nbytes: int) -> None:
        """One batch, as the writer commits it."""
        records = [pack(entry, META) for entry in entries]
        places = self._segments.append([r.head, *(part.data for part in r.data)] for r in records)
        rows = {e.key: Row(p, len(r.head), 1, META) for e, r, p in zip(entries, records, places, strict=True)}
        self._free(self._rows.write(rows, remove))
        while self._segments.slack_nbytes > BEHIND * live_nbytes:
            step = self._gatherer.step()
            self.gathered_nbytes += step.nbytes
            self._free(step.freed)

    def _free(self, freed: list[Place]) -> None:
        before, self._freed = self._freed, freed
        self._segments.free(before)

    def get(self, key: Key) -> Entry:
        """Read and check."""
        row = self._rows.get(key)
        assert row is not None
        return read_entry(self._segments, key, row)

    def scan(self) -> int:
        """What a restart reads."""
        return sum(len(found.keys) for found in self._rows.scan())

    def close(self) -> None:
        """Close."""
        self._rows.sync()
        self._segments.free(self._freed)
        self._segments.close()
        self._rows.close()


class InLmdb:
    """The same rows, and each record's bytes as a value of a second table, in the same transaction."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(path), map_size=1 << 34, max_dbs=4, sync=True, metasync=False, writemap=False)
        self._rows, self._values = self._env.open_db(b"rows"), self._env.open_db(b"values")
        self.gathered_nbytes = 0

    def write(self, entries: list[Entry], remove: list[Key], live_nbytes: int) -> None:
        """One batch."""
        del live_nbytes
        with self._env.begin(write=True) as txn:
            for key in remove:
                txn.delete(key, db=self._rows)
                txn.delete(key, db=self._values)
            for entry in entries:
                record = pack(entry, META)
                value = b"".join([record.head, *(part.data for part in record.data)])
                row = Row(Place(1, 0, len(value)), len(record.head), 1, META)
                txn.put(entry.key, pack_row(entry.key, row), db=self._rows)
                txn.put(entry.key, value, db=self._values)

    def get(self, key: Key) -> Entry:
        """Read and check; the value is copied out of the map, as the tensors must outlive the transaction."""
        with self._env.begin(buffers=True) as txn:
            row = parse_row(key, bytes(txn.get(key, db=self._rows)))
            assert row is not None
            value = np.frombuffer(txn.get(key, db=self._values), np.uint8)
            head_bytes = value[: row.head_nbytes].tobytes()
            stored = torch.empty(value.size - row.head_nbytes, dtype=torch.uint8).numpy()
            stored[:] = value[row.head_nbytes :]
        digest = xxhash.xxh3_64_intdigest(stored.data)
        return assemble(parse_head(head_bytes, key), head_bytes, stored, key, digest)

    def scan(self) -> int:
        """What a restart reads: the rows."""
        with self._env.begin(db=self._rows) as txn, txn.cursor() as cursor:
            return sum(parse_row(Key(key), bytes(data)) is not None for key, data in cursor)

    def close(self) -> None:
        """Close."""
        self._env.sync(True)
        self._env.close()


KINDS: dict[str, Callable[[Path], Any]] = {"segments": InSegments, "lmdb": InLmdb}


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def written() -> int:
    """Bytes this process has sent to the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes:")).split()[1])


def batches(numbers: list[int], nbytes: int, live: int) -> Iterator[list[int]]:
    """As many as the writer takes at once, but a small part of what lives: LMDB copies what a transaction changes."""
    size = min(BATCH_MAX, max(1, BATCH_NBYTES // nbytes), max(1, live // 16))
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def measured(kind: str, path: Path, nbytes: int, count: int) -> dict[str, float]:
    """One round of one kind."""
    data = torch.randint(0, 256, (nbytes + 1024,), dtype=torch.uint8)
    record_nbytes = pack(entry_of(0, nbytes, data), META)
    each = len(record_nbytes.head) + sum(len(part.data) for part in record_nbytes.data)
    live_nbytes = each * count
    store = KINDS[kind](path)
    found: dict[str, float] = {}
    start, cpu, before = time.perf_counter(), time.process_time(), written()
    for batch in batches(list(range(count)), nbytes, count):
        store.write([entry_of(n, nbytes, data) for n in batch], [], live_nbytes)
    found["spill_mb_s"] = live_nbytes / (time.perf_counter() - start) / 1e6
    found["spill_cpu_us"] = (time.process_time() - cpu) / count * 1e6
    found["written_per_byte"] = (written() - before) / live_nbytes
    order = random.Random(0)
    wanted = [order.randrange(count) for _ in range(1000)]
    rss = status("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    for n in wanted:
        store.get(Key(b"%032d" % n))
    found["hit_us"] = (time.perf_counter() - start) / len(wanted) * 1e6
    found["hit_cpu_us"] = (time.process_time() - cpu) / len(wanted) * 1e6
    for n in range(count):
        store.get(Key(b"%032d" % n))
    found["rss_mb"] = (status("VmRSS") - rss) / 1e6
    held = list(range(count))
    fresh, before = count, written()
    start = time.perf_counter()
    for batch in batches(list(range(count, count * (1 + CHURN))), nbytes, count):
        order.shuffle(held)
        gone, held = held[: len(batch)], held[len(batch) :] + batch
        store.write([entry_of(n, nbytes, data) for n in batch], [Key(b"%032d" % n) for n in gone], live_nbytes)
        fresh += len(batch)
    found["churn_mb_s"] = CHURN * live_nbytes / (time.perf_counter() - start) / 1e6
    found["churn_written_per_byte"] = (written() - before) / (CHURN * live_nbytes)
    store.close()
    found["disk_per_byte"] = sum(f.stat().st_blocks * 512 for f in path.rglob("*") if f.is_file()) / live_nbytes
    start = time.perf_counter()
    store = KINDS[kind](path)
    assert store.scan() == count
    found["restart_ms"] = (time.perf_counter() - start) * 1e3
    store.close()
    return found


def trace_hits(trace: Path, requests: int, disk_nbytes: int, disk_per_byte: float) -> float:
    """The hit ratio of a disk of so many bytes, where a record takes so many times its own size there."""
    from kvstore.simulation.simulator import Layout, Setup, simulate
    from kvstore.simulation.trace import read_trace

    setup = Setup(256 * MIB, int(disk_nbytes / disk_per_byte), 0.1, Layout(2, 1, 32), "bfloat16", 512)
    return simulate(read_trace(trace, requests), setup).hit_ratio


def main() -> None:
    """Measure in turns and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, default=None)
    parser.add_argument("--nbytes", default="2048,4800,16384,49152")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", type=Path, default=Path("tests/data/mooncake_conversation.jsonl.xz"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--disk-mib", type=int, default=400)
    asked = parser.parse_args()
    for nbytes in map(int, asked.nbytes.split(",")):
        rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for at in range(asked.rounds):
            for kind in list(KINDS)[:: 1 if at % 2 else -1]:
                path = Path(tempfile.mkdtemp(prefix="kvstored-bench-", dir=asked.path))
                try:
                    rounds[kind].append(measured(kind, path, nbytes, asked.mib * MIB // nbytes))
                finally:
                    shutil.rmtree(path)
        for kind, found in rounds.items():
            medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
            medians["trace_hit_ratio"] = trace_hits(
                asked.trace, asked.requests, asked.disk_mib * MIB, medians["disk_per_byte"]
            )
            print(json.dumps({"nbytes": nbytes, "kind": kind, **{n: round(v, 3) for n, v in medians.items()}}))


if __name__ == "__main__":
    main()
