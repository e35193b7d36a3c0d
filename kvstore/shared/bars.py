"""Keys that were deleted here: barred from being read, or published, until their objects are gone from the store.

A bar holds from before the entry leaves this host until the store has acknowledged the deletion and every fetch that
began before it has ended. With a directory the bars are in a file there, so a restart with the store down forgets none;
without one they end with the process. When there are more than BARS_MAX, all of them become one: nothing is read or
published until everything in the store is flushed. Invariant: a deleted key is never answered from an object older than
its deletion. Any thread.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from kvstore.keys import KEY_MAX_NBYTES, Key
from kvstore.ownership import open_own

BARS_MAX = 262_144
"""Deletions that wait: 40 MB of memory."""
FILE = "shared-deletes"
_ALL = b"*"
_REWRITE_NBYTES = 1 << 20


class Bars:
    """The keys barred, and which of them wait for their deletion."""

    def __init__(self, directory: Path | None, *, at_most: int = BARS_MAX) -> None:
        """Raises ConfigError for a file that is another user's, OSError where it cannot be read."""
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # taken first
        self._unwritten: list[Key] = []
        self._at_most = at_most
        self._waiting: OrderedDict[Key, int] = OrderedDict()
        self._ended: dict[Key, int] = {}
        self._flights: dict[int, int] = {}
        self._turn = 0
        self._flight = 0
        self._path = None if directory is None else directory / FILE
        self._fd = -1
        self.everything = False
        if self._path is not None:
            self._fd = open_own(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, "store.cold.path")
            self._recover()

    def __len__(self) -> int:
        """Deletions that wait."""
        return len(self._waiting)

    def __contains__(self, key: object) -> bool:
        """Whether a key may be neither read nor published."""
        return self.everything or key in self._waiting or key in self._ended

    def add(self, keys: Sequence[Key]) -> None:
        """Bar keys, before their entries leave the store. In memory: `keep` writes it down. Under the store's lock."""
        with self._lock:
            self._turn += 1
            self._unwritten += [key for key in keys if key not in self._waiting]
            self._waiting.update(dict.fromkeys(keys, self._turn))
            if len(self._waiting) > self._at_most:
                self.everything = True
                self._waiting.clear()

    def lift(self, keys: Sequence[Key]) -> None:
        """Bar these no more: they were not deleted after all."""
        with self._lock:
            for key in keys:
                self._waiting.pop(key, None)

    def keep(self) -> None:
        """Have the bars on disk, if there is a directory, so that no restart forgets them. Not under a lock."""
        with self._writing, self._lock:
            keys, self._unwritten = self._unwritten, []
            fd, everything = self._fd, self.everything
        if fd < 0:
            return
        with self._writing:
            if everything:
                os.ftruncate(fd, 0)
                self._write(_line(_ALL))
            elif keys:
                self._write(b"".join(map(_line, keys)))

    def waiting(self, at_most: int) -> list[tuple[Key, int]]:
        """Keys whose objects are to be deleted, the oldest first, each with its turn, for `done`."""
        with self._lock:
            return [pair for pair, _ in zip(self._waiting.items(), range(at_most), strict=False)]

    def done(self, pairs: Sequence[tuple[Key, int]]) -> None:
        """The store has acknowledged these deletions; of a key deleted again since, it is still to be."""
        with self._lock:
            for key, turn in pairs:
                if self._waiting.get(key) == turn:
                    del self._waiting[key]
                    if self._flights:
                        self._ended[key] = self._turn
        self._shrink()

    def flushed(self) -> None:
        """Everything in the store is out of reach: no bar is needed."""
        with self._lock:
            if self._flights:
                self._ended.update(dict.fromkeys(self._waiting, self._turn))
            self._waiting.clear()
            self.everything = False
        self._shrink()

    @contextmanager
    def flight(self) -> Iterator[None]:
        """While a fetch is under way the bars that it began under hold, acknowledged or not."""
        with self._lock:
            self._flight += 1
            number, self._flights[self._flight] = self._flight, self._turn
        try:
            yield
        finally:
            with self._lock:
                del self._flights[number]
                oldest = min(self._flights.values(), default=None)
                if oldest is None:
                    self._ended.clear()
                elif self._ended:
                    self._ended = {key: turn for key, turn in self._ended.items() if turn > oldest}

    def close(self) -> None:
        """Let go of the file."""
        with self._writing, self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]
        os.fdatasync(self._fd)

    def _shrink(self) -> None:
        """Take out of the file what is done. Not synced: what a crash brings back is deleted once more."""
        with self._writing:
            with self._lock:
                left = None if self.everything or self._unwritten else list(self._waiting)
            if self._fd < 0 or left is None:
                return
            if not left:
                os.ftruncate(self._fd, 0)
            elif os.fstat(self._fd).st_size > _REWRITE_NBYTES + 4 * sum(map(len, left)):
                self._rewrite(left)

    def _rewrite(self, keys: Sequence[Key]) -> None:
        assert self._path is not None
        fresh = self._path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fd = open_own(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, "store.cold.path")
        old, self._fd = self._fd, fd
        self._write(b"".join(map(_line, keys)))
        fresh.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fsync(directory)
        os.close(directory)
        os.close(old)

    def _recover(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            data = file.read()
        for line in data.split(b"\n"):
            key = _parsed(line)
            if key == _ALL:
                self.everything = True
            elif key is not None:
                self._waiting[Key(key)] = 0
        if data and not data.endswith(b"\n"):
            self._write(b"\n")  # a line that a crash cut off must not swallow the next one
        if len(self._waiting) > self._at_most:
            self.everything = True
            self._waiting.clear()


def _line(key: bytes) -> bytes:
    """A key as the file has it: a line that a crash cut off is no line."""
    return b"%s %08x\n" % (key.hex().encode(), xxhash.xxh3_64_intdigest(key) & 0xFFFFFFFF)


def _parsed(line: bytes) -> bytes | None:
    text, _, check = line.partition(b" ")
    try:
        key = bytes.fromhex(text.decode("ascii"))
        known = int(check, 16)
    except ValueError:
        return None
    good = 1 <= len(key) <= KEY_MAX_NBYTES and len(check) == 8 and known == xxhash.xxh3_64_intdigest(key) & 0xFFFFFFFF
    return key if good else None
