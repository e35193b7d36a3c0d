"""Real daemons for tests: a process each, on a unix socket in a directory of its own, gone when the test is."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvstored_client import Client

ROOT = Path(__file__).parents[1]
START_S = 120.0
"""Importing torch takes two seconds on a free machine and forty on one with thirty processes waiting."""
STEADY = "pressure_percent = 0"
"""Tests count bytes in tiers: a budget must not shrink because the machine that runs them is short of memory."""


def environment(**extra: str) -> dict[str, str]:
    """This process's environment, with the sources on the path and no settings of the developer's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
    path = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client"), kept.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(p for p in path if p), **extra}


@dataclass
class DaemonProcess:
    """A daemon started from a configuration file."""

    directory: Path
    address: str
    config: Path
    process: subprocess.Popen[bytes] | None = None
    clients: list[Client] = field(default_factory=list)

    @property
    def socket_path(self) -> Path:
        return Path(self.address.split(",")[0].removeprefix("unix:"))

    @property
    def log(self) -> str:
        return (self.directory / "daemon.log").read_text()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, *, wait: bool = True) -> None:
        with (self.directory / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvstored", "serve", "--config", str(self.config)],
                env=environment(),
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            with Client(self.address.split(",")[0], timeout_s=2, on_error="raise") as probe:
                try:
                    probe.stats()
                except Exception:  # noqa: BLE001 - whatever it is, it is not up yet
                    time.sleep(0.05)
                else:
                    return
        pytest.fail(f"the daemon did not come up within {START_S} s:\n{self.log}")

    def client(self, **options: object) -> Client:
        options = {"on_error": "raise", "timeout_s": 30, **options}
        client = Client(self.address.split(",")[0], **options)  # type: ignore[arg-type]
        self.clients.append(client)
        return client

    def signal(self, number: int) -> None:
        """Send it; a stop has happened when this returns (the kernel stops the threads one by one)."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            deadline = time.monotonic() + START_S
            while not self._is_stopped():
                assert time.monotonic() < deadline
                time.sleep(0.001)

    def _is_stopped(self) -> bool:
        states = [
            task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{self.pid}/task").glob("*/stat")
        ]
        return all(state == "T" for state in states)

    def stop(self, timeout_s: float = START_S) -> int:
        """SIGTERM, and wait. Returns the exit code."""
        self.signal(signal.SIGTERM)
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it whatever its state, stopped by SIGSTOP included."""
        for client in self.clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(START_S)

    def rss_nbytes(self) -> int:
        """Resident bytes now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


DaemonFactory = Callable[..., DaemonProcess]


@contextmanager
def factory() -> Iterator[DaemonFactory]:
    """A daemon factory; what it made ends with the block."""
    made: list[DaemonProcess] = []
    # Not tmp_path: a socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kvd-") as top:

        def make(*, server: str = "", store: str = "", tcp: bool = False, start: bool = True) -> DaemonProcess:
            directory = Path(top) / str(len(made))
            directory.mkdir()
            address = f"unix:{directory}/k.sock"
            if tcp:
                address += f",tcp:127.0.0.1:{free_port()}"
                server += "\ninsecure_tcp = true"
            config = directory / "kvstored.toml"
            config.write_text(
                f'[server]\naddress = "{address}"\ndata_dir = "{directory}/data"\n'
                f"{STEADY}\n{server}\n[store]\n{store}\n"
            )
            daemon = DaemonProcess(directory, address, config)
            made.append(daemon)
            if start:
                daemon.start()
            return daemon

        try:
            yield make
        finally:
            for daemon in made:
                daemon.kill()


@pytest.fixture
def daemon_factory() -> Iterator[DaemonFactory]:
    """Makes daemons: `daemon_factory(server="silence_s = 1", store="ttl_s = 60", tcp=True, start=False)`."""
    with factory() as make:
        yield make


@pytest.fixture
def daemon(daemon_factory: DaemonFactory) -> DaemonProcess:
    """One daemon with default settings, up; the test may end it."""
    return daemon_factory()


@pytest.fixture(scope="session")
def _shared() -> Iterator[DaemonProcess]:
    with factory() as make:
        yield make(tcp=True)


@pytest.fixture
def shared_daemon(_shared: DaemonProcess) -> DaemonProcess:
    """One daemon for all tests that leave it running and put what they get; on a unix socket and on TCP."""
    return _shared


def free_port() -> int:
    """A TCP port on the loopback that was free a moment ago.

    From below the range that the kernel gives to outgoing connections: one of those could take it meanwhile.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], object], sentence: str = "did not happen", timeout_s: float = START_S) -> None:
    """Return once the condition holds. The bound is for what never happens: it says nothing about how long it takes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{sentence} within {timeout_s} s"
        time.sleep(0.01)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: a process that gets it last ends alone with it."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def pytest_sessionstart() -> None:
    """A process of pytest-xdist ignores SIGINT, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in words, as the log's last lines, what was not tested and why: a skip among 1,800 dots is seen by nobody."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not tested on this machine")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count} test{'s' * (count > 1)}: {reason}")
