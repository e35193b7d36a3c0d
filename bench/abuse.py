"""Two tenants: how long the one waits for its gets and puts while the other, or a stranger, does its worst.

    python bench/abuse.py --json
    python bench/abuse.py --rounds 5 --attack silent_calls --attack watches

A daemon with tokens, on a unix socket, on TCP and on a metrics port, under a limit of descriptors. The victim, in this
process, gets and puts one small entry over gRPC and over the lease socket; the attackers (bench/attacks.py) are
processes of their own. Quiet time and attack take turns; of each a p99 is taken, and the medians of these are compared.
`spin` is no attack: a process that is as busy and never calls. What the victim waits longer under it is the
scheduler's share, since victim, daemon and attacker want three processors.

Exit status 1 where a p99 is over five times the quiet one (of at least QUIET_MIN_S) or where the victim saw an error: a
miss, a refusal, a newcomer that is not served, a scrape that fails. Needs root for attackers that are other users.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "daemon"), str(ROOT / "client")]

import numpy as np  # noqa: E402 - after the path

from bench.attacks import ATTACKER_UID, ATTACKS, DESCRIPTORS, Part, Target  # noqa: E402
from bench.rivals import free_port  # noqa: E402
from kvstored.access.tokens import digest, make_token  # noqa: E402
from kvstored_client import Client  # noqa: E402

QUIET_MIN_S = 0.002
"""A quiet p99 under this is taken for this: the scheduler's turns are 3 ms, so a tenth of one is luck."""
TIMES_MAX = 5.0
START_S = 120.0
KEY = b"the victim's"
SMALL_SEGMENTS = "from kvstore.shm.arena import Arena; Arena.__init__.__kwdefaults__['segment_nbytes'] = 1 << 20; "
"""An entry a segment without gigabytes of them, for the attack that needs many."""
SERVE = "import sys; from kvstored.__main__ import main; sys.exit(main())"


@dataclass
class Measured:
    """p99 of each of the victim's calls, a round each, in seconds; errors of all rounds."""

    p99_s: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    errors: list[str] = field(default_factory=list)
    attackers_cpu: list[float] = field(default_factory=list)
    daemon_cpu: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """The median of the rounds, by call."""
        return {name: statistics.median(values) for name, values in self.p99_s.items()}


class Victim:
    """One tenant's worker, over both doors."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._tensors = {"x": np.zeros(4096, np.uint8)}
        self._calls: dict[str, Callable[[], object]] = {}
        for door in ("lease", "stream"):
            client = self._client(door)
            self._calls[f"{door} put"] = partial(client.put, KEY, self._tensors)
            self._calls[f"{door} get"] = partial(_hit, client)
        for call in self._calls.values():  # connections, segments, first imports
            for _ in range(30):
                call()

    def _client(self, door: str) -> Client:
        return Client(
            f"unix:{self._target.socket_path}", on_error="raise", framework="numpy", shared_memory=door == "lease"
        )

    def measure(self, found: Measured, seconds: float) -> None:
        """A round of calls, then a newcomer's."""
        self._try(found, seconds)
        for door in ("lease", "stream"):
            with self._client(door) as newcomer:
                self._once(found, f"a newcomer, {door}", partial(_hit, newcomer))
                self._once(found, f"a pin, {door}", partial(newcomer.pin, KEY))
                self._once(found, f"an unpin, {door}", partial(newcomer.unpin, KEY))
        self._once(found, "a scrape", self._scrape)

    def _scrape(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._target.metrics_port}/metrics", timeout=10) as page:
            return bool(page.read())

    def _try(self, found: Measured, seconds: float) -> None:
        times: dict[str, list[float]] = {name: [] for name in self._calls}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name, call in self._calls.items():
                times[name].append(self._once(found, name, call))
                time.sleep(0.001)
        for name, taken in times.items():
            found.p99_s.setdefault(name, []).append(statistics.quantiles(taken, n=100)[98])
            found.calls += len(taken)

    @staticmethod
    def _once(found: Measured, name: str, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        try:
            why = "" if call() else "a miss"
        except Exception as error:  # noqa: BLE001 - counted
            why = repr(error)
        if why:
            found.errors.append(f"{name}: {why}")
        return time.perf_counter() - began


def _hit(client: Client) -> bool:
    return client.get(KEY) is not None


@contextmanager
def attacking(target: Target, parts: tuple[Part, ...]) -> Iterator[list[int]]:
    """The attackers at work; their process ids."""
    line = json.dumps(asdict(target)) + "\n"
    started: list[subprocess.Popen[str]] = []
    try:
        for part in parts:
            command = [sys.executable, str(ROOT / "bench" / "attacks.py"), part.make.__name__]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=_environment())
            started.append(process)
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"{process.args!r} did not start")
        yield [process.pid for process in started]
        for process in started:
            if process.poll() is not None:
                raise SystemExit(f"{process.args!r} ended before it was told to: its attack was none")
    finally:
        for process in started:
            process.kill()
            process.wait()


