"""Two tenants: how long the one waits for its gets while the other, or a stranger, does its worst.

    python bench/abuse.py --json
    python bench/abuse.py --seconds 10 --attack silent_calls --attack watches

A daemon with tokens on a unix socket and on TCP, under a limit of descriptors; the victim gets one entry over gRPC and
over the lease socket. For each attack: its p99 before and during, and its errors. Exit status 1 where a p99 is over
five times the quiet one (of at least QUIET_MIN_S) or where the victim saw any error. To add an attack write a function
of (Target) that is a context, and name it in ATTACKS.
"""

import argparse
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]

from kvstored.access.tokens import digest, make_token  # noqa: E402 - after the path
from kvstored_client import Client  # noqa: E402

DESCRIPTORS = 1024
"""A usual limit outside of the unit."""
QUIET_MIN_S = 0.002
"""A quiet p99 under this is taken for this: five times a fifth of a millisecond is one turn of the scheduler."""
TIMES_MAX = 5.0
CONNECTIONS, STREAMS = 3, 110
START_S = 120.0
KEY = b"the victim's"


@dataclass
class Target:
    """The daemon under attack. tokens: by name."""

    directory: Path
    port: int
    tokens: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def reload(self, *names: str) -> None:
        """Leave only these callers in the tokens file."""
        text = ""
        for name in names:
            who = f'[[token]]\nname = "{name}"\nsha256 = "{digest(self.tokens[name])}"\ntenant = "{name}"\n'
            text += who + 'rights = ["read", "write"]\n'
            text += f"uid = {os.geteuid()}\n" if name == "victim" else ""
        (self.directory / "tokens.toml").write_text(text)
        if self.process is not None:
            self.process.send_signal(signal.SIGHUP)


