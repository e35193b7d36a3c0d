"""The long night: eight clients, three tenants, faults all the time, and each value checked.

    python bench/soak.py --minutes 60 --json
    python bench/soak.py --minutes 5

Clients are processes; half of them use the lease socket with shared memory, half TLS. The daemon is killed with -9
once a minute in the first four fifths of the time, and in all of it clients are killed, both are stopped, descriptors
and disk run out, the disk fails, the clock steps, tokens and certificates change, memory is short. In the last fifth
the daemon lives on, so that what grows slowly is seen.

Exit status 1 where a promise is broken: a wrong value, one that was deleted or replaced and came back, a call or a
worker that did not end, an error of another kind than a daemon in trouble has, a daemon or a client that died by
itself, a daemon that did not serve half a minute after the last fault, something that grows. Then the directory of the
run is kept, with the log of each process and the file `found` with a line for each finding.
"""

import argparse
import heapq
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("bench", ".", "daemon", "client")]

from soaking.crew import WORKERS, Bounds, Crew  # noqa: E402 - after the path
from soaking.daemon import PROBE, TENANTS, Daemon, Sample, growth, sample  # noqa: E402
from soaking.faults import FAULTS, Scene, dismiss_clients  # noqa: E402
from soaking.ledger import Ledger, durable_line, now  # noqa: E402
from soaking.probe import Probe  # noqa: E402

TICK_S = 0.25
START_S = 20.0
REFUSED = 2
"""The exit code of a daemon that cannot start with what it was given."""
DISK_FAULTS = {"full_disk", "failing_disk"}
SAMPLE_S = 2.0
FIRST_START_S = 240.0
"""For the first start and for the last end of a daemon, on a machine that does other things as well."""
SERVES_S = 30.0
"""After the last fault that may keep it from serving: the longest pause of a client's breaker, twice."""
TAIL = 0.2
"""The share of the time, at its end, in which the daemon lives on."""
FLAT_FROM_S = 400.0
"""A tail so long is judged for growth; a shorter one is still filling budgets and pools."""
GROWN_MAX = {"rss": 64 << 20, "descriptors": 8, "threads": 8, "segments": 4, "heap": 100_000}
"""In the tail, between the medians of its first and last third. Memory moves within its budgets, threads by a few."""
POOLS_MAX = {"descriptors": 8, "threads": 8, "segments": 8, "rss": 256 << 20}
SPARED = (0, 1, 5, 6)
"""Workers that are not killed in the tail: two at each door, of all tenants."""
FAULT_EVERY_S = 12.0
TELL_EVERY_S = 10.0
FIRST_UID = 61_001
KINDS = ("wrong", "resurrected", "hung", "unexpected", "died", "unserved")
TOTALS = ("calls", "hits", "stored", "deleted", "in_doubt")
NOISE = ("Traceback", "maintainer duty failed", "Fatal Python error")


