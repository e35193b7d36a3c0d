"""The row of each record on disk, in LMDB: one small row per key, so that a start reads no values.

A row has a checksum bound to its key, because LMDB has none: a flipped bit must not move a deadline or name another
place. LMDB's flags: data pages are synced at each commit, the meta page is not (`metasync=False`), so a power cut
may lose the last transaction and no more; `sync` makes it durable. `sync=False` is not used: it survived no power cut.
Thread rule: one thread writes; reads, `grow` and opening anew take the lock (a read is 5 us).
After a meta page could not be written LMDB refuses every call, a read too, until the file is opened again. The thread
that writes does that at once; a reader that comes between waits for it.
"""

import contextlib
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import isfinite, isnan
from pathlib import Path
from typing import Any

import lmdb
import xxhash

from kvstore.arrays import ENTRY_MAX_NBYTES
from kvstore.disk.segments import SEGMENT_MAX, Place
from kvstore.errors import InvalidEntry
from kvstore.keys import KEY_MAX_NBYTES, Key, check_namespace
from kvstore.metadata.meta import Meta
from kvstore.metadata.owner import labelled

MAP_MIN_NBYTES, MAP_START_NBYTES = 64 << 20, 64 << 30
"""A map is address space only, but no process has petabytes of it; a map that is full grows."""
READERS_MAX = 126
REOPEN_WAIT_S = 1.0
"""How long a reader waits for the thread that writes to open the file again: it takes a millisecond."""
_DB = b"rows"
FIELDS = struct.Struct("<QddddQIIQQIB")
_SEGMENT, _SEGMENT_AT = struct.Struct("<I"), struct.calcsize("<QddddQI")
PINNED_UNTIL = struct.Struct("<d")
SUM = struct.Struct("<I")
SLIDING, PINNED, EXACT, LOSSY, NAMED = 1, 2, 4, 8, 16
"""Flags. Do not renumber. NAMED: the name of a namespace comes before the parent's key."""
SCAN_CHUNK = 50_000
PLACE_MAX_NBYTES, OFFSET_MAX = 2 * ENTRY_MAX_NBYTES + (1 << 20), 1 << 32
SEQ_MAX = 1 << 62
"""A row beyond these, or with a time that is not a number, was never written here: records begin in a file's first GiB.
To believe it would be to count its blocks (memory for each one before it), to read them, to refuse its key for its size
at each get, or to number what comes next beyond a row's fields."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record's place and its Meta. seq: rises with use. head_nbytes: bytes of the record before its data section."""

    place: Place
    head_nbytes: int
    seq: int
    meta: Meta


def pack_row(key: Key, row: Row) -> bytes:
    """A row's bytes: fixed fields, the encoding's name and a zero, when a pin lapses, the namespace's name if it has
    one (a byte of length before it), the parent's key, a checksum.

    The checksum is the low 32 bits of xxh3_64 over key and all of it.
    """
    m = row.meta
    name = m.owner.namespace.encode()
    flags = SLIDING * m.sliding | PINNED * m.pinned | EXACT * m.exact | LOSSY * m.lossy | NAMED * bool(name)
    fields = FIELDS.pack(
        row.seq, m.created_at, m.expires_at, m.ttl_s, m.last_hit_at, m.value_nbytes, min(m.hits, 0xFFFFFFFF),
        row.place.segment, row.place.offset, row.place.nbytes, row.head_nbytes, flags,
    )  # fmt: skip
    body = fields + m.encoding.encode() + b"\0" + PINNED_UNTIL.pack(m.pinned_until)
    body += (bytes([len(name)]) + name if name else b"") + (m.parent or b"")
    return body + SUM.pack(_checksum(key, body))


