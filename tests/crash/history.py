"""What a process said it did, line by line, and what may be found after it died.

A line is written (one write to a file, which outlives kill -9) before an operation and another after it: capital and
small letter. `Judge` reads them and knows of each key which versions may be there and whether one must.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

from kvstore.clock import SystemClock
from kvstore.config import ColdConfig
from kvstore.disk import Disk
from kvstore.dtypes import TensorSpec
from kvstore.entries.entry import EncodedTensor, Entry
from kvstore.keys import Key
from kvstore.metadata.meta import Meta
from kvstore.tiers.cold import Cold

SEED = os.environ.get("KVSTORED_TORTURE_SEED")
TIMES = int(os.environ.get("KVSTORED_TORTURE", "1"))
KEYS = 40
_GONE = 1 << 60


def say(line: str) -> None:
    """For `pytest -s`, and for whoever reads a failure."""
    sys.stdout.write(line + "\n")


def seeds(trials: int, test: str) -> list[int]:
    """The seeds of a test's trials: fresh ones each run, or the one that is to be replayed."""
    if SEED is not None:
        return [int(SEED)]
    fresh = [random.SystemRandom().randrange(1 << 31) for _ in range(trials * TIMES)]
    say(f"{test}: {len(fresh)} trials, seeds {' '.join(map(str, fresh))}")
    return fresh


def key_of(n: int) -> Key:
    return Key(b"key-%04d" % n)


