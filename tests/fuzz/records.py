"""Mutated records through everything that reads one: the cold tier's reads, an import, and the parsers by themselves.

Checksums, key and lengths are made right again after most mutations: else the first check would refuse them all.
"""

import os
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kvstore.codecs import check_entry, codec_named, decode_entry
from kvstore.disk.reading import read_entry, read_specs
from kvstore.disk.rows import Row
from kvstore.disk.segments import Place
from kvstore.entries import record as records
from kvstore.entries.compression import Compression
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.entries.record import to_safetensors
from kvstore.errors import CodecError, KvstoreError, RecordCorrupt
from kvstore.metadata.meta import Meta
from kvstore.tiers.offline import _imported

from . import targets
from .mutation import mutated
from .targets import KEY, LIMIT_NBYTES, TARGETS

PARSERS = ("record", "rows", "attrs", "safetensors")


@dataclass
class Report:
    """outcomes: by way. samples: (records, resident bytes, descriptors). surprises: inputs and what they raised."""

    outcomes: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)
    samples: list[tuple[int, int, int]] = field(default_factory=list)


class MemorySegments:
    """A segment file that is bytes: what a read finds."""

    def __init__(self, data: bytes) -> None:
        self._data = np.frombuffer(data, np.uint8)

    def read(self, place: Place, buffers: list[np.ndarray], skip: int = 0) -> int:
        at = place.offset + skip
        done = 0
        for buffer in buffers:
            part = self._data[at + done : at + done + buffer.size]
            buffer[: part.size] = part
            done += part.size
        return done

    def lacks(self, number: int) -> bool:
        return False


def seeds() -> list[bytes]:
    """Records of each encoding and compression."""
    x = torch.linspace(-1, 1, 2 * 66 * 2 * 32).reshape(2, 66, 2, 32).to(torch.float16)
    entries = [
        Entry(KEY, {"x": codec_named(name).encode("k", x)}, lossy=True) for name in ("nf4-kv2", "nf4-kv", "nf4", "int8")
    ]  # fmt: skip
    raw = EncodedTensor(targets.TensorSpec("float32", (4, 12)), "raw", {"": torch.arange(48.0).reshape(4, 12)})
    entries.append(Entry(KEY, {"k": raw}, lossy=False))
    found = []
    for entry in entries:
        for how in (Compression.NONE, Compression.ZSTD, Compression.ZSTD_SHUFFLE_2):
            packed = records.pack(entry, Meta(1.0, 2.0, 1.0, entry.value_nbytes), compression=how)
            found.append(packed.head + b"".join(bytes(memoryview(part).cast("B")) for part in packed.data))
    return found


def files() -> list[bytes]:
    """What `export` writes."""
    x = torch.linspace(-1, 1, 256).reshape(4, 64)
    entry = Entry(KEY, {"x": codec_named("nf4").encode("x", x)}, lossy=True)
    return [to_safetensors(entry, Meta(1.0, 2.0, 1.0, entry.value_nbytes))]


def cold_read(data: bytes) -> str:
    """As `Cold.get` and what follows: read, check, decode. The row is what a writer would have made of the record."""
    fixed = records._FIXED
    head_nbytes, value_nbytes = len(data), 0
    if len(data) >= fixed.size:
        fields = fixed.unpack_from(data)
        head_nbytes, value_nbytes = min(len(data), fixed.size + fields[9]), fields[8]
    row = Row(Place(1, 0, len(data)), head_nbytes, 1, Meta(1.0, 2.0, 1.0, value_nbytes))
    segments = MemorySegments(data)
    try:
        read_specs(segments, KEY, row)
        entry = read_entry(segments, KEY, row)
    except RecordCorrupt:
        return "refused"
    if entry.value_nbytes > LIMIT_NBYTES:
        return "too large"
    try:
        check_entry(entry)
        decode_entry(entry)
    except CodecError:
        return "not decoded"
    return "decoded"


def changed(data: bytes, rng: random.Random) -> bytes:
    """Mutated anywhere, or only in its data section, so that a codec gets to see it."""
    if rng.random() < 0.5:
        whole = mutated(data, rng)
    else:
        at = records._FIXED.size + records._FIXED.unpack_from(data)[9]
        whole = bytearray(data)
        for _ in range(rng.choice((1, 2, 16))):
            whole[rng.randrange(at, len(whole))] = rng.randrange(256)
    return targets._repaired(bytes(whole)) if rng.random() < 0.9 else bytes(whole)


def imported(path: Path, data: bytes) -> str:
    """As `kvstored import` of one file."""
    path.write_bytes(data)
    try:
        _imported(path)
    except KvstoreError:
        return "refused"
    return "imported"


def run(count: int, seed: int, *, tell: Callable[[str], None] = lambda _: None) -> Report:
    """So many mutated records: half through cold reads, a tenth through imports, the rest through the parsers."""
    rng, report, began = random.Random(seed), Report(), time.monotonic()
    known, exported = seeds(), files()
    parsed = {name: targets.seeds()[name] for name in PARSERS}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as top:  # noqa: S108
        for i in range(1, count + 1):
            way = rng.random()
            try:
                if way < 0.5:
                    data = changed(rng.choice(known), rng)
                    outcome = f"cold {cold_read(data)}"
                elif way < 0.6:
                    data = mutated(rng.choice(exported), rng)
                    outcome = f"import {imported(Path(top) / 'x.safetensors', data)}"
                else:
                    name = rng.choice(PARSERS)
                    data = mutated(rng.choice(parsed[name]), rng)
                    TARGETS[name](data)
                    outcome = f"parser {name}"
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                report.surprises.append(f"{type(error).__name__} {error!s:.200}: {data.hex()}")
                outcome = "surprise"
            report.outcomes[outcome] += 1
            if i % max(count // 40, 1) == 0:
                descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted
                report.samples.append((i, _rss_nbytes(), descriptors))
                tell(f"{i} records, {time.monotonic() - began:.0f} s, RSS {_rss_nbytes() >> 20} MiB, "
                     f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB, {descriptors} descriptors, "
                     f"surprises {len(report.surprises)}")  # fmt: skip
    return report


def _rss_nbytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