class Night:
    """One run."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        root = os.geteuid() == 0
        named = TENANTS if root else TENANTS[:1]
        uids = {name: FIRST_UID + n if root else os.geteuid() for n, name in enumerate(named)}
        if root:
            uids[PROBE] = 0
        self.options = options
        self.seconds: float = options.minutes * 60
        self.daemon = Daemon(directory, uids)
        self.ledger = Ledger(directory / "ledger", WORKERS, make=True)
        self.rng = random.Random(options.seed)
        self.began = now()
        clients = options.client or ["kvstored_client:Client"]
        bounds = Bounds(options.timeout_s, options.slack_s, options.end_s, options.keys)
        self.crew = Crew(self.daemon, self.ledger, options.seed, clients, bounds)
        self.scene = Scene(self.daemon, self.crew, self.ledger, self.rng, spared=())
        self.under_way: dict[str, Iterator[None]] = {}
        self.met: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.tail: list[Sample] = []
        self.kills = 0
        self.probes: list[Probe] = []
        self.told_of: set[float] = set()
        self.clear_since = now()
        self.waited_for = False
        self.recovery_s = 0.0
        self.disk_failed_at = 0.0
        self._order = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    # Time.

    def at(self, second: float, act: Callable[[], None]) -> None:
        """Do something at a second of the run."""
        heapq.heappush(self._due, (second, next(self._order), act))

    def schedule(self) -> None:
        """The kills of the daemon, evenly in the first part; the other faults one after another."""
        first_part = self.seconds * (1 - TAIL)
        for n in range(self.options.kills):
            self.at(first_part * (n + 1) / (self.options.kills + 0.5), self.kill_daemon)
        every_s = min(FAULT_EVERY_S, self.seconds / 12)
        names: list[str] = []
        second = every_s
        while second < self.seconds * 0.98:
            if not names:
                names = self.rng.sample(sorted(FAULTS), len(FAULTS))
            self.at(second, partial(self.begin, names.pop()))
            second += every_s * (0.5 + self.rng.random())
        self.at(first_part, self.begin_tail)

    def begin_tail(self) -> None:
        """From here the daemon lives on."""
        self.tail = self.samples = []
        self.scene.spared = SPARED

    def run(self) -> None:
        """Until its end."""
        self.schedule()
        self.start_daemon()
        self.probes = [Probe(self.daemon.unix, lease=True), Probe(self.daemon.tls, lease=False)]
        for probe in self.probes:
            probe.start()
        self.wait(lambda: all(probe.last_ok for probe in self.probes))
        self.crew.start()
        self.wait(lambda: bool((self.ledger.workers["calls"] > 0).all()))
        self.clear_since, self.waited_for = now(), False
        sampled = told = 0.0
        self.began = self.crew.began = now()
        while (at := now() - self.began) < self.seconds:
            while self._due and self._due[0][0] <= at:
                heapq.heappop(self._due)[2]()
            self.look()
            if at - sampled >= SAMPLE_S:
                sampled = at
                self.measure()
            if at - told >= TELL_EVERY_S:
                told = at
                self.tell(at)
            time.sleep(TICK_S)
        for name in list(self.under_way):
            self.end(name)
        self.crew.stop()
        self.stop_daemon()

    def wait(self, done: Callable[[], bool]) -> None:
        """For something that comes before the run, or after it, and is not judged."""
        until = now() + FIRST_START_S
        while not done():
            if now() > until or self.daemon.process is None or self.daemon.process.poll() is not None:
                raise SystemExit((self.daemon.directory / "daemon.log").read_text()[-2000:] or "no daemon came up")
            time.sleep(TICK_S)

    # What goes wrong.

    def begin(self, name: str) -> None:
        """A fault, and its end some seconds later."""
        fault, _, longest_s = FAULTS[name]
        if name in self.under_way:
            return
        self.met[name] += 1
        self.say("fault", f"{name} begins")
        self.under_way[name] = fault(self.scene)
        next(self.under_way[name])
        if longest_s:
            lasts = min(longest_s, self.seconds / 10) * (0.3 + 0.7 * self.rng.random())
            self.at(now() - self.began + lasts, lambda: self.end(name))
        else:
            self.end(name)

    def end(self, name: str) -> None:
        """A fault is over."""
        fault = self.under_way.pop(name, None)
        if fault is not None:
            next(fault, None)
            self.say("fault", f"{name} ends")
            if name in DISK_FAULTS:
                self.disk_failed_at = now()
            if FAULTS[name][1]:
                self.cleared()

    def kill_daemon(self) -> None:
        """Kill -9, and a new one in its place."""
        self.say("fault", "kill -9 of the daemon")
        with suppress(StopIteration):
            next(dismiss_clients(self.scene))  # so that some meet its end while they end themselves
        time.sleep(self.rng.random())
        self.daemon.kill()
        self.kills += 1
        self.start_daemon()

    def start_daemon(self) -> None:
        """A new life. Counted after the last one ended and before it begins: no call is done by a later one."""
        self.ledger.header["life"][0] += 1
        self.daemon.start()
        self.cleared()

    def cleared(self) -> None:
        """From now on the daemon has no reason not to serve, unless another fault is under way."""
        self.clear_since = now()
        self.waited_for = True

    # What is seen.

    def look(self) -> None:
        """Calls that hang, processes that died, a daemon that does not serve."""
        self.crew.watch()
        self.start_daemon_again()
        blocked = any(FAULTS[name][1] for name in self.under_way)
        for probe in self.probes:
            if probe.wrong:
                self.say("wrong", f"the probe of {probe.address}: {probe.wrong}")
                probe.wrong = ""
            if probe.late_s() > 0 and probe.began not in self.told_of:
                self.told_of.add(probe.began)
                self.daemon.signal(signal.SIGUSR1)
                self.say("hung", f"the probe of {probe.address}, see daemon.dump")
        if not blocked:
            self.serves_again()

    def start_daemon_again(self) -> None:
        """If it has ended, as systemd would. A disk that fails may keep it from starting: that is not its fault."""
        process = self.daemon.process
        assert process is not None
        if process.poll() is not None:
            refused = process.returncode == REFUSED and not self.disk_was_well()
            self.say("fault" if refused else "died", f"the daemon ended with {process.returncode}, see daemon.log")
            self.start_daemon()

    def disk_was_well(self) -> bool:
        """Whether no fault of the disk's has been under way for some seconds, in which a start may have met it."""
        last = max(self.disk_failed_at, now() if DISK_FAULTS & self.under_way.keys() else 0.0)
        return now() - last > START_S

    def serves_again(self) -> None:
        """Each door, within the time that a run gives it after the last fault."""
        if not self.waited_for:
            return
        last = min(probe.last_ok for probe in self.probes) if self.probes else 0.0
        waited = (last if last > self.clear_since else now()) - self.clear_since
        if last > self.clear_since:
            self.waited_for = False
            self.recovery_s = max(self.recovery_s, waited)
        elif waited > self.options.serves_s:
            self.waited_for = False
            self.daemon.signal(signal.SIGUSR1)
            errors = "; ".join(f"{probe.address}: {probe.error}" for probe in self.probes)
            self.say("unserved", f"no answer {waited:.0f} s after the last fault: {errors}; see daemon.dump")

    def measure(self) -> None:
        """The daemon's figures, and the workers'."""
        if self.daemon.process is None or self.waited_for:
            return  # it may not have its handlers yet
        if "stop_daemon" not in self.under_way:
            self.daemon.ask_for_blocks()
        found = sample(self.daemon.pid, self.daemon.blocks)
        if found is not None:
            self.samples.append(found)
        self.crew.sample()

    def tell(self, at: float) -> None:
        """A line of progress."""
        workers = self.ledger.workers
        found = self.found()
        last = self.samples[-1] if self.samples else None
        told = f"rss={last.rss >> 20}MiB fds={last.descriptors} threads={last.threads}" if last else ""
        line = (
            f"soak {at / 60:5.1f} min life={self.ledger.life} "
            + "".join(f"{name}={workers[name].sum()} " for name in TOTALS)
            + f"client_kills={self.crew.kills} ends={self.crew.dismissed} {told} "
            + f"faults={','.join(self.under_way) or '-'} "
            + " ".join(f"{kind}={found[kind]}" for kind in KINDS)
        )
        sys.stderr.write(line + "\n")

    def say(self, what: str, text: str) -> None:
        """A line of the supervisor's in the run's file."""
        line = {"what": what, "at_s": round(now() - self.began, 2), "worker": None, "verb": "", "key": -1,
                "life": self.ledger.life, "text": text}  # fmt: skip
        durable_line(self.crew.found, json.dumps(line))

    def lines(self) -> list[dict[str, Any]]:
        """All findings so far."""
        return [json.loads(line) for line in self.crew.found.read_text().splitlines()]

    def found(self) -> Counter[str]:
        """How many of each kind."""
        return Counter(line["what"] for line in self.lines())

    # The end.

    def stop_daemon(self) -> None:
        """In order: it has to end, too. A disk that failed last may have kept it from starting: then once more."""

        def serves() -> bool:
            self.start_daemon_again()
            return min(probe.last_ok for probe in self.probes) > self.clear_since

        self.wait(serves)
        for probe in self.probes:
            probe.stop()
        self.daemon.signal(signal.SIGTERM)
        assert self.daemon.process is not None
        try:
            code = self.daemon.process.wait(FIRST_START_S)
            if code:
                self.say("died", f"the daemon ended with {code} when it was asked to end, see daemon.log")
        except Exception:  # noqa: BLE001 - subprocess.TimeoutExpired
            self.daemon.signal(signal.SIGUSR1)
            time.sleep(1)
            self.say("hung", f"the daemon did not end within {FIRST_START_S:.0f} s, see daemon.dump")

    def clean_up(self) -> None:
        """Whatever still runs ends, and nothing stays mounted."""
        for name in list(self.under_way):
            with suppress(Exception):
                self.end(name)
        self.crew.end()
        if self.daemon.process is not None and self.daemon.process.poll() is None:
            self.daemon.kill()
        self.daemon.unmount()

    def broken(self) -> list[str]:
        """The promises that were broken, with where and when."""
        seed = self.options.seed
        said = [
            f"{line['what']} (seed {seed}, second {line['at_s']}, worker {line['worker']}, life {line['life']}, "
            f"{line['verb']}, key {line['key']}): {line['text']}"
            for line in self.lines()
            if line["what"] in KINDS
        ]
        log = (self.daemon.directory / "daemon.log").read_text(errors="replace")
        said += [f"noise: daemon.log has {log.count(word)} times {word!r}" for word in NOISE if word in log]
        if self.tail and self.tail[-1].at_s - self.tail[0].at_s >= FLAT_FROM_S:
            # A worker's memory is mostly the daemon's, as far as it has mapped and read it by now.
            bounds = [("the daemon", growth(self.tail), GROWN_MAX), ("a worker", self.workers_grown(), POOLS_MAX)]
            said += [
                f"growth: {name} of {whose} by {grown[name]} within the daemon's last life, at most {most}"
                for whose, grown, bound in bounds
                for name, most in bound.items()
                if grown[name] > most
            ]
        return said

    def workers_grown(self) -> dict[str, int]:
        """The most by which a worker has grown that was not killed in the tail."""
        begin = self.tail[0].at_s if self.tail else 0.0
        grown = [growth(s for s in self.crew.hands[n].samples if s.at_s >= begin) for n in SPARED]
        return {name: max(one[name] for one in grown) for name in Sample._fields[1:]}


