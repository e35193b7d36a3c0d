"""Changes that the daemon makes to its own process at start. Never call them in another program's process."""

import ctypes
import fcntl
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.ownership import check_directory, open_own

SWITCH_S = 0.0005
"""How long a thread may compute while another one waits to go on. A small call takes some five turns, each of them
behind a caller's long work: with Python's 5 ms it took 30 ms while another caller's keys were looked at."""
GC_THRESHOLDS = 2000, 10, 200
"""A full collection each 4,000,000 new objects that could be in a circle, some 230,000 calls: with a million entries
everybody waits 0.5 s for one. A call over gRPC leaves a circle of 20 objects, which the quick collections find."""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def settle() -> None:
    """Once all is there that stays until the end: have the garbage collector look at none of it again.

    Modules and what they made are 185,000 objects. Each full collection looked at them, and all calls
    waited for 0.1 s.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def tune() -> None:
    """Keep freed memory in one heap, use one thread per copy, and let threads take turns often.

    By default glibc gives large blocks back to the kernel, so nearly every copy of a tensor lands on fresh pages at 2
    GB/s: a 64 MiB clone took 32 ms, and takes 6 ms with this. The price is that freed memory stays with the daemon, so
    all threads share one heap: in sixteen heaps, glibc's choice here, a gigabyte was idle under load.
    """
    sys.setswitchinterval(SWITCH_S)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
        mallopt(_M_ARENA_MAX, 1)
    import torch

    # A copy split over two threads waits at a barrier: 8 ms, for 4 MiB, when another process runs.
    torch.set_num_threads(1)


def raise_descriptor_limit() -> int:
    """Allow this process as many descriptors as the system lets it have. Returns that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a hard limit over what the kernel allows at all
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class DirectoryLock:
    """An flock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path, what: str) -> None:
        """Take the lock; its directory is made if need be. Raises ConfigError, which names the holder, if it is taken.

        Raises ConfigError, too, where the directory or the file is another user's, or a link: whoever may put names
        there could have this process overwrite what it can write, and clients talk to what is not this daemon. A group
        may write there, as to a volume that is made for its pod.
        """
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        check_directory(path.parent, what)
        self._fd = open_own(path, os.O_RDWR | os.O_CREAT, what, mode=0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise ConfigError(
                f"another kvstored (process {holder}) already uses {what}: stop that one, or give this one its own "
                "server.data_dir and server.address"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two processes could lock two files."""
        os.close(self._fd)
