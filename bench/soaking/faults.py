"""What goes wrong in a soak: each fault is a context, entered at its time and left some seconds later.

A fault that says it is `blocking` may keep the daemon from serving; after all of them are left it has to serve again. A
kill of the daemon may come in the middle of any.
"""

import errno
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from soaking.daemon import MIB, TENANTS, Daemon
from soaking.ledger import Ledger, now

CODES = (errno.EIO, errno.ENOSPC)
STEPS_S = (-900, -30, -2, 2, 30, 900, 86_400, -86_400)


class Crew(Protocol):
    """The supervisor's workers, for faults that are theirs."""

    def pids(self) -> dict[int, int]:
        """Of those that run, by number."""
        ...

    def at_work(self) -> dict[int, int]:
        """As `pids`, of those that have begun."""
        ...

    def kill(self, number: int) -> None:
        """End one at once; another takes its place."""
        ...

    def dismiss(self, number: int) -> None:
        """Tell one to end, which it has to do in time; another takes its place."""
        ...


@dataclass
class Scene:
    """What a fault may change."""

    daemon: Daemon
    crew: Crew
    ledger: Ledger
    rng: random.Random
    spared: Collection[int]
    """Workers that are not killed now: theirs are the figures of growth."""


Fault = Callable[[Scene], Iterator[None]]


def kill_client(scene: Scene) -> Iterator[None]:
    """Kill -9 of one worker."""
    numbers = [number for number in scene.crew.pids() if number not in scene.spared]
    if numbers:
        scene.crew.kill(scene.rng.choice(numbers))
    yield


def dismiss_clients(scene: Scene) -> Iterator[None]:
    """Two workers are told to end, whatever else is going on."""
    numbers = [number for number in scene.crew.pids() if number not in scene.spared]
    for number in scene.rng.sample(numbers, min(2, len(numbers))):
        scene.crew.dismiss(number)
    yield


def stop_daemon(scene: Scene) -> Iterator[None]:
    """SIGSTOP, then SIGCONT."""
    scene.daemon.signal(signal.SIGSTOP)
    yield
    scene.daemon.signal(signal.SIGCONT)


def stop_clients(scene: Scene) -> Iterator[None]:
    """SIGSTOP of a few workers, then SIGCONT."""
    pids = scene.crew.pids()
    chosen = {n: pids[n] for n in scene.rng.sample(sorted(pids), min(3, len(pids)))}
    began = now()
    for pid in chosen.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    yield
    for number, pid in chosen.items():
        # Counted before it runs on, so that nobody takes the pause for a call that hangs, or an end that does.
        scene.ledger.workers["stopped_s"][number] += now() - began
        if scene.ledger.workers["leave"][number]:
            scene.ledger.workers["leave"][number] += now() - began
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def crowd(scene: Scene) -> Iterator[None]:
    """The daemon is out of descriptors: idle connections to each of its sockets have them."""
    daemon = scene.daemon
    try:
        _idle(daemon, 2).close()  # it serves: a daemon that starts has to open files
        there = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
        before = daemon.limit_descriptors((there + 8, resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]))
    except OSError:
        yield
        return
    pid = daemon.pid
    with ExitStack() as stack:
        for n in range(60):
            with suppress(OSError):
                stack.enter_context(_idle(daemon, n % 3))
        yield
    with suppress(OSError):
        if daemon.pid == pid:
            daemon.limit_descriptors(before)


def _idle(daemon: Daemon, which: int) -> socket.socket:
    """A connection that says nothing."""
    if which == 0:
        return socket.create_connection(("127.0.0.1", daemon.port), 0.2)
    kind, name = (socket.SOCK_STREAM, "k.sock") if which == 1 else (socket.SOCK_SEQPACKET, "k.sock.lease")
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(0.2)
    try:
        sock.connect(str(daemon.directory / "d" / name))
    except OSError:
        sock.close()
        raise
    return sock


def poor_client(scene: Scene) -> Iterator[None]:
    """A worker is out of descriptors."""
    pids = scene.crew.at_work()
    with suppress(OSError, IndexError):
        pid = pids[scene.rng.choice(sorted(pids))]
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        there = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (there, before[1]))
        yield
        with suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        return
    yield


