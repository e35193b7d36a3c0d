"""Gives freed memory back to the kernel when there is much of it.

`process.tune` makes malloc keep freed memory, so that the next entry lands on warm pages. After a burst of large
entries that would be gigabytes that no budget counts, so idle memory is bounded, by the bytes that may be in flight at
once. When nothing has been allocated or freed for some seconds there is no next entry to keep pages warm for: all but a
little goes back, whatever left it (long headers of many calls, for one). Thread rule: `turn` on one thread.
"""

import ctypes
import os

INTERVAL_S = 0.25
"""Seconds between two turns: under load a gigabyte a second is freed and taken again."""
QUIET_TURNS = 20
"""Turns, 5 s of them, in which nothing was allocated or freed, but for `QUIET_NBYTES` of scrapes and the like."""
QUIET_NBYTES = 1 << 20
QUIET_IDLE_MAX_NBYTES = 64 << 20
"""Idle memory that stays for the next entries even then."""
STATUS_MAX_NBYTES = 1 << 16


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Heap:
    """malloc's heap. Does nothing if the C library cannot report it (musl, an old glibc)."""

    def __init__(self, idle_max_nbytes: int) -> None:
        """idle_max_nbytes: limit of the bytes that are resident, freed and not used again."""
        self._idle_max_nbytes = idle_max_nbytes
        # Kept open: a daemon out of descriptors still has to give memory back and to tell of it. Each read is fresh.
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        libc = ctypes.CDLL(None)
        self._info = getattr(libc, "mallinfo2", None)
        self._trim = getattr(libc, "malloc_trim", None)
        if self._info is not None:
            self._info.restype = _Mallinfo
        # Resident memory outside malloc at the start: the interpreter's arenas, written pages of libraries.
        self._other_nbytes = self.resident_nbytes() - self._used_nbytes()
        self.trims = 0
        self._quiet_turns = 0
        self._used_before_nbytes = 0

    def __del__(self) -> None:
        if hasattr(self, "_status"):
            os.close(self._status)

    def idle_nbytes(self) -> int:
        """About how many resident bytes malloc holds but has not handed out."""
        return max(0, self.resident_nbytes() - self._used_nbytes() - self._other_nbytes)

    def turn(self) -> None:
        """Check once, and give memory over the limit back."""
        if self._info is None or self._trim is None:
            return
        idle_nbytes, used_nbytes = self.idle_nbytes(), self._used_nbytes()
        quiet = abs(used_nbytes - self._used_before_nbytes) <= QUIET_NBYTES
        self._quiet_turns = self._quiet_turns + 1 if quiet else 0
        self._used_before_nbytes = used_nbytes
        # At the end of a quiet time once: what the trim leaves no other one would take.
        limit_nbytes = QUIET_IDLE_MAX_NBYTES if self._quiet_turns == QUIET_TURNS else self._idle_max_nbytes
        if idle_nbytes > min(limit_nbytes, self._idle_max_nbytes):
            self._trim(0)
            self.trims += 1

    def _used_nbytes(self) -> int:
        if self._info is None:
            return 0
        info = self._info()
        return int(info.uordblks) + int(info.hblkhd)

    def resident_nbytes(self) -> int:
        """Anonymous memory of this process that is in RAM."""
        lines = os.pread(self._status, STATUS_MAX_NBYTES, 0).splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(b"RssAnon")), 0)
