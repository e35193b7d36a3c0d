"""Every call to the disk failing once, the nth for all n; full disks; readers that died: no lie, no loss, no end."""

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest

from kvstore.disk.rows import Rows
from kvstore.errors import ConfigError
from kvstore.tiers.cold import Cold
from tests.crash.history import TIMES, entry_of, key_of, open_cold, version_in
from tests.crash.points import PointedDisk, child, ended

CALLS = ("write", "written", "sync", "open", "punch", "unlink", "sync_directory", "rows", "rows_sync")
"""`written`: after the bytes, as a short write that is noticed late."""


class FailNth:
    """Raises at the nth call of a name, once."""

    def __init__(self, name: str, nth: int, error: Exception) -> None:
        self.name, self.left, self.error = name, nth, error

    def __call__(self, name: str) -> None:
        if name == self.name:
            self.left -= 1
            if self.left == 0:
                raise self.error


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_the_nth_call_fails_for_every_n(
    tmp_path: Path, name: str, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("kvstore.disk.writer.PAUSE_MIN_S", 0.001)
    error: Exception = OSError(code, "injected")
    if name.startswith("rows"):
        error = lmdb.DiskError("injected") if code == errno.ENOSPC else lmdb.PanicError("injected")
    for nth in range(1, 13 * TIMES):
        fail = FailNth(name, nth, error)
        with monkeypatch.context() as patch:
            for method, point in (("write", "rows"), ("sync", "rows_sync")):
                patch.setattr(Rows, method, failing(getattr(Rows, method), fail, point))
            path = tmp_path / f"{nth}"
            kept = life(path, fail)
        cold = open_cold(path)
        assert {n: version_in(entry, n) for n in range(8) if (entry := cold.get(key_of(n)))} == kept, f"n={nth}"
        assert cold.stats().counters.corrupt_total == 0
        cold.close()
        shutil.rmtree(path)
        if fail.left > 0:
            return  # every call of that name has had its turn


def failing(method: Callable[..., object], fail: FailNth, point: str) -> Callable[..., object]:
    def wrapped(*args: object) -> object:
        fail(point)
        return method(*args)

    return wrapped


def life(path: Path, fail: FailNth) -> dict[int, int]:
    """Puts, replacements and removals with one failure among them; what must be there at the end."""
    try:
        cold = open_cold(path, PointedDisk(fail))
    except ConfigError:
        cold = open_cold(path)
    for version in range(1, 25):
        n = version % 8
        cold.put(entry_of(n, version, 30_000))
        if version % 3 == 0:
            cold.flush()
        assert version_in(entry, n) == version if (entry := cold.get(key_of(n))) else False
    cold.wait(cold.queue_removal(key_of(3)))
    cold.touch([key_of(1)])
    cold.flush_meta()
    cold.flush()
    assert cold.healthy
    assert cold.get(key_of(3)) is None
    kept = {n: version_in(entry, n) for n in range(8) if (entry := cold.get(key_of(n)))}
    assert kept == {n: 16 + n if n else 24 for n in range(8) if n != 3}
    cold.close()
    return kept


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a small tmpfs needs root")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def put_with_room(cold: Cold, n: int) -> None:
    entry = entry_of(n, 2 * n, 1 << 20)
    cold.displace(entry)
    cold.put(entry)


def seen(cold: Cold, n: int) -> int | None:
    entry = cold.get(key_of(n))
    return None if entry is None else version_in(entry, n)


def test_a_full_disk_is_lived_with(small_disk: Path) -> None:
    cold = open_cold(small_disk / "cold", capacity_nbytes=1 << 30)
    for n in range(1, 60):
        put_with_room(cold, n)
        cold.flush()
        assert seen(cold, n) == 2 * n
    assert cold.healthy
    held = len(cold)
    cold.close()
    cold = open_cold(small_disk / "cold", capacity_nbytes=1 << 30)
    assert len(cold) == held
    cold.close()
    assert 5 < held < 24


def fill(hog: Path) -> None:
    """Take what the file system has left."""
    with hog.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(65536)):
            pass


def test_a_disk_that_others_fill_is_survived_and_used_again(small_disk: Path) -> None:
    """Nothing of ours is there to be evicted: what is put waits, readable, until there is room."""
    cold = open_cold(small_disk / "cold", capacity_nbytes=1 << 30)
    hog = small_disk / "hog"
    fill(hog)
    for n in range(10, 16):
        put_with_room(cold, n)
        assert seen(cold, n) == 2 * n
    while cold.healthy:
        time.sleep(0.01)
    hog.unlink()
    cold.flush()
    assert cold.healthy
    assert [seen(cold, n) for n in range(10, 16)] == [2 * n for n in range(10, 16)]
    cold.close()


def test_the_slot_of_a_reader_that_died_is_freed(tmp_path: Path) -> None:
    cold = open_cold(tmp_path / "cold")
    cold.put(entry_of(1, 1, 1000))
    cold.flush()
    cold.close()

    def read_forever() -> None:
        txn = lmdb.open(str(tmp_path / "cold" / "index"), readonly=True, max_dbs=4).begin()
        (tmp_path / "reading").touch()
        time.sleep(60)
        txn.abort()

    pid = child(read_forever)
    while not (tmp_path / "reading").exists():
        time.sleep(0.002)
    cold = open_cold(tmp_path / "cold")
    assert cold._records._rows.check_readers() == 0
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert cold._records._rows.check_readers() == 1
    cold.close()
