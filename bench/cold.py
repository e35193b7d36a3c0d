"""Cold tier: spill and read against the same disk raw, space after churn, restart and memory at many entries.

Run: .venv/bin/python bench/cold.py [--json] [--path DIR] [--entries 1000,100000,1000000] [--quick] [--part PART]
Ratios are against the raw file of the same run: the same bytes written in the same groups with fdatasync, and read into
the same kind of memory. The page cache is dropped for the cold figures, which needs root; else they are left out.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import xxhash

from kvstore.clock import SystemClock
from kvstore.config import ColdConfig, HotConfig, StoreConfig, WarmConfig
from kvstore.disk.occupancy import place_nbytes
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Place
from kvstore.disk.writer import ROWS_PER_COMMIT
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.record import pack
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.store import Store
from kvstore.tiers.cold import Cold

MIB = 1 << 20
GROUP_NBYTES = 32 * MIB
CAPACITY_NBYTES = 1 << 40
PARTS = ["values", "churn", "restart"]
CHAIN = 16
"""Chunks of a prefix: the deepest used first, so with the lowest number."""
META = Meta(1e9, 4e9, 3e9, 0)
"""Does not expire during a bench."""


def entry_of(n: int, nbytes: int, data: torch.Tensor) -> Entry:
    """NF4-like codes: nothing to compress, as the bulk of what the tier holds."""
    part = data[:nbytes]
    return Entry(Key(b"%032d" % n), {"k": EncodedTensor(TensorSpec("float32", (2 * nbytes,)), "nf4", {"": part})})


def open_cold(path: Path, capacity_nbytes: int) -> Cold:
    """A tier that drops silently."""
    config = ColdConfig(capacity_nbytes=capacity_nbytes, write_buffer_nbytes=64 * MIB)
    return Cold.open(path, config, SystemClock(), meta_of=lambda _: META, on_drop=lambda *_: None)


@contextmanager
def directory(parent: Path) -> Iterator[Path]:
    """A fresh directory, nothing of others still on its way to the disk."""
    path = Path(tempfile.mkdtemp(prefix="kvstored-bench-", dir=parent))
    try:
        os.sync()
        yield path
    finally:
        shutil.rmtree(path)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_caches() -> bool:
    """Empty the page cache. False: not allowed."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


class Report:
    """One JSON object a line, or a table."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def add(self, name: str, value: float, unit: str, ratios: dict[str, float] | None = None, **params: object) -> None:
        """One figure."""
        ratios = {k: round(v, 3) for k, v in (ratios or {}).items()}
        if self._as_json:
            row = {"name": name, "params": params, "value": round(value, 4), "unit": unit, "ratios": ratios}
            print(json.dumps(row), flush=True)
            return
        told = " ".join(f"{k}={v}" for k, v in params.items())
        print(f"{name:16} {told:44} {value:10.3f} {unit:8} {ratios or ''}", flush=True)


def raw_write(path: Path, datas: list[memoryview]) -> None:
    """The same bytes in the same groups."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    waiting = 0
    for data in datas:
        os.write(fd, data)
        waiting += len(data)
        if waiting >= GROUP_NBYTES:
            os.fdatasync(fd)
            waiting = 0
    os.fdatasync(fd)
    os.close(fd)


def raw_read(path: Path, nbytes: int, count: int) -> None:
    """Each value into memory of its own, as the tier must."""
    fd = os.open(path, os.O_RDONLY)
    for n in range(count):
        os.preadv(fd, [torch.empty(nbytes, dtype=torch.uint8).numpy().data], n * nbytes)
    os.close(fd)


def spill_and_read(report: Report, parent: Path, nbytes: int, total_nbytes: int, rounds: int) -> None:
    """GB/s of both, best of some rounds, raw and tier taking turns."""
    count = total_nbytes // nbytes
    data = torch.from_numpy(np.random.default_rng(1).integers(0, 256, nbytes + 4096 * 16, dtype=np.uint8))
    datas = [data[n % 16 * 4096 :][:nbytes].numpy().data for n in range(count)]
    entries = [entry_of(n, nbytes, data[n % 16 * 4096 :]) for n in range(count)]
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for _ in range(rounds):
        with directory(parent) as path:
            note("raw_spill", timed(lambda: raw_write(path / "raw", datas)))
            note("raw_warm", timed(lambda: raw_read(path / "raw", nbytes, count)))
            cold = open_cold(path / "cold", 4 * total_nbytes)
            os.sync()

            def spill(cold: Cold = cold) -> None:
                for entry in entries:
                    cold.displace(entry)
                    cold.put(entry)
                cold.flush(600)

            def read(cold: Cold = cold) -> None:
                for entry in entries:
                    assert cold.get(entry.key) is not None

            note("spill", timed(spill))
            note("warm", timed(read))
            if drop_caches():
                note("raw_cold", timed(lambda: raw_read(path / "raw", nbytes, count)))
                drop_caches()
                note("cold", timed(read))
            cold.close()
    for name, raw, figure in (
        ("cold.spill", "raw_spill", "spill"),
        ("cold.read", "raw_warm", "warm"),
        ("cold.read", "raw_cold", "cold"),
    ):
        if figure in times:
            params = {} if name == "cold.spill" else {"page_cache": figure}
            best, base = min(times[figure]), min(times[raw])
            median = statistics.median(b / a for a, b in zip(times[figure], times[raw], strict=True))
            report.add(
                name, count * nbytes / best / 1e9, "GB/s", {"raw_file": base / best, "raw_file_median": median},
                nbytes=nbytes, **params,
            )  # fmt: skip


