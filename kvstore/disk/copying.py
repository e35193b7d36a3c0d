"""A copy of a cold directory, made while its daemon serves: what `snapshot` writes.

Records are copied byte for byte, the encrypted ones too; a copy is a directory as a daemon leaves it at its end. It is
built beside its place and moved there once it is whole and on the disk, so a copy that was interrupted is never taken
for one. Not by hard links: a hole in a segment, where a record left, would be a hole in the copy, and the other way
round. Each entry is as it was at one moment while the copy was made, and a key that was gone before its end is not in
it. A key that was put anew meanwhile is copied once more at the end, so that a value is never older than a deletion.
Thread rule: one thread a copy. The source's lock is taken for a moment for each key.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import lmdb
import numpy as np

from kvstore.disk import Bytes, SystemDisk
from kvstore.disk.opening import Directory, take
from kvstore.disk.rows import Row, Rows
from kvstore.disk.segments import Segments
from kvstore.errors import ConfigError
from kvstore.hit import Copied
from kvstore.keys import Key
from kvstore.metadata.slices import pause
from kvstore.ownership import user_name

PARTIAL = ".partial"
"""After the name of a copy that is being made, or was interrupted."""
BATCH_NBYTES, BATCH_MAX = 32 << 20, 1024
"""As the writer's: a longer batch gains nothing. The memory that a copy takes, beside its largest record."""
SEGMENT_NBYTES = 1 << 30
ROUNDS = 8
"""A key that is put anew again and again may be in memory only whenever it is looked at; most need one more look."""
FREE_MIN_NBYTES = 64 << 20
"""Left free beside the records: the index of the copy, and whoever else writes there."""


class Above(Protocol):
    """Where keys are held: the tiers above the one that is copied among them."""

    def keys(self) -> Sequence[Key]:
        """All of them, as of now."""
        ...

    def held(self, keys: Sequence[Key]) -> set[Key]:
        """Of these keys those that are held now."""
        ...

    def drain(self) -> object:
        """Have what is above only written to the tier that is copied."""
        ...


class Source(Protocol):
    """The tier that is copied."""

    @property
    def used_nbytes(self) -> int:
        """Bytes that its records take."""
        ...

    @property
    def unreadable_total(self) -> int:
        """Records found damaged, or not readable, since it was opened."""
        ...

    def row_of(self, key: Key) -> Row | None:
        """The row that is valid now; None for a key that left or waits to be written."""
        ...

    def raw(self, key: Key) -> tuple[Row, Bytes] | None:
        """A key's row and its record, whose checksums match; None: it left, or cannot be read."""
        ...


def check_target(target: Path) -> None:
    """Raise ConfigError unless a copy can be moved to `target`: an absolute path, not there yet or an empty directory.

    The directory that it lies in has to be there.
    """
    if not target.is_absolute():
        raise ConfigError(f"a snapshot's directory is an absolute path, got {target}")
    try:
        if os.path.lexists(target):
            if target.is_symlink() or not target.is_dir():
                raise ConfigError(f"{target} is no directory: a snapshot needs a new one or an empty one")
            if any(target.iterdir()):
                raise ConfigError(f"{target} is not empty: a snapshot needs a new directory or an empty one")
        elif not target.parent.is_dir():
            raise ConfigError(f"{target.parent} is not there: make it, writable for {user_name(os.geteuid())}")
        partial = target.with_name(target.name + PARTIAL)
        if os.path.lexists(partial):
            raise ConfigError(f"{partial} is there: one that is being made, or was interrupted; remove it")
    except OSError as error:
        raise ConfigError(f"{target}: {error.strerror}") from None


def copy(source: Source, above: Above, target: Path) -> Iterator[Copied]:
    """Copy what is held now to `target`; how far it is, after each batch. The last one is the result.

    Closed before its end, or ended by an error, it leaves nothing. Raises ConfigError for a target that cannot be
    written, or where the file system has no room.
    """
    check_target(target)
    partial = target.with_name(target.name + PARTIAL)
    made = False
    try:
        partial.mkdir(mode=0o700)
        made = True
        _check_room(source.used_nbytes, partial)
        yield from _Copy(source, above, take(partial)).run()
        partial.rename(target)  # over an empty directory
        made = False
        SystemDisk().sync_directory(target.parent)
    except OSError as error:
        raise ConfigError(f"{error.filename or target}: {error.strerror}; the snapshot is not made") from None
    except lmdb.Error as error:
        raise ConfigError(f"{target}: {error}; the snapshot is not made") from None
    finally:
        if made:
            shutil.rmtree(partial, ignore_errors=True)