def entry_of(n: int, version: int, nbytes: int) -> Entry:
    """Every word of it names its key and version. Odd versions are raw and compress well, even ones are not tried."""
    # By numpy: torch would start OpenMP threads in the test, which a forked child has lost and would wait for.
    x = torch.from_numpy(np.full(max(nbytes // 8, 1), n << 32 | version))
    return Entry(
        key_of(n), {"x": EncodedTensor(TensorSpec("int64", tuple(x.shape)), "raw" if version % 2 else "words", {"": x})}
    )


def version_in(entry: Entry, n: int) -> int:
    """The version of an entry of key n. Raises AssertionError when a single word is another's."""
    words = np.unique(entry.tensors["x"].parts[""].numpy()).tolist()
    assert len(words) == 1, f"LIE: key {n} is a mixture of {len(words)} words"
    assert words[0] >> 32 == n, f"LIE: key {n} has the value of key {words[0] >> 32}"
    return int(words[0] & 0xFFFFFFFF)


def open_cold(path: Path, disk: Disk | None = None, capacity_nbytes: int = 1 << 30, log: "Log | None" = None) -> Cold:
    """A tier whose Metas never expire; what it drops is logged."""

    def dropped(key: Key, reason: str) -> None:
        if log is not None:
            log.line("E", int(key[4:]), reason)

    config = ColdConfig(capacity_nbytes=capacity_nbytes, write_buffer_nbytes=8 << 20)
    meta = Meta(0.0, 4e9, 4e9, 0)
    return Cold.open(path, config, SystemClock(), meta_of=lambda _: meta, on_drop=dropped, disk=disk)


class Log:
    """Lines that outlive the process."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def line(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def work(cold: Cold, log: Log, rng: random.Random, version: int, operations: int) -> int:
    """Random operations, checked as they go; the next version."""
    current: dict[int, int | None] = {}
    for _ in range(operations):
        n, kind = rng.randrange(KEYS), rng.random()
        if kind < 0.55:
            version += 1
            durable = kind < 0.05
            entry = entry_of(n, version, int(2 ** rng.uniform(3, 18)) if rng.random() < 0.97 else 3 << 20)
            log.line("P", n, version)
            cold.displace(entry)
            cold.put(entry, durable=durable)
            log.line("d" if durable else "p", n, version)
            current[n] = version
        elif kind < 0.65:
            log.line("F")
            cold.flush()
            log.line("f")
        elif kind < 0.78:
            wait = kind < 0.73
            log.line("R", n)
            ticket = cold.queue_removal(key_of(n))
            if wait:
                cold.wait(ticket)
            log.line("r" if wait else "x", n)
            current[n] = None
        elif kind < 0.86:
            cold.touch([key_of(rng.randrange(KEYS)) for _ in range(3)])
        elif kind < 0.88:
            cold.flush_meta()
        else:
            _look(cold, log, n, current)
    return version


def _look(cold: Cold, log: Log, n: int, current: dict[int, int | None]) -> None:
    entry = cold.get(key_of(n))
    if entry is None or n not in current:
        return
    seen = version_in(entry, n)
    if seen != current[n]:
        log.line("L", n, f"read version {seen} of {current[n]}")


class Judge:
    """What may and what must be found.

    lossy: a power cut, after which the last transaction may be missing. evicting: anything may be missing, since an
    eviction is on disk before it is told; nothing may be wrong all the same.
    """

    def __init__(self, *, lossy: bool = False, evicting: bool = False) -> None:
        self.lossy = lossy
        self.evicting = evicting
        self.version = 0
        self.checked = 0
        self.said: list[str] = []
        self._known: dict[int, set[int]] = {}
        self._floor: dict[int, int] = {}
        self._must: dict[int, int] = {}
        self._accepted: dict[int, int] = {}
        self._flushing: dict[int, int] = {}
        self._flushed: dict[int, int] = {}

    def read(self, path: Path) -> None:
        """Take in what a process said; the file is emptied. Its last lines stay in `said`, for a failure's message."""
        # A kill tears a line that lies on two pages of the file: what it says had not begun, or was not yet told.
        *lines, _ = path.read_text().split("\n")
        self.said = lines[-60:]
        for line in lines:
            kind, *words = line.split(" ", 2)
            assert kind != "L", f"LIE while running: {line}"
            getattr(self, f"_on_{_NAMES[kind]}")(*map(int, words[:1]), *words[1:])
        path.write_text("")

    def check(self, cold: Cold) -> None:
        """Compare with what a new process finds, which from now on is what there is."""
        for n in range(KEYS):
            entry = cold.get(key_of(n))
            version = None if entry is None else version_in(entry, n)
            self.checked += 1
            if version is None:
                assert self.evicting or n not in self._must, f"LOST: key {n} version {self._must[n]} was acknowledged"
            else:
                assert version in self._known.get(n, set()), f"LIE: key {n} has version {version}, never put"
                assert version >= self._floor.get(n, 0), (
                    f"LIE: key {n} is back at {version}, {self._floor[n]} was durable"
                )
            self._settle(n, version)
        self._accepted, self._flushing, self._flushed = {}, {}, {}

    def _settle(self, n: int, version: int | None) -> None:
        # What a new process found was read from the disk: from here on it is durable, except after a power cut's
        # replay, where it is all the more so.
        self._must.pop(n, None)
        if version is None:
            self._floor[n] = _GONE
        else:
            self._floor[n] = self._must[n] = version

    def _on_put(self, n: int, version: str) -> None:
        self.version = int(version)
        self._known.setdefault(n, set()).add(int(version))
        if self._floor.get(n) == _GONE:
            self._floor[n] = int(version)

    def _on_accepted(self, n: int, version: str) -> None:
        self._accepted[n] = int(version)

    def _on_durable(self, n: int, version: str) -> None:
        self._floor[n] = self._must[n] = int(version)

    def _on_flush(self) -> None:
        self._flushing, self._accepted = dict(self._accepted), {}

    def _on_flushed(self) -> None:
        if self.lossy and not self._flushing:
            return  # nothing was written, so the last transaction is still the last one
        certain = self._flushed if self.lossy else self._flushing
        for n, version in certain.items():
            self._floor[n] = max(version, self._floor.get(n, 0))
            self._must[n] = self._floor[n]
        self._flushed = self._flushing

    def _on_remove(self, n: int) -> None:
        for table in (self._must, self._accepted, self._flushing, self._flushed):
            table.pop(n, None)

    def _on_removed(self, n: int) -> None:
        self._floor[n] = _GONE

    def _on_queued(self, n: int) -> None:
        """A removal that nobody waited for: the value may be there or not."""

    def _on_dropped(self, n: int, reason: str) -> None:
        # After a power cut's first moment every read is an error, and the key is dropped for it.
        assert reason == "evicted" or self.lossy, f"dropped as {reason}"
        self._on_remove(n)


_NAMES = {
    "P": "put", "p": "accepted", "d": "durable", "F": "flush", "f": "flushed", "R": "remove", "r": "removed",
    "x": "queued", "E": "dropped",
}  # fmt: skip