def churn(report: Report, parent: Path, capacity_nbytes: int, times: int) -> None:
    """Live bytes and file size after writing `times` the capacity in sizes of 0.25 to 16 MiB, victims mostly LRU."""
    rng = random.Random(1)
    data = torch.zeros(16 * MIB + 1, dtype=torch.uint8)
    with directory(parent) as path:
        cold = open_cold(path / "cold", capacity_nbytes)
        written, n, largest = 0, 0, 0
        while written < times * capacity_nbytes:
            nbytes = int(2 ** rng.uniform(18, 24))
            entry = entry_of(n, nbytes, data)
            if rng.random() < 0.3 and len(cold):
                cold.remove(rng.choice(list(cold.keys())))
            cold.displace(entry)
            cold.put(entry)
            written += nbytes
            n += 1
            if n % 20 == 0:
                largest = max(largest, cold.disk_nbytes())
        cold.flush(600)
        live = cold.used_nbytes
        on_disk = cold.disk_nbytes()
        cold.close()
    report.add("file_over_live", on_disk / live, "x", {}, churn=times, what="at the end", live_nbytes=live)
    report.add("file_over_budget", largest / capacity_nbytes, "x", {}, churn=times, what="largest seen")


CHILD = """
import gc, os, random, sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from cold import store_at
def rss(what):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what)) * 1024
import torch, kvstore.tiers.cold
gc.collect()
before, before_file = rss("RssAnon"), rss("RssFile")
start, cpu = time.perf_counter(), time.process_time()
store = store_at(Path(sys.argv[1]))
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
gc.collect()
after, after_file = rss("RssAnon"), rss("RssFile")
cold = store._r.cold
keys = list(cold.keys())
picks = random.Random(2).sample(keys, min(2000, len(keys)))
found = len(keys)
del keys
times = []
for key in picks:
    t = time.perf_counter()
    assert cold.get(key) is not None
    times.append(time.perf_counter() - t)
times.sort()
print(seconds, cpu, after - before, after_file - before_file, times[len(times) // 2], found)
sys.stdout.flush()
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
store.close()
"""


def store_at(path: Path) -> Store:
    """A whole store on a filled directory."""
    cold = ColdConfig(path=str(path), capacity_nbytes=CAPACITY_NBYTES)
    return Store.open(StoreConfig(hot=HotConfig(MIB), warm=WarmConfig(MIB), cold=cold), background=False)


def records_alike(count: int) -> Iterator[tuple[Key, bytes, int]]:
    """Key, record and head size: packed once, then only what depends on the key exchanged (docs/record-format.md)."""
    first = Key(bytes(32))
    small = EncodedTensor(TensorSpec("float32", (4000,)), "nf4", {"": torch.zeros(2000, dtype=torch.uint8)})
    record = pack(Entry(first, {"k": small}), META)
    before, after = record.head[32:].split(first.hex().encode())
    data = record.to_bytes()[len(record.head) :]
    for n in range(count):
        key = Key(hashlib.sha256(str(n).encode()).digest())
        checked = xxhash.xxh3_128_digest(key) + before + key.hex().encode() + after
        digest = xxhash.xxh3_64_intdigest(checked).to_bytes(8, "little")
        yield key, record.head[:8] + digest + checked + data, len(record.head)


def fill(path: Path, count: int) -> None:
    """Small entries, their files made by hand: through the tier it would take longer and tell nothing."""
    open_cold(path, CAPACITY_NBYTES).close()
    rows = Rows(path / "index", 1 << 34)
    batch: dict[Key, Row] = {}
    parent = None
    with (path / "segments" / "00000001.seg").open("wb") as file:
        for n, (key, record, head_nbytes) in enumerate(records_alike(count), start=1):
            parent = parent if n % CHAIN else None
            meta = replace(META, parent=parent, created_at=META.created_at + n // CHAIN, encoding="nf4-kv")
            batch[key] = Row(Place(1, file.tell(), len(record)), head_nbytes, count - n, meta)
            parent = key
            file.write(record.ljust(place_nbytes(len(record)), b"\0"))
            if len(batch) == ROWS_PER_COMMIT:
                rows.write(batch, [])
                batch = {}
    rows.write(batch, [])
    rows.close()


def restart(report: Report, parent: Path, count: int) -> None:
    """Seconds to open a store after a clean end and after kill -9, bytes of RAM an entry, p50 of a get."""
    with directory(parent) as path:
        fill(path / "cold", count)
        code = CHILD.format(path=sys.path)
        for end in ("clean", "kill"):
            # The first child opens what a clean end left and ends as it is told; the second finds that.
            subprocess.run(
                [sys.executable, "-c", code, str(path / "cold"), end], capture_output=True, check=end == "clean"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, str(path / "cold"), "clean"], capture_output=True, text=True, check=True
            )
            seconds, cpu_s, anon, mapped, p50, found = map(float, done.stdout.split())
            assert found == count
            report.add("restart_s", seconds, "s", {}, entries=count, after=end, cpu_s=round(cpu_s, 2))
            if end == "clean":
                report.add(
                    "rss_per_entry", anon / count, "bytes", {}, entries=count, mapped_index=round(mapped / count)
                )
                report.add("get_p50", p50 * 1e6, "us", {}, entries=count)


def main() -> None:
    """Everything, in the order of the issue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--entries", default="1000,100000,1000000")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this, or these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(as_json=options.json)
    parts = options.part or PARTS
    sizes = [4 * MIB] if options.quick else [256 << 10, MIB, 4 * MIB, 16 * MIB]
    for nbytes in sizes if "values" in parts else []:
        spill_and_read(report, options.path, nbytes, 768 * MIB, rounds=3 if options.quick else 5)
    if "churn" in parts:
        churn(report, options.path, 400 * MIB, 10)
    for count in map(int, options.entries.split(",")) if "restart" in parts else []:
        restart(report, options.path, count)


if __name__ == "__main__":
    main()
