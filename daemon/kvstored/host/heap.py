"""Freed memory goes back to the kernel where there is much of it.

`process.tune` has malloc keep what is freed, for the next entry to land on warm pages. After a burst of large entries
that would be gigabytes in nobody's account, so what lies idle is bounded: by as much as may be in flight at once.
Thread rule: `turn` on one thread.
"""

import ctypes
from pathlib import Path

INTERVAL_S = 0.25
"""Between two looks: under load a gigabyte a second is freed and taken again."""


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


class Heap:
    """malloc's heap. Where the C library cannot tell (musl, an old glibc) nothing is done."""

    def __init__(self, idle_max_nbytes: int) -> None:
        """idle_max_nbytes: resident, freed and not yet used again."""
        self._idle_max_nbytes = idle_max_nbytes
        libc = ctypes.CDLL(None)
        self._info = getattr(libc, "mallinfo2", None)
        self._trim = getattr(libc, "malloc_trim", None)
        if self._info is not None:
            self._info.restype = _Mallinfo
        # What is resident and no malloc's from the start: the interpreter's own arenas, written pages of libraries.
        self._other_nbytes = self.resident_nbytes() - self._used_nbytes()
        self.trims = 0

    def idle_nbytes(self) -> int:
        """Resident bytes that malloc has given to nobody, about."""
        return max(0, self.resident_nbytes() - self._used_nbytes() - self._other_nbytes)

    def turn(self) -> None:
        """Look once; give back what is too much."""
        if self._info is not None and self._trim is not None and self.idle_nbytes() > self._idle_max_nbytes:
            self._trim(0)
            self.trims += 1

    def _used_nbytes(self) -> int:
        if self._info is None:
            return 0
        info = self._info()
        return int(info.uordblks) + int(info.hblkhd)

    @staticmethod
    def resident_nbytes() -> int:
        """Anonymous memory of this process that is in RAM."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
