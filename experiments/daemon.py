"""A daemon process over a directory, for a run of experiments or the demo, and the environment of its clients.

The directory has `kvstored.toml`; socket, data and log are written beside it. Not thread-safe.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import ExperimentFailed
from kvstore.errors import KvstoreError
from kvstored_client import Client

START_S = STOP_S = 120.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a run from outside."""
PACKAGES = ("kvstore", "kvstored", "kvstored_client", "experiments")


@contextlib.contextmanager
def child(command: Sequence[str], number: signal.Signals, **how: Any) -> "Iterator[subprocess.Popen[Any]]":
    """A process until the block ends; then it gets this signal, and SIGKILL where it does not end within STOP_S.

    A signal to this process that comes while the child starts is answered once it can be ended: else Ctrl-C in that
    moment leaves it behind. how: as subprocess.Popen has it.
    """
    came: list[int] = []
    process: subprocess.Popen[Any] | None = None
    ours = SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {x: signal.signal(x, lambda got, _frame: came.append(got)) for x in ours}
    try:
        try:
            process = subprocess.Popen(command, **how)
        finally:
            for x, handler in before.items():
                signal.signal(x, handler)
        for got in came:
            signal.raise_signal(got)
        yield process
    finally:
        if process is not None:
            process.send_signal(number)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def daemon(home: Path) -> Iterator[str]:
    """A daemon over `home` until the block ends; then SIGTERM, which writes everything to disk. Yields its address."""
    address, log = f"unix:{home / 'kvstored.sock'}", home / "daemon.log"
    command = [sys.executable, "-m", "kvstored", "serve", "--config", str(home / "kvstored.toml")]
    command += ["--data-dir", str(home / "data"), "--address", address]
    with (
        log.open("a") as errors,
        child(command, signal.SIGTERM, stdout=errors, stderr=errors, env=environment()) as process,
    ):
        _wait_until_ready(process, address, log)
        yield address


def _wait_until_ready(process: "subprocess.Popen[Any]", address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with Client(address, timeout_s=1, on_error="raise") as client:
                client.stats()
        except KvstoreError:
            time.sleep(0.1)
        else:
            return
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise ExperimentFailed(f"the daemon did not start: {said[-1] if said else 'it said nothing'}")


def environment(wheels: Sequence[Path] = ()) -> dict[str, str]:
    """This process's, with this distribution and an engine's wheels on the path, and no settings of another daemon.

    OMP_WAIT_POLICY: torch's threads otherwise spin while they wait, which on shared cores takes longer than the work: a
    prefill of 8 s took 30.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
    path = [*wheels, *dict.fromkeys(_home(package) for package in PACKAGES)]
    outer = kept.get("PYTHONPATH")
    joined = os.pathsep.join([*map(str, path), *([outer] if outer else [])])
    return kept | {"PYTHONPATH": joined, "OMP_WAIT_POLICY": "PASSIVE"}


def _home(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]
