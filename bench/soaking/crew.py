"""The workers of a soak, as processes: started, killed, replaced, watched for calls that do not end, told to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from soaking.daemon import TENANTS, Daemon, Sample, sample
from soaking.ledger import PLAIN, Ledger, durable_line, now

WORKERS = 8
GIVEN_UP_S = 60.0
"""A worker whose call hangs for so long is killed, so that the run goes on."""
BEGUN_CALLS = 50
"""After so many calls a worker has loaded whatever it loads late."""


@dataclass(frozen=True)
class Bounds:
    """How patient a run is.

    timeout_s: the clients'. slack_s: over its bound before a call counts as hung: all of this shares few processors.
    end_s: for a worker that was told to end. plain: keys of each worker for plain values.
    """

    timeout_s: float = 5.0
    slack_s: float = 10.0
    end_s: float = 30.0
    plain: int = PLAIN


class Hands:
    """One worker's place: which it is, and the process that has it now."""

    def __init__(self, number: int, daemon: Daemon, client: str) -> None:
        self.number = number
        self.lease = number < WORKERS // 2
        # Where all are one user, the daemon takes all of its lease connections for one tenant.
        apart = len(set(daemon.uids.values())) > 1 or not self.lease
        self.tenant = TENANTS[number % len(TENANTS)] if apart else TENANTS[0]
        self.uid = daemon.uids[self.tenant] if self.lease and apart else None
        self.client = client
        self.process: subprocess.Popen[bytes] | None = None
        self.incarnation = 0
        self.told_of = 0.0
        self.calls_before = 0
        """Of those before this process."""
        self.samples: list[Sample] = []