def full_disk(scene: Scene) -> Iterator[None]:
    """Somebody else takes what the file system has left; without one of our own, the shim says so."""
    if not scene.daemon.mounted:
        yield from _failing(scene, {"write": errno.ENOSPC})
        return
    hog = scene.daemon.directory / "disk" / "hog"
    with hog.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(MIB)):
            pass
    yield
    hog.unlink()


def failing_disk(scene: Scene) -> Iterator[None]:
    """Writes, syncs or reads end in an error, some or all of them."""
    kinds = scene.rng.sample(("write", "sync", "read"), scene.rng.randint(1, 3))
    yield from _failing(scene, {kind: scene.rng.choice(CODES) for kind in kinds})


def _failing(scene: Scene, codes: dict[str, int]) -> Iterator[None]:
    control = scene.daemon.control
    control["one_in"] = scene.rng.choice((1, 1, 2, 3, 7))
    for kind, code in codes.items():
        control[kind] = code
    yield
    for kind in codes:
        control[kind] = 0


def clock_step(scene: Scene) -> Iterator[None]:
    """The wall clock jumps, and stays there until the next step."""
    scene.daemon.control["offset_s"] = scene.rng.choice((0, *STEPS_S))
    yield


def reload(scene: Scene) -> Iterator[None]:
    """A tenant is out of the tokens file for a while, or may only read; a file that nobody can read is tried, too."""
    header, tenant = scene.ledger.header, scene.rng.choice(TENANTS)
    header["revoke_until"], header["revoke_from"] = float("inf"), now()
    scene.daemon.write_tokens({tenant: scene.rng.choice((None, ("read",), ("write",)))})
    scene.daemon.signal(signal.SIGHUP)
    yield
    scene.daemon.write_tokens({})
    scene.daemon.signal(signal.SIGHUP)
    header["revoke_until"] = now()


def certificate(scene: Scene) -> Iterator[None]:
    """Another certificate of the same authority, another key."""
    scene.daemon.authority.renew()
    yield


_HOG = """
import mmap, sys
room = mmap.mmap(-1, int(sys.argv[1]))
while True:
    for at in range(0, len(room), 4096):
        room[at] = 1
"""
_THRASH = """
import mmap, os, sys
group, path, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
with open(path, "wb") as file:
    for _ in range(nbytes >> 20):
        file.write(os.urandom(1 << 20))
        file.flush()
        os.fdatasync(file.fileno())
fd = os.open(path, os.O_RDONLY)
room = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
while True:
    sum(room[at] for at in range(0, nbytes, 4096))
"""
"""Reads a file over and over that its control group has no room for: the kernel counts that as stalls for memory."""


def memory_pressure(scene: Scene) -> Iterator[None]:
    """A process takes memory and touches all of it; where control groups allow it, another one stalls for memory."""
    with ExitStack() as stack:
        stack.enter_context(_running(_HOG, str(512 * MIB)))
        stack.enter_context(_thrashing(scene.daemon.directory))
        yield


@contextmanager
def _running(code: str, *arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def _thrashing(directory: Path) -> Iterator[None]:
    group, file = _own_group() / f"kvstored-soak-{os.getpid()}", directory / "thrashed"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(24 * MIB))
    except OSError:
        yield
        return
    try:
        with _running(_THRASH, str(group), str(file), str(96 * MIB)):
            yield
    finally:
        file.unlink(missing_ok=True)
        with suppress(OSError):
            group.rmdir()


def _own_group() -> Path:
    """Of the first version's memory controller; a path that is not there, where there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "memory" in names.split(","):
            found = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
            return found if found.exists() else Path("/sys/fs/cgroup/memory")
    return Path("/nowhere")


FAULTS: dict[str, tuple[Fault, bool, float]] = {
    "kill_client": (kill_client, False, 0.0),
    "dismiss_clients": (dismiss_clients, False, 0.0),
    "stop_daemon": (stop_daemon, True, 12.0),
    "stop_clients": (stop_clients, False, 12.0),
    "crowd": (crowd, True, 8.0),
    "poor_client": (poor_client, False, 6.0),
    "full_disk": (full_disk, True, 10.0),
    "failing_disk": (failing_disk, True, 10.0),
    "clock_step": (clock_step, False, 0.0),
    "reload": (reload, False, 6.0),
    "certificate": (certificate, False, 0.0),
    "memory_pressure": (memory_pressure, True, 10.0),
}
"""By name: the fault, whether it is blocking, and for how many seconds it lasts at most."""