def parse_row(key: Key, data: bytes) -> Row | None:
    """The row; None when its checksum does not match, or it names what no record of ours can be."""
    body = data[: -SUM.size]
    if len(body) < FIELDS.size or SUM.unpack(data[-SUM.size :])[0] != _checksum(key, body):
        return None
    seq, created, expires, ttl_s, hit_at, value_nbytes, hits, segment, offset, nbytes, head_nbytes, flags = (
        FIELDS.unpack_from(body)
    )
    encoding, _, rest = body[FIELDS.size :].partition(b"\0")
    if len(rest) < PINNED_UNTIL.size or not head_nbytes <= nbytes <= PLACE_MAX_NBYTES or offset > OFFSET_MAX:
        return None
    if seq > SEQ_MAX or segment > SEGMENT_MAX or value_nbytes > ENTRY_MAX_NBYTES or len(key) > KEY_MAX_NBYTES:
        return None
    pinned_until, parent, namespace = _more(rest, flags)
    times = isfinite(created) and isfinite(hit_at) and not any(map(isnan, (expires, ttl_s, pinned_until)))
    if namespace is None or not times:
        return None
    meta = Meta(
        created, expires, ttl_s, value_nbytes, bool(flags & SLIDING), bool(flags & PINNED), bool(flags & EXACT),
        bool(flags & LOSSY), encoding_named(encoding), hits, hit_at, pinned_until, parent, owner=labelled(namespace),
    )  # fmt: skip
    return Row(Place(segment, offset, nbytes), head_nbytes, seq, meta)


def _more(rest: bytes, flags: int) -> tuple[float, Key | None, str | None]:
    """When a pin lapses, the parent, and the namespace's name: None for what cannot be one."""
    name, at = _namespace(rest, PINNED_UNTIL.size) if flags & NAMED else ("", PINNED_UNTIL.size)
    return PINNED_UNTIL.unpack_from(rest)[0], Key(rest[at:]) or None, name


def _checksum(key: bytes, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body + key) & 0xFFFFFFFF


@lru_cache(maxsize=4096)
def encoding_named(data: bytes) -> str:
    """The name of an encoding; bytes that are no text are replaced."""
    return data.decode("utf-8", "replace")


def _namespace(body: bytes, at: int) -> tuple[str | None, int]:
    """A namespace's name at a place, its length in the byte before it, and where it ends. None: no name of ours."""
    end = at + 1 + body[at] if at < len(body) else at
    return (namespace_named(body[at + 1 : end]) if at < end <= len(body) else None), end


@lru_cache(maxsize=4096)
def namespace_named(data: bytes) -> str | None:
    """The name of a namespace; None for what no namespace is named."""
    try:
        return check_namespace(data.decode()) or None
    except (UnicodeDecodeError, InvalidEntry):
        return None


Opened = tuple[lmdb.Environment, Any]
"""LMDB's environment and its table of rows."""