class HalfOpen:
    """One HTTP/2 connection with calls whose messages do not come, or are empty."""

    def __init__(self, target: Target, token: str = "") -> None:
        self.sock = socket.create_connection(("127.0.0.1", target.port), 10)
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._h2.initiate_connection()
        self._token = token
        self._closed = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._answer_pings, daemon=True).start()

    def call(self, path: str, message: bytes | None = None) -> None:
        """Begin a call; its message follows where there is one."""
        head = [(":method", "POST"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        head += [("content-type", "application/grpc"), ("te", "trailers")]
        head += [("authorization", f"Bearer {self._token}")] if self._token else []
        with self._lock, suppress(OSError, h2.exceptions.ProtocolError):
            stream = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream, head)
            if message is not None:
                self._h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
            self.sock.sendall(self._h2.data_to_send())

    def _answer_pings(self) -> None:
        with suppress(OSError, h2.exceptions.ProtocolError):
            while data := self.sock.recv(1 << 16):
                with self._lock:
                    self._h2.receive_data(data)
                    self.sock.sendall(self._h2.data_to_send())

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


@contextmanager
def _repeated(turn: Callable[[], None], pause_s: float) -> Iterator[None]:
    """Do it again and again meanwhile."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            turn()
            over.wait(pause_s)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _half_open(target: Target, path: str, token: str = "", message: bytes | None = None) -> Iterator[None]:
    peers = [HalfOpen(target, token) for _ in range(CONNECTIONS)]

    def turn() -> None:
        for peer in peers:
            for _ in range(STREAMS):
                peer.call(path, message)

    try:
        with _repeated(turn, 1.0):
            yield
    finally:
        for peer in peers:
            peer.close()


def silent_calls(target: Target) -> Any:
    """Calls without a token whose messages never come."""
    return _half_open(target, "/kvstored.v1.Cache/Match")


def silent_tenant(target: Target) -> Any:
    """The same by a tenant that may call."""
    return _half_open(target, "/kvstored.v1.Cache/Match", target.tokens["attacker"])


def watches(target: Target) -> Any:
    """Health watches without a token."""
    return _half_open(target, "/grpc.health.v1.Health/Watch", message=b"")


@contextmanager
def connection_flood(target: Target) -> Iterator[None]:
    """More connections than the daemon has descriptors, that say nothing."""
    peers: list[socket.socket] = []

    def turn() -> None:
        while peers and len(peers) > DESCRIPTORS:
            peers.pop(0).close()
        for _ in range(DESCRIPTORS // 4):
            with suppress(OSError):
                peers.append(socket.create_connection(("127.0.0.1", target.port), 1))

    try:
        with _repeated(turn, 0.5):
            yield
    finally:
        for peer in peers:
            peer.close()


@contextmanager
def revoked_caller(target: Target) -> Iterator[None]:
    """Tokens that come and go, with calls by the caller that has gone."""
    there = [True]

    def turn() -> None:
        there[0] = not there[0]
        target.reload("victim", *(["attacker"] if there[0] else []))

    with silent_tenant(target), _repeated(turn, 1.0):
        yield


ATTACKS: tuple[Callable[[Target], Any], ...] = (
    silent_calls, silent_tenant, watches, connection_flood, revoked_caller,
)  # fmt: skip


def measure(client: Client, seconds: float) -> tuple[list[float], int]:
    """(seconds of each get, errors) of the victim; a miss is an error too, for the entry is held."""
    times, errors = [], 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        try:
            errors += client.get(KEY) is None
        except Exception:  # noqa: BLE001 - counted
            errors += 1
        times.append(time.perf_counter() - began)
        time.sleep(0.002)
    return times, errors


def p99(times: list[float]) -> float:
    """Of a hundred, all but the slowest."""
    return statistics.quantiles(times, n=100)[98]


@contextmanager
def running() -> Iterator[Target]:
    """A daemon for two tenants."""
    with tempfile.TemporaryDirectory(prefix="kva-") as top:
        directory = Path(top)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = directory / "kvstored.toml"
        where = f"unix:{top}/k.sock,tcp:127.0.0.1:{port}"
        config.write_text(
            f'[server]\naddress = "{where}"\ndata_dir = "{top}/data"\ntokens = "{top}/tokens.toml"\n'
            "token_on_unix = true\npressure_percent = 0\n[store.hot]\ncapacity_nbytes = '256MiB'\n"
        )
        path = os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
        target = Target(directory, port, {name: make_token() for name in ("victim", "attacker")})
        (directory / "victim.token").write_text(target.tokens["victim"])
        target.reload("victim", "attacker")
        with (directory / "log").open("wb") as log:
            started = target.process = subprocess.Popen(
                [sys.executable, "-m", "kvstored", "serve", "--config", str(config)],
                env={**kept, "PYTHONPATH": path}, stdout=log, stderr=log,
            )  # fmt: skip
        resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        try:
            yield target
        finally:
            started.kill()
            started.wait()


def under_attack(target: Target, attack: Callable[[Target], Any], seconds: float) -> dict[str, Any]:
    """One attack: the victim over both doors, before and during."""
    found: dict[str, Any] = {"attack": attack.__name__, "errors": 0, "times": 0.0}
    for door in ("lease", "stream"):
        options: dict[str, Any] = {"on_error": "raise", "framework": "numpy", "shared_memory": door == "lease"}
        with Client(f"unix:{target.directory}/k.sock", **options) as client:
            client.put(KEY, {"x": np.zeros(64 << 10, np.uint8)}, fidelity="exact")
            quiet, _ = measure(client, seconds)
            with attack(target):
                time.sleep(min(1.0, seconds))
                loud, errors = measure(client, seconds)
                with Client(f"unix:{target.directory}/k.sock", **options) as newcomer:
                    late, more = measure(newcomer, min(1.0, seconds))
        times = p99(loud + late) / max(p99(quiet), QUIET_MIN_S)
        found[door] = {"quiet_p99_ms": p99(quiet) * 1e3, "p99_ms": p99(loud + late) * 1e3, "gets": len(loud + late)}
        found["errors"] += errors + more
        found["times"] = max(found["times"], times)
    found["held"] = found["errors"] == 0 and found["times"] <= TIMES_MAX
    return found


def main() -> int:
    """Run the attacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--attack", action="append", choices=[attack.__name__ for attack in ATTACKS])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = [attack for attack in ATTACKS if not options.attack or attack.__name__ in options.attack]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * DESCRIPTORS), hard))
    with ExitStack() as stack:
        target = stack.enter_context(running())
        os.environ["KVSTORED_TOKEN_FILE"] = str(target.directory / "victim.token")
        until = time.monotonic() + START_S
        while not (target.directory / "k.sock.lease").exists():
            if time.monotonic() > until:
                raise SystemExit((target.directory / "log").read_text())
            time.sleep(0.05)
        found = [under_attack(target, attack, options.seconds) for attack in wanted]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(json.dumps({"seconds": options.seconds, "attacks": found}, indent=None if options.json else 2))
    return 0 if all(one["held"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
