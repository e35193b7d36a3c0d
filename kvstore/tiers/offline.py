"""Tools for a cold directory that no daemon has open: check, compact, export, import.

Each of them opens the directory as a daemon would (lock, check, quarantine), so none runs beside a daemon.
Raises ConfigError if the directory is in use or cannot be used.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb

from kvstore.arrays import ENTRY_MAX_NBYTES, check_specs
from kvstore.clock import Clock
from kvstore.codecs import check_entry, decode_entry
from kvstore.config import ColdConfig
from kvstore.disk.opening import take
from kvstore.disk.scrub import verify
from kvstore.entries.entry import Entry
from kvstore.entries.record import from_safetensors, to_safetensors
from kvstore.entries.safetensors_header import HEADER_MAX_NBYTES, open_regular
from kvstore.errors import ConfigError, EntryTooLarge, KvstoreError
from kvstore.keys import Key, check_key
from kvstore.metadata.meta import Meta
from kvstore.printable import printable
from kvstore.tiers.cold import Cold

Progress = Callable[[int, int], None]
FILE_MAX_NBYTES = ENTRY_MAX_NBYTES + HEADER_MAX_NBYTES + 8
_NAME_CHARACTERS = 128


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a check. quarantined: why the index was quarantined, None if it was sound."""

    entries: int
    corrupt: int
    quarantined: str | None


@contextmanager
def opened(path: Path, clock: Clock) -> Iterator[tuple[Cold, dict[Key, Meta]]]:
    """A directory as a tier without limits, and the Metas of its keys. Expired records are removed."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory")
    metas: dict[Key, Meta] = {}
    config = ColdConfig(capacity_nbytes=1 << 50, free_min_fraction=0.0)
    cold = Cold.open(path, config, clock, meta_of=metas.get, on_drop=lambda *_: None)
    try:
        found = cold.recovered()
        metas.update(zip(found.keys, found.metas, strict=True))
        yield cold, metas
    finally:
        cold.close()


def fsck(path: Path, clock: Clock, progress: Progress = lambda *_: None) -> Checked:
    """Check the index and every record; damaged ones are removed."""
    with opened(path, clock) as (cold, _):
        damaged_rows = cold.stats().counters.corrupt_total
        entries = len(cold)
        corrupt = 0
        for found in verify(cold):
            corrupt = found.corrupt
            progress(found.checked, found.total)
        return Checked(entries, damaged_rows + corrupt, cold.stats().quarantined)


def compact(path: Path, clock: Clock) -> tuple[int, int]:
    """Give unneeded space back to the file system. Returns the directory's bytes before and after.

    Records give their blocks back when they leave, so only two things remain: the index, which never shrinks by itself,
    and bytes left by a crash, which opening finds.
    """
    before = _disk_nbytes(path)
    with opened(path, clock):
        pass
    directory = take(path)
    try:
        fresh = path / "index.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        with lmdb.open(str(directory.index), max_dbs=4, readonly=True, lock=False) as env:
            env.copy(str(fresh), compact=True)
        (fresh / "data.mdb").rename(directory.index / "data.mdb")
        shutil.rmtree(fresh)
        directory.write_state(clean=True)
    finally:
        directory.release()
    return before, _disk_nbytes(path)


def export(path: Path, target: Path, clock: Clock, progress: Progress = lambda *_: None) -> int:
    """Write each entry to a file in `target`, named after its key. Returns the number of files."""
    target.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened(path, clock) as (cold, metas):
        for done, (key, meta) in enumerate(metas.items(), start=1):
            entry = cold.get(key)
            if entry is not None:
                (target / _file_name(key)).write_bytes(to_safetensors(entry, meta))
                written += 1
            progress(done, len(metas))
    return written


def import_files(
    path: Path, files: list[Path], clock: Clock, *, ttl_s: float, progress: Progress = lambda *_: None
) -> list[str]:
    """Put exported files into a directory, to live for `ttl_s` seconds. Returns a line for each refused file.

    A file is refused if kvstored did not write it, if the store would refuse its key or names, or if it does not
    decode. The others are put. A chunk that is held already keeps its parent: a file names none.
    """
    refused: list[str] = []
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with opened(path, clock) as (cold, metas):
        for done, file in enumerate(files, start=1):
            try:
                entry = _imported(file)
            except (KvstoreError, OSError) as error:
                refused.append(f"{printable(file)}: {printable(_reason(error))}")
            else:
                now, before = clock.now(), metas.get(entry.key)
                metas[entry.key] = Meta(
                    now, now + ttl_s, ttl_s, entry.value_nbytes, exact=not entry.lossy, lossy=entry.lossy,
                    encoding=entry.encoding, parent=None if before is None else before.parent,
                )  # fmt: skip
                cold.displace(entry)
                cold.put(entry)
            progress(done, len(files))
        cold.flush()
    return refused


def _imported(file: Path) -> Entry:
    """The entry of an untrusted file. It is decoded once, to check that it can be. Raises KvstoreError."""
    with open_regular(file) as opened:
        nbytes = os.fstat(opened.fileno()).st_size
        if nbytes > FILE_MAX_NBYTES:
            raise EntryTooLarge(f"a file has at most {FILE_MAX_NBYTES} bytes, got {nbytes}")
        entry = from_safetensors(opened.read(nbytes))
    check_key(entry.key)
    check_specs(entry.specs)
    check_entry(entry)
    decode_entry(entry)
    return entry


def _reason(error: KvstoreError | OSError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _file_name(key: Key) -> str:
    # A file's name has at most 255 bytes: a longer key is cut, and a digest keeps the names distinct.
    whole = key.hex()
    short = f"{whole[:_NAME_CHARACTERS]}-{hashlib.sha256(key).hexdigest()}"
    return f"{whole if len(whole) <= len(short) else short}.safetensors"


def _disk_nbytes(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