class Crew:
    """All of them."""

    def __init__(self, daemon: Daemon, ledger: Ledger, seed: int, clients: list[str], bounds: Bounds) -> None:
        """clients: MODULE:NAME of what each worker calls in place of the client, in turn."""
        self._daemon = daemon
        self._ledger = ledger
        self._seed = seed
        self.began = now()
        self._bounds = bounds
        self.found = daemon.directory / "found"
        self.found.touch()
        self.found.chmod(0o666)
        self.hands = [Hands(n, daemon, clients[n % len(clients)]) for n in range(WORKERS)]
        self.kills = 0
        self.dismissed = 0

    def start(self) -> None:
        """All of them."""
        for hands in self.hands:
            self._start(hands)

    def _start(self, hands: Hands) -> None:
        directory = self._daemon.directory
        mates = [other for other in self.hands if other.tenant == hands.tenant]
        dump = directory / f"worker-{hands.number}.dump"
        dump.touch()
        dump.chmod(0o666)
        place = {
            "number": hands.number, "tenant": hands.tenant, "ordinal": mates.index(hands), "seed": self._seed,
            "peers": [(other.number, i) for i, other in enumerate(mates)], "incarnation": hands.incarnation,
            "workers": WORKERS, "began": self.began, "found": str(self.found), "dump": str(dump),
            "ledger": str(directory / "ledger"), "lease": hands.lease, "client": hands.client, "uid": hands.uid,
            "address": self._daemon.unix if hands.lease else self._daemon.tls,
            "timeout_s": self._bounds.timeout_s, "plain": self._bounds.plain,
            "environment": {
                "KVSTORED_TOKEN_FILE": str(self._daemon.token_file(hands.tenant)),
                "KVSTORED_TLS_CA": str(self._daemon.authority.ca),
            },
        }  # fmt: skip
        path = directory / f"worker-{hands.number}.json"
        path.write_text(json.dumps(place))
        hands.incarnation += 1
        hands.samples = []
        row = self._ledger.workers[hands.number : hands.number + 1]
        row["began"] = row["leave"] = 0.0
        hands.calls_before = int(row["calls"][0])
        # One thread for numpy's own: eight processes share two processors.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with (directory / f"worker-{hands.number}.log").open("ab") as log:
            hands.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), str(path)],
                stdout=log, stderr=log, env=environment,
            )  # fmt: skip

    def pids(self) -> dict[int, int]:
        """Of those that run, by number."""
        return {h.number: h.process.pid for h in self.hands if h.process is not None and h.process.poll() is None}

    def at_work(self) -> dict[int, int]:
        """As `pids`, of those that have begun: all that a first call loads is loaded."""
        calls = self._ledger.workers["calls"]
        return {n: pid for n, pid in self.pids().items() if calls[n] >= self.hands[n].calls_before + BEGUN_CALLS}

    def kill(self, number: int) -> None:
        """End one at once; another takes its place."""
        hands = self.hands[number]
        assert hands.process is not None
        hands.process.kill()
        hands.process.wait()
        self.kills += 1
        self._start(hands)

    def dismiss(self, number: int) -> None:
        """Tell one to end, which it has to do in time; another takes its place."""
        if not self._ledger.workers["leave"][number]:
            self._ledger.workers["leave"][number] = now()
            self.dismissed += 1

    def watch(self, *, over: bool = False) -> None:
        """Tell of calls that do not end, and of workers that ended by themselves. over: they may end now."""
        for hands in self.hands:
            if hands.process is None:
                continue  # not started yet
            code = hands.process.poll()
            told = float(self._ledger.workers["leave"][hands.number])
            if code is not None:
                if code or not (over or told):
                    self.say("died", hands, f"ended with {code}, see worker-{hands.number}.log")
                if not over:
                    self._start(hands)
                continue
            if told and now() - told > self._bounds.end_s and not self._is_stopped(hands):
                hands.process.send_signal(signal.SIGUSR1)
                self.say(
                    "hung", hands, f"did not end within {self._bounds.end_s:.0f} s, see worker-{hands.number}.dump"
                )
                time.sleep(1)  # for the dump
                self.kill(hands.number)
            else:
                self._watch_call(hands)

    def _watch_call(self, hands: Hands) -> None:
        row = self._ledger.workers[hands.number]
        began = float(row["began"])
        stopped_s = float(row["stopped_s"] - row["stopped_then_s"])
        late_s = now() - began - stopped_s - float(row["bound_s"]) if began else 0.0
        if late_s <= self._bounds.slack_s or self._is_stopped(hands):
            return
        assert hands.process is not None
        if hands.told_of != began:
            hands.told_of = began
            with suppress(ProcessLookupError):
                hands.process.send_signal(signal.SIGUSR1)
            self.say("hung", hands, f"{row['verb'].decode()} runs {late_s:.1f} s beyond its bound of "
                                    f"{float(row['bound_s']):.1f} s, see worker-{hands.number}.dump")  # fmt: skip
        if late_s > GIVEN_UP_S:
            self.kill(hands.number)

    def _is_stopped(self, hands: Hands) -> bool:
        assert hands.process is not None
        with suppress(OSError, IndexError):
            stat = Path(f"/proc/{hands.process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "T"
        return False

    def say(self, what: str, hands: Hands, text: str) -> None:
        """A line of a worker's in the run's file."""
        row = self._ledger.workers[hands.number]
        line = {"what": what, "at_s": round(now() - self.began, 2), "worker": hands.number,
                "verb": row["verb"].decode(), "key": int(row["key"]), "life": self._ledger.life,
                "text": text}  # fmt: skip
        durable_line(self.found, json.dumps(line))

    def sample(self) -> None:
        """Where each of them is with its memory and descriptors."""
        for hands in self.hands:
            assert hands.process is not None
            found = sample(hands.process.pid)
            if found is not None:
                hands.samples.append(found)

    def stop(self) -> None:
        """Tell all to end, and of those that do not within half a minute."""
        self._ledger.header["stop"] = 1
        until = now() + self._bounds.end_s
        for hands in self.hands:
            assert hands.process is not None
            try:
                hands.process.wait(max(until - now(), 0.01))
            except subprocess.TimeoutExpired:
                hands.process.send_signal(signal.SIGUSR1)
                self.say(
                    "hung", hands, f"did not end within {self._bounds.end_s:.0f} s, see worker-{hands.number}.dump"
                )
        self.watch(over=True)

    def end(self) -> None:
        """Whatever still runs ends now."""
        for hands in self.hands:
            if hands.process is not None and hands.process.poll() is None:
                hands.process.kill()
                hands.process.wait()