def report(night: Night, *, as_json: bool) -> None:
    """One JSON object a line, or a table."""
    found, grown, workers = night.found(), growth(night.tail), night.workers_grown()
    params = {"minutes": night.options.minutes, "kills": night.kills}
    rows: list[tuple[str, float, str]] = [(kind, found[kind], "count") for kind in KINDS]
    units = {"rss": "bytes", "heap": "blocks"}
    rows += [(f"{name}_growth", value, units.get(name, "count")) for name, value in grown.items()]
    rows += [(f"worker_{name}_growth", value, units.get(name, "count")) for name, value in workers.items()]
    rows += [("recovery_s", round(night.recovery_s, 2), "s")]
    rows += [(name, int(night.ledger.workers[name].sum()), "count") for name in TOTALS]
    for name, value, unit in rows:
        line = {"name": name, "params": params, "value": value, "unit": unit, "ratios": {}}
        print(json.dumps(line) if as_json else f"{name:28} {value:>14} {unit}", flush=True)
    if not as_json:
        last = night.tail[-1] if night.tail else None
        print(f"clients killed: {night.crew.kills}, told to end: {night.crew.dismissed}")
        print(f"faults: {dict(night.met)}; at the end: {last}")
        print("errors met: " + "; ".join(f"{e['worker']}: {e['text']}" for e in night.lines() if e["what"] == "errors"))


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kills", type=int, help="of the daemon; one a minute by default")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--client", action="append", metavar="MODULE:NAME", help="not the client; several: in turn")
    parser.add_argument("--timeout-s", type=float, default=Bounds.timeout_s, help="of each client")
    parser.add_argument("--slack-s", type=float, default=Bounds.slack_s, help="before a call counts as hung")
    parser.add_argument("--end-s", type=float, default=Bounds.end_s, help="for a worker that is told to end")
    parser.add_argument("--serves-s", type=float, default=SERVES_S, help="until the daemon serves after the last fault")
    parser.add_argument("--keys", type=int, default=Bounds.plain, help="of each worker, for plain values")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--keep", type=Path, help="the directory of the run, kept in any case")
    options = parser.parse_args()
    if options.kills is None:
        options.kills = max(int(options.minutes * (1 - TAIL)), 1)
    # An end in order for whoever stops it: nothing stays mounted, no process stays behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    directory = options.keep or Path(tempfile.mkdtemp(prefix="kvs-"))
    directory.mkdir(exist_ok=True)
    night = Night(options, directory)
    os.environ["KVSTORED_TOKEN_FILE"] = str(night.daemon.token_file(PROBE))
    os.environ["KVSTORED_TLS_CA"] = str(night.daemon.authority.ca)
    told = f"minutes={options.minutes} kills={options.kills} directory={directory}"
    sys.stderr.write(f"soak seed={options.seed} {told}\n")
    broken = ["it did not come to its end"]
    try:
        night.run()
        broken = night.broken()
        report(night, as_json=options.json)
    finally:
        night.clean_up()
        for line in broken:
            sys.stderr.write(line + "\n")
        if broken:
            sys.stderr.write(f"kept: {directory}\n")
        elif options.keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
