"""Power cuts: ext4 on a loop device is shut down at once, its journal unwritten, and mounted again.

What was acknowledged as durable must be there, what was deleted must not, and of the rest at most the last transaction
may be missing. Needs root, loop devices and mkfs.ext4.
"""

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.history import Judge, Log, open_cold, say, seeds, work
from tests.crash.points import child, ended

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
NO_LOG_FLUSH = struct.pack("I", 2)
CUTS = 3


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("a power cut needs root and mkfs.ext4")
    file, point = tmp_path / "disk", tmp_path / "mnt"
    point.mkdir()
    with file.open("wb") as disk:
        disk.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", file], check=True)
    if subprocess.run(["mount", "-o", "loop", file, point], check=False, capture_output=True).returncode:
        pytest.skip("no loop device can be mounted here")
    yield file, point
    subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


def cut(point: Path) -> None:
    """Nothing that is not on the disk now will ever be."""
    fd = os.open(point, os.O_RDONLY)
    fcntl.ioctl(fd, SHUTDOWN, NO_LOG_FLUSH)
    os.close(fd)


def test_power_cuts(tmp_path: Path, image: tuple[Path, Path]) -> None:
    file, point = image
    checked = 0
    for seed in seeds(3, "power cuts"):
        rng = random.Random(seed)
        judge = Judge(lossy=True)
        log = tmp_path / f"log-{seed}"
        for _ in range(CUTS):
            live(point, log, rng, judge.version)
            subprocess.run(["umount", point], check=True)
            subprocess.run(["mount", "-o", "loop", file, point], check=True)
            try:
                judge.read(log)
                start = time.process_time()  # what a busy machine adds says nothing
                cold = open_cold(point / f"cold-{seed}")
                assert time.process_time() - start < 10
                assert cold.stats().quarantined is None
                judge.check(cold)
                cold.close()
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {error}; said last: {' | '.join(judge.said)}") from None
        checked += judge.checked
        shutil.rmtree(point / f"cold-{seed}")
    say(f"power cuts: {checked} keys checked, 0 lies")


def live(point: Path, log: Path, rng: random.Random, version: int) -> None:
    """Work in a child, then cut the power and kill it."""
    path = point / log.name.replace("log", "cold")

    def task() -> None:
        cold = open_cold(path, log=Log(log))
        work(cold, Log(log), rng, version, 10_000)

    pid = child(task)
    deadline = time.monotonic() + 30
    while not log.exists() or (not log.stat().st_size and time.monotonic() < deadline):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.5))
    cut(point)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