def _check_room(nbytes: int, where: Path) -> None:
    free, _ = SystemDisk().room(where)
    if free < nbytes + FREE_MIN_NBYTES:
        raise ConfigError(
            f"{where.parent} has room for {free:,} bytes, the snapshot needs up to {nbytes + FREE_MIN_NBYTES:,}: "
            "name a directory on a larger file system"
        )


class _Copy:
    """The work of one copy, into a directory that is taken."""

    def __init__(self, source: Source, above: Above, directory: Directory) -> None:
        self._source = source
        self._above = above
        self._directory = directory
        self._rows = Rows(directory.index, source.used_nbytes // 4)
        self._segments = Segments(directory.segments, SystemDisk(), SEGMENT_NBYTES)
        self._keys: Sequence[Key] = above.keys()
        self._put_at = np.full(len(self._keys), np.nan)
        """By position of a key: when the value was put that was copied. nan: none was."""
        self._nbytes = 0
        self._missing = False
        self._lost_before = source.unreadable_total

    def run(self) -> Iterator[Copied]:
        """All of it; the directory is closed as whole when this ends, and let go in any case."""
        try:
            yield self._progress(0)
            for done in self._copy(range(len(self._keys))):
                yield self._progress(done)
            for _ in range(ROUNDS):
                self._above.drain()
                yield from self._once_more()
                yield from self._let_go()
                if not self._missing:
                    break
            self._rows.sync()
            self._segments.close()
            self._rows.close()
            self._directory.write_state(clean=True)
            SystemDisk().sync_directory(self._directory.path)
            yield self._progress(len(self._keys))
        finally:
            self._segments.close()
            self._rows.close()
            self._directory.release()

    def _progress(self, done: int) -> Copied:
        copied = int(np.count_nonzero(~np.isnan(self._put_at)))
        lost = self._source.unreadable_total - self._lost_before
        return Copied(done, len(self._keys), copied, self._nbytes, lost)

    def _copy(self, positions: Sequence[int]) -> Iterator[int]:
        """Copy the values of keys; how many of them were dealt with, after each batch."""
        batch: dict[int, tuple[Row, Bytes]] = {}
        nbytes = 0
        for done, at in enumerate(positions, start=1):
            found = self._source.raw(self._keys[at])
            if found is not None:
                batch[at] = found
                nbytes += found[0].place.nbytes
            if nbytes >= BATCH_NBYTES or len(batch) >= BATCH_MAX or done == len(positions):
                if batch:
                    self._write(batch)
                batch, nbytes = {}, 0
                yield done

    def _write(self, batch: dict[int, tuple[Row, Bytes]]) -> None:
        places = self._segments.append([[record.data] for _, record in batch.values()])
        put = {
            self._keys[at]: replace(row, place=place)
            for (at, (row, _)), place in zip(batch.items(), places, strict=True)
        }
        self._segments.free(self._rows.write(put, []))
        for at, (row, _) in batch.items():
            self._put_at[at] = row.meta.created_at
            self._nbytes += row.place.nbytes

    def _once_more(self) -> Iterator[Copied]:
        """Copy what was put anew since it was copied, or was above the disk then."""
        changed: list[int] = []
        for some in self._positions():
            rows = {at: self._source.row_of(self._keys[at]) for at in some}
            changed += [at for at, row in rows.items() if row and row.meta.created_at != self._put_at[at]]
            yield self._progress(len(self._keys))
        for _ in self._copy(changed):
            yield self._progress(len(self._keys))

    def _let_go(self) -> Iterator[Copied]:
        """Take out what was deleted, or left, since it was copied. Notes whether what is held is in the copy."""
        self._missing = False
        for some in self._positions():
            there = self._above.held([self._keys[at] for at in some])
            gone = [at for at in some if self._keys[at] not in there and not np.isnan(self._put_at[at])]
            if gone:
                self._segments.free(self._rows.write({}, [self._keys[at] for at in gone]))
                self._put_at[gone] = np.nan
            copied = int(np.count_nonzero(~np.isnan(self._put_at[some.start : some.stop])))
            self._missing = self._missing or len(there) > copied
            yield self._progress(len(self._keys))

    def _positions(self) -> Iterator[range]:
        """The positions of all keys, some at a time, with a pause between."""
        for start in range(0, len(self._keys), BATCH_MAX):
            yield range(start, min(start + BATCH_MAX, len(self._keys)))
            pause()
