"""A daemon process over a directory, for a run of experiments or the demo, and the environment of its clients.

The directory has `kvstored.toml`; socket, data and log are written beside it. Not thread-safe.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import ExperimentFailed
from kvstore.errors import KvstoreError
from kvstored_client import Client

START_S = STOP_S = 120.0
PACKAGES = ("kvstore", "kvstored", "kvstored_client", "experiments")


@contextlib.contextmanager
def daemon(home: Path) -> Iterator[str]:
    """A daemon over `home` until the block ends; then SIGTERM, which writes everything to disk."""
    address, log = f"unix:{home / 'kvstored.sock'}", home / "daemon.log"
    command = [sys.executable, "-m", "kvstored", "serve", "--config", str(home / "kvstored.toml")]
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, "--data-dir", str(home / "data"), "--address", address],
            stdout=errors, stderr=errors, env=environment(),
        )  # fmt: skip
    try:
        _wait_until_ready(process, address, log)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
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
