"""What was promised of each key, in a file that all processes of a run map: it outlives kill -9 of any of them.

Each key has one writer, so its versions only rise, and any process may read it. A row says which versions may be found:

    floor <= version <= attempted

A put that was acknowledged sets floor to its version: kill -9 may lose the value but may not bring an older one back.
A delete that was acknowledged sets floor over all versions: nothing may come back. A call that ended in an error is in
doubt: it may be done later, by a daemon that was stopped, so the key is not written again in that life of the daemon.
So the rule is exact, and has no exception for calls in doubt.
Fields are eight bytes, each written by one process; numpy writes one in one step.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PLAIN, DYING, PREFIXES = 300, range(300, 340), range(340, 384)
"""Keys of each worker: so many or fewer for plain values, others for a short time to live, and for prompts."""
KEYS = PREFIXES.stop

HEADER = np.dtype([
    ("life", "<i8"), ("stop", "<i8"), ("revoke_from", "<f8"), ("revoke_until", "<f8"),
])  # fmt: skip
"""life: how many daemons were started. revoke_*: when callers may be refused, by the monotonic clock."""

WORKER = np.dtype([
    ("began", "<f8"), ("bound_s", "<f8"), ("stopped_then_s", "<f8"), ("stopped_s", "<f8"), ("verb", "S16"),
    ("key", "<i8"), ("calls", "<i8"), ("hits", "<i8"), ("stored", "<i8"), ("deleted", "<i8"), ("in_doubt", "<i8"),
    ("leave", "<f8"),
])  # fmt: skip
"""began: of the call under way, by the monotonic clock; 0: none. stopped_s: how long this worker was stopped so far.
leave: when it was told to end; 0: it was not."""

ROW = np.dtype([
    ("attempted", "<i8"), ("floor", "<i8"), ("deleted", "<i8"), ("open", "<i8"), ("doubt", "<i8"),
    ("dead_at", "<f8"), ("dead_life", "<i8"),
])  # fmt: skip
"""deleted: no version up to this one may be found, for it was deleted. open: a change is under way. doubt: the life of
the daemon in which a change ended in an error. dead_at: when the present version has expired, in `dead_life`."""


@dataclass(frozen=True)
class Promise:
    """A row at one moment, taken before a read begins."""

    floor: int
    deleted: int
    dead_at: float
    dead_life: int
    life: int


class Ledger:
    """The mapped file. workers: how many."""

    def __init__(self, path: Path, workers: int, *, make: bool = False) -> None:
        sizes = [HEADER.itemsize, workers * WORKER.itemsize, workers * KEYS * ROW.itemsize]
        if make:
            path.write_bytes(bytes(sum(sizes)))
            path.chmod(0o666)  # workers are other users
        self._map = np.memmap(path, np.uint8, "r+")
        at = np.cumsum([0, *sizes])
        self.header: Any = self._map[at[0] : at[1]].view(HEADER)
        self.workers: Any = self._map[at[1] : at[2]].view(WORKER)
        self.rows: Any = self._map[at[2] : at[3]].view(ROW).reshape(workers, KEYS)

    @property
    def life(self) -> int:
        """The daemon's, from 1."""
        return int(self.header["life"][0])

    def promise(self, worker: int, n: int) -> Promise:
        """What a read of a key that begins now may find at the lower end."""
        row = self.rows[worker, n]
        return Promise(int(row["floor"]), int(row["deleted"]), float(row["dead_at"]), int(row["dead_life"]), self.life)

    def attempted(self, worker: int, n: int) -> int:
        """The upper end, asked after a read."""
        return int(self.rows[worker, n]["attempted"])


class Row:
    """One key as its writer sees it."""

    def __init__(self, ledger: Ledger, worker: int, n: int) -> None:
        self._ledger = ledger
        self._row = ledger.rows[worker, n : n + 1]

    def __getitem__(self, name: str) -> Any:
        return self._row[name][0].item()

    def __setitem__(self, name: str, value: float) -> None:
        self._row[name][0] = value

    def writable(self) -> bool:
        """Whether no change of this life of the daemon's is in doubt."""
        return bool(self["doubt"] < self._ledger.life)

    def begin(self, version: int) -> None:
        """A change is under way; version: the one that is put, or the present one if it is to be deleted."""
        self["open"] = 1
        self["attempted"] = version

    def stored(self, version: int, dead_at: float = 0.0) -> None:
        """The put was acknowledged."""
        # The deadline counts from the acknowledgement: the daemon's own lies before it.
        self["dead_life"], self["dead_at"] = self._ledger.life, dead_at
        self["floor"] = version
        self["open"] = 0

    def gone(self) -> None:
        """The delete was acknowledged."""
        self["deleted"] = self["attempted"]
        self["floor"] = self["attempted"] + 1
        self["open"] = 0

    def doubted(self) -> None:
        """The change ended in an error, or with its process: whether it is done, or will be in this life, is open."""
        self["dead_at"] = 0.0
        self["doubt"] = self._ledger.life
        self["open"] = 0


def lie(promise: Promise, attempted: int, version: int, *, began: float, life: int) -> tuple[str, str] | None:
    """(kind, sentence) if a read that found a version broke a promise. began: of the read. life: after it."""
    if version <= promise.deleted:
        return "resurrected", f"version {version}, all up to {promise.deleted} were deleted"
    if version < promise.floor:
        return "wrong", f"version {version}, {promise.floor} was acknowledged"
    if version > attempted:
        return "wrong", f"version {version}, only {attempted} were put"
    same_life = promise.life == life == promise.dead_life
    if promise.dead_at and same_life and version == promise.floor and began > promise.dead_at:
        return "wrong", f"version {version} had expired {began - promise.dead_at:.3f} s before it was asked for"
    return None


now = time.monotonic
"""The clock of the ledger: the same in all processes, and no step of the wall clock moves it."""


def durable_line(path: Path, line: str) -> None:
    """Append a line in one write, which outlives kill -9."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, (line + "\n").encode())
    finally:
        os.close(fd)