class Rows:
    """The table of rows, open."""

    def __init__(self, path: Path, map_nbytes: int) -> None:
        path.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.Condition(threading.Lock())
        self._path = path
        self._map_nbytes = min(max(MAP_MIN_NBYTES, map_nbytes), MAP_START_NBYTES)
        self._opened = self._open()
        self.check_readers()

    def _open(self) -> Opened | None:
        env = lmdb.open(
            str(self._path), map_size=self._map_nbytes, max_dbs=4, max_readers=READERS_MAX, mode=0o600,
            sync=True, metasync=False, writemap=False, readahead=True, lib_version=0,
        )  # fmt: skip
        try:
            return env, env.open_db(_DB)
        except BaseException:
            env.close()
            raise

    def reopen(self) -> None:
        """Open the file again. On the thread that writes, outside transactions.

        Raises lmdb.Error: the file is not open, and every call does so until this has succeeded.
        """
        with self._lock:
            if self._opened is not None:
                self._map_nbytes = self.map_nbytes
                self._opened[0].close()
                self._opened = None
            try:
                self._opened = self._open()
            finally:
                self._lock.notify_all()

    @property
    def readable(self) -> bool:
        """Whether the file is open. Not while the disk did not let it be opened again."""
        return self._opened is not None

    def get(self, key: Key) -> Row | None:
        """A key's row; None if there is none or it is damaged. Raises lmdb.Error where the file cannot be read now."""
        with self._lock:
            opened = self._opened
            try:
                data = _read(opened, key)
            except lmdb.PanicError:
                self._lock.wait_for(lambda: self._opened is not opened, REOPEN_WAIT_S)
                data = _read(self._opened, key)
        return None if data is None else parse_row(key, data)

    def scan(self) -> Iterator[tuple[Sequence[Key], Sequence[bytes]]]:
        """All keys and rows, some ten thousand at a time, in one read transaction. Before the writer starts."""
        env, db = _there(self._opened)
        with env.begin(db=db) as txn, txn.cursor() as cursor:
            rows = iter(cursor)
            while chunk := list(islice(rows, SCAN_CHUNK)):
                keys, datas = zip(*chunk, strict=True)
                yield keys, datas

    def of_segment(self, number: int) -> list[Key]:
        """Keys whose rows name a segment. It reads every row: a second for a million.

        On the writer's thread only, because an open read transaction keeps pages of later ones from being used again.
        """
        env, db = _there(self._opened)
        with env.begin(db=db) as txn, txn.cursor() as cursor:
            return [
                Key(key)
                for key, data in cursor
                if len(data) > FIELDS.size and _SEGMENT.unpack_from(data, _SEGMENT_AT)[0] == number
            ]

    def write(self, put: Mapping[Key, Row], remove: Iterable[Key]) -> list[Place]:
        """Change rows in one transaction. Returns the places that no row names after it. Raises lmdb.Error.

        If the map is full it is grown and the transaction repeated: the map is address space, not the tier's capacity.
        PanicError: LMDB refuses the file from here on, until whoever writes opens it again (`reopen`).
        """
        while True:
            try:
                return self._write(put, list(remove))
            except lmdb.MapFullError:
                self.grow(2 * self.map_nbytes)

    def _write(self, put: Mapping[Key, Row], remove: list[Key]) -> list[Place]:
        freed: list[Place] = []
        env, db = _there(self._opened)
        with env.begin(write=True, db=db) as txn:
            for key in remove:
                old = txn.pop(key)
                if old is not None and (row := parse_row(key, bytes(old))) is not None:
                    freed.append(row.place)
            for key, row in put.items():
                old = txn.replace(key, pack_row(key, row))
                if old is not None and (before := parse_row(key, bytes(old))) is not None and before.place != row.place:
                    freed.append(before.place)
        return freed

    def sync(self) -> None:
        """Return when a power cut can no longer undo the last transaction. Raises lmdb.Error."""
        _there(self._opened)[0].sync(True)

    def grow(self, map_nbytes: int) -> None:
        """Enlarge the map while serving. On the writer's thread only, between transactions."""
        with self._lock:
            _there(self._opened)[0].set_mapsize(map_nbytes)

    @property
    def map_nbytes(self) -> int:
        """Address space of the map."""
        return int(_there(self._opened)[0].info()["map_size"])

    def check_readers(self) -> int:
        """Free the slots of dead readers. Returns their number. A dead reader's slot keeps pages from reuse."""
        with self._lock:
            return 0 if self._opened is None else int(self._opened[0].reader_check())

    def disk_nbytes(self) -> int:
        """Bytes of the index file."""
        return (self._path / "data.mdb").stat().st_blocks * 512

    def close(self) -> None:
        """Sync and close."""
        with self._lock:
            if self._opened is None:
                return
            with contextlib.suppress(lmdb.Error):
                self._opened[0].sync(True)
            self._opened[0].close()


def _there(opened: Opened | None) -> Opened:
    if opened is None:
        raise lmdb.Error("the index could not be opened again; it is tried again")
    return opened


def _read(opened: Opened | None, key: Key) -> bytes | None:
    env, db = _there(opened)
    with env.begin(db=db) as txn:
        data = txn.get(key)
        return None if data is None else bytes(data)
