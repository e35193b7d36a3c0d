"""Tools for a cold directory that no daemon has open: check, compact, export, import.

Each of them opens the directory as a daemon would (lock, check, quarantine), so none runs beside a daemon, and none as
another user than the daemon's: `opening` refuses it. What they write is readable by that user only, and they follow no
symbolic link. Raises ConfigError if the directory is in use or cannot be used.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
from kvstore.metadata.index import Index
from kvstore.metadata.meta import Meta
from kvstore.printable import printable
from kvstore.tiers.cold import Cold

Progress = Callable[[int, int], None]
FILE_MAX_NBYTES = ENTRY_MAX_NBYTES + HEADER_MAX_NBYTES + 8
_NAME_CHARACTERS = 128
_SCRATCH_CHARACTERS = 200
"""Of the name of a file that is being written: with a random end it stays below a file name's 255 bytes."""
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a check. unreadable: records that the system or a missing key did not let us read; they stay.

    quarantined: why the index was quarantined, None if it was sound.
    """

    entries: int
    corrupt: int
    unreadable: int
    quarantined: str | None


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export. lost: entries that could not be read, so there is no file of them."""

    entries: int
    lost: int


@contextmanager
def opened(path: Path, clock: Clock) -> Iterator[tuple[Cold, Index]]:
    """A directory as a tier without limits, and the Metas of its keys. Expired records are removed."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a directory")
    metas = Index()
    config = ColdConfig(capacity_nbytes=1 << 50, free_min_fraction=0.0)
    cold = Cold.open(path, config, clock, meta_of=metas.get, on_drop=lambda *_: None)
    try:
        found = cold.recovered()
        metas.rest(found.keys, found.resting)
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
        stats = cold.stats()
        return Checked(entries, damaged_rows + corrupt, stats.counters.read_errors, stats.quarantined)


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
        (fresh / "data.mdb").chmod(0o600)  # LMDB makes it as the umask says
        (fresh / "data.mdb").rename(directory.index / "data.mdb")
        shutil.rmtree(fresh)
        directory.write_state(clean=True)
    finally:
        directory.release()
    return before, _disk_nbytes(path)


def export(path: Path, target: int | Path, clock: Clock, progress: Progress = lambda *_: None) -> Exported:
    """Write each entry to a file in a directory, named after its key; a file of an earlier export is replaced.

    target: a directory, or a descriptor of one: a caller who gave up rights could not go to it by its name.
    """
    fd = open_target(target) if isinstance(target, Path) else target
    written = 0
    try:
        with opened(path, clock) as (cold, metas):
            for done, (key, meta) in enumerate(metas.items(), start=1):
                entry = cold.get(key)
                if entry is not None:
                    _write_new(fd, _file_name(key), to_safetensors(entry, meta))
                    written += 1
                progress(done, len(metas))
            return Exported(written, len(metas) - written)
    finally:
        if isinstance(target, Path):
            os.close(fd)


def open_target(path: Path) -> int:
    """A descriptor of a directory for an export, made with mode 0700 if it is not there. Raises OSError for a link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _write_new(directory: int, name: str, data: bytes) -> None:
    """Write a file and give it its name once it is whole. What has the name already, a link too, is replaced."""
    scratch = f".{name[:_SCRATCH_CHARACTERS]}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(scratch, flags, 0o600, dir_fd=directory)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        os.rename(scratch, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch, dir_fd=directory)
        raise


def files_of(given: list[Path]) -> list[Path]:
    """The files, and for a directory those that `export` wrote there, in order of name. Raises OSError."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = (file for file in path.iterdir() if file.suffix == SUFFIX and not file.name.startswith("."))
            found += sorted(inside) or [path]  # refused by name, as no file
        else:
            found.append(path)
    return found


def import_files(
    path: Path, files: list[Path], clock: Clock, *, ttl_s: float, progress: Progress = lambda *_: None
) -> list[str]:
    """Put exported files into a directory, to live for `ttl_s` seconds. Returns a line for each refused file.

    files: files, and directories that `export` wrote. A file is refused if kvstored did not write it, if it is a link,
    if the store would refuse its key or names, or if it does not decode. The others are put. A chunk that is held
    already keeps its parent: a file names none.
    """
    refused: list[str] = []
    files = files_of(files)
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


def cold_of(path: Path) -> Path | None:
    """The cold directory that a data directory or snapshot has, or is; None: it is neither."""
    return next((found for found in (path / "cold", path) if (found / "STATE").is_file()), None)


def import_snapshot(
    path: Path, source: Path, clock: Clock, *, ttl_s: float, progress: Progress = lambda *_: None
) -> Exported:
    """Put the entries of another cold directory into a directory, to live for `ttl_s` seconds. Chains stay chains.

    Each is as it was there. Encrypted ones are lost: only a daemon has their key files. Nobody may use either directory
    meanwhile.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = 0
    with opened(source, clock) as (held, known), opened(path, clock) as (cold, metas):
        for done, key in enumerate(held.keys(), start=1):
            entry, meta = held.get(key), known.get(key)
            if entry is not None and meta is not None:
                metas[key] = replace(meta, expires_at=clock.now() + ttl_s, ttl_s=ttl_s)
                cold.displace(entry)
                cold.put(entry)
                written += 1
            progress(done, len(known))
        cold.flush()
        return Exported(written, len(known) - written)


def _imported(file: Path) -> Entry:
    """The entry of an untrusted file. It is decoded once, to check that it can be. Raises KvstoreError."""
    with open_regular(file, follow=False) as opened:
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
    return (whole if len(whole) <= len(short) else short) + SUFFIX


def _disk_nbytes(path: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())
