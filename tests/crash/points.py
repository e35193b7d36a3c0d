"""A disk that kills its process, or fails, at the nth call of a name; and a child process to do so in."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore.disk import Buffer, SystemDisk
from kvstore.disk.opening import Directory
from kvstore.disk.rows import Rows
from tests.crash.history import Log, open_cold, work

POINTS = (
    "write", "written", "sync", "synced", "rows", "rows_written", "rows_sync", "rows_synced", "punch", "punched",
    "unlink", "open", "sync_directory", "state", "state_written",
)  # fmt: skip
"""Before and after: a record's write and its sync, the rows' transaction and its sync, space given back, STATE."""


class PointedDisk(SystemDisk):
    """The system's files; `at(name)` is called before and after each call that changes something."""

    def __init__(self, at: Callable[[str], None]) -> None:
        super().__init__()
        self._at = at

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._at("open")
        return super().open(path, flags)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._at("write")
        super().write(fd, buffers, offset)
        self._at("written")

    def sync(self, fd: int) -> None:
        self._at("sync")
        super().sync(fd)
        self._at("synced")

    def sync_directory(self, path: Path) -> None:
        self._at("sync_directory")
        super().sync_directory(path)

    def punch(self, fd: int, offset: int, nbytes: int) -> None:
        self._at("punch")
        super().punch(fd, offset, nbytes)
        self._at("punched")

    def unlink(self, path: Path) -> None:
        self._at("unlink")
        super().unlink(path)


def around(owner: type, name: str, before: str, after: str, at: Callable[[str], None]) -> None:
    """Call `at` before and after a method, in this process from now on."""
    method = getattr(owner, name)

    def wrapped(*args: object, **kwargs: object) -> object:
        at(before)
        result = method(*args, **kwargs)
        at(after)
        return result

    setattr(owner, name, wrapped)


def dying_at(point: str, nth: int) -> Callable[[str], None]:
    """Kill -9 this process when `point` is reached for the nth time."""
    left = nth

    def at(name: str) -> None:
        nonlocal left
        left -= name == point
        if left <= 0 and name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def child(task: Callable[[], None]) -> int:
    """The pid of a forked process that runs `task` and ends. Forked: importing torch anew would take the CI's time."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        task()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing may unwind into the test's frames
        traceback.print_exc()
        os._exit(1)


def ended(pid: int, timeout_s: float = 60.0) -> int:
    """A child's wait status; a child that hangs is killed, and that is a failure."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a child hung for {timeout_s} s")


def run_to_death(
    path: Path, log: Path, rng: object, version: int, *, point: tuple[str, int], capacity_nbytes: int
) -> int:
    """Work in a child until it dies at a point (or, point reached too rarely, ends in order). Its exit status."""

    def task() -> None:
        at = dying_at(*point)
        around(Rows, "write", "rows", "rows_written", at)
        around(Rows, "sync", "rows_sync", "rows_synced", at)
        around(Directory, "write_state", "state", "state_written", at)
        cold = open_cold(path, PointedDisk(at), capacity_nbytes, Log(log))
        work(cold, Log(log), rng, version, 120)
        cold.close()

    return ended(child(task))


def run_and_kill(path: Path, log: Path, rng: object, version: int, *, after_s: float, capacity_nbytes: int) -> int:
    """Work in a child and kill -9 it so many seconds after it has opened the tier. Its exit status."""

    def task() -> None:
        cold = open_cold(path, None, capacity_nbytes, Log(log))
        (log.parent / "opened").touch()
        work(cold, Log(log), rng, version, 10_000)

    (log.parent / "opened").unlink(missing_ok=True)
    pid = child(task)
    deadline = time.monotonic() + 30
    while not (log.parent / "opened").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    return ended(pid)