def _cpu_s(pids: list[int]) -> float:
    """Processor seconds that processes have used."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def under_attack(target: Target, victim: Victim, name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One attack: the victim's calls before and during, in turns."""
    quiet, loud = Measured(), Measured()
    for _ in range(rounds):
        victim.measure(quiet, seconds)
        with attacking(target, ATTACKS[name]) as attackers:
            time.sleep(min(1.0, seconds))
            began, used, served = time.monotonic(), _cpu_s(attackers), _cpu_s([target.pid])
            victim.measure(loud, seconds)
            wall = time.monotonic() - began
            loud.attackers_cpu.append((_cpu_s(attackers) - used) / wall)
            loud.daemon_cpu.append((_cpu_s([target.pid]) - served) / wall)
        time.sleep(0.5)
    before, during = quiet.medians(), loud.medians()
    times = {call: during[call] / max(before[call], QUIET_MIN_S) for call in before}
    return {
        "attack": name,
        "quiet_p99_ms": {call: round(value * 1e3, 2) for call, value in before.items()},
        "p99_ms": {call: round(value * 1e3, 2) for call, value in during.items()},
        "times": round(max(times.values()), 2),
        "times_unrounded_quiet": round(max(during[call] / before[call] for call in before), 2),
        "calls": loud.calls,
        "attackers_cpu": round(statistics.median(loud.attackers_cpu), 2),
        "daemon_cpu": round(statistics.median(loud.daemon_cpu), 2),
        "quiet_errors": quiet.errors,
        "errors": len(loud.errors),
        "first_errors": loud.errors[:3],
        "held": not loud.errors and max(times.values()) <= TIMES_MAX,
    }


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORED_")}
    return {**kept, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "daemon", "client"))}


def _entry(name: str, token: str, uid: int) -> str:
    head = f'[[token]]\nname = "{name}"\nsha256 = "{digest(token)}"\ntenant = "{name}"\n'
    return f'{head}rights = ["read", "write"]\nuid = {uid}\n'


def _target(directory: Path) -> Target:
    """Files for a daemon with two tenants."""
    tokens = {name: make_token() for name in ("victim", "attacker")}
    token_file = directory / "victim.token"
    token_file.touch(mode=0o600)
    token_file.write_text(tokens["victim"])
    victim = _entry("victim", tokens["victim"], os.geteuid())
    both = victim + _entry("attacker", tokens["attacker"], ATTACKER_UID)
    port, metrics_port = free_port(), free_port()
    (directory / "tokens.toml").write_text(both)
    (directory / "kvstored.toml").write_text(
        f'[server]\naddress = "unix:{directory}/k.sock,tcp:127.0.0.1:{port}"\ndata_dir = "{directory}/data"\n'
        f'tokens = "{directory}/tokens.toml"\nmetrics_address = "127.0.0.1:{metrics_port}"\n'
        "token_on_unix = true\npressure_percent = 0\n[store.hot]\ncapacity_nbytes = '256MiB'\n"
    )
    return Target(
        f"{directory}/k.sock", port, metrics_port, 0, tokens["attacker"], f"{directory}/tokens.toml", both, victim
    )


@contextmanager
def running(*, small_segments: bool) -> Iterator[Target]:
    """A daemon for two tenants."""
    with tempfile.TemporaryDirectory(prefix="kva-") as top:
        directory = Path(top)
        directory.chmod(0o750)  # other users of the group come through
        target = _target(directory)
        os.environ["KVSTORED_TOKEN_FILE"] = str(directory / "victim.token")
        code = (SMALL_SEGMENTS if small_segments else "") + SERVE
        with (directory / "log").open("wb") as log:
            started = subprocess.Popen(
                [sys.executable, "-c", code, "serve", "--config", str(directory / "kvstored.toml")],
                env=_environment(), stdout=log, stderr=log,
            )  # fmt: skip
        resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        try:
            until = time.monotonic() + START_S
            while not Path(f"{target.socket_path}.lease").exists():
                if time.monotonic() > until or started.poll() is not None:
                    raise SystemExit((directory / "log").read_text())
                time.sleep(0.05)
            yield Target(**{**asdict(target), "pid": started.pid})
        finally:
            started.kill()
            started.wait()


def main() -> int:
    """Run the attacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attack", action="append", choices=sorted(ATTACKS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * DESCRIPTORS), hard))
    found: list[dict[str, Any]] = []
    for name in options.attack or ATTACKS:
        if os.geteuid() != 0 and any(part.uid is not None for part in ATTACKS[name]):
            print(f"{name}: left out, its attacker is another user, which only root can start", file=sys.stderr)
            continue
        with ExitStack() as stack:  # a daemon each: what one attack leaves behind is not another's
            target = stack.enter_context(running(small_segments=name == "many_segments"))
            found.append(under_attack(target, Victim(target), name, options.rounds, options.seconds))
        if not options.json:
            print(json.dumps(found[-1]), flush=True)
    if options.json:
        print(json.dumps({"seconds": options.seconds, "rounds": options.rounds, "attacks": found}))
    return 0 if all(one["held"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
