"""Many clients at once: errors other than RESOURCE_EXHAUSTED, latencies, and whether the daemon's memory stays put.

    python bench/load.py --clients 64 --streams 8 --seconds 600
    python bench/load.py --clients 8 --streams 4 --seconds 8 --json

Clients are processes, streams their threads; each puts and gets values of 64 KiB to --largest-mib, sizes spread evenly
over their logarithm. Exit status 1 where a promise is broken: an error of another kind, resident memory over the sum of
the budgets by more than a quarter, threads or descriptors that grew between the middle and the end.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
BUDGETS = {"hot": 192 * MIB, "warm": 96 * MIB, "write_buffer": 32 * MIB, "in_flight": 256 * MIB}
SHARED_NBYTES = 64 * MIB + BUDGETS["in_flight"]
"""Beside the hot tier: room for leases and holes, and the segments clients fill for puts (what may be in flight)."""
COLD_NBYTES = 512 * MIB
SLACK = 1.25
KEYS = 400
SETTLE = 0.5
"""Threads and descriptors are compared between this part of the time and its end: pools have grown by then."""


def client_process(address: str, seed: int, streams: int, seconds: float, largest: int, out: Any) -> None:
    """One client; sends (errors, latencies by verb)."""
    from kvstore.errors import OverQuota
    from kvstored_client import Client

    os.nice(10)  # 64 processes would starve anything else: the daemon, and whoever shares the machine
    errors: Counter[str] = Counter()
    latencies: dict[str, list[float]] = {"put": [], "get": []}
    end = time.monotonic() + seconds
    with Client(address, timeout_s=120, on_error="raise", framework="numpy") as client:

        def stream(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            data = np.frombuffer(rng.randbytes(largest), np.uint8)
            while time.monotonic() < end:
                key = b"%d" % rng.randrange(KEYS)
                verb = rng.choice(("put", "get", "get"))
                began = time.monotonic()
                try:
                    if verb == "put":
                        n = int((64 << 10) * (largest / (64 << 10)) ** rng.random())
                        client.put(key, {"x": data[:n]}, fidelity=rng.choice(("auto", "exact")))
                    else:
                        client.get(key)
                except OverQuota:
                    errors["RESOURCE_EXHAUSTED"] += 1
                    time.sleep(0.1)
                except Exception as error:  # noqa: BLE001 - any other kind is what is being looked for
                    errors[f"{type(error).__name__}: {str(error)[:120]}"] += 1
                else:
                    latencies[verb].append(time.monotonic() - began)

        threads = [threading.Thread(target=stream, args=(i,)) for i in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    out.put((errors, latencies))


def start_daemon(directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A daemon with small budgets, up."""
    from kvstored_client import Client

    address = f"unix:{directory}/k.sock"
    (directory / "k.toml").write_text(
        f'[server]\naddress = "{address}"\ndata_dir = "{directory}/data"\nin_flight_nbytes = {BUDGETS["in_flight"]}\n'
        f"[store.hot]\ncapacity_nbytes = {BUDGETS['hot']}\n[store.warm]\ncapacity_nbytes = {BUDGETS['warm']}\n"
        f"[store.cold]\ncapacity_nbytes = {COLD_NBYTES}\nwrite_buffer_nbytes = {BUDGETS['write_buffer']}\n"
    )
    log = (directory / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstored", "serve", "--config", str(directory / "k.toml")], stderr=log, stdout=log
    )
    with Client(address, timeout_s=1, on_error="raise") as probe:
        for _ in range(600):
            try:
                probe.stats()
            except Exception:  # noqa: BLE001 - not up yet
                if process.poll() is not None:
                    raise SystemExit((directory / "log").read_text()) from None
                time.sleep(0.1)
            else:
                return process, address
    raise SystemExit("the daemon did not come up")


def run(clients: int, streams: int, seconds: float, largest_mib: int) -> dict[str, Any]:
    """The measurements, and the promises broken."""
    with tempfile.TemporaryDirectory(prefix="kvl-") as top:
        daemon, address = start_daemon(Path(top))
        watched = psutil.Process(daemon.pid)
        base = watched.memory_info().rss
        out: Any = mp.get_context("spawn").Queue()
        workers = [
            mp.get_context("spawn").Process(
                target=client_process, args=(address, i, streams, seconds, largest_mib * MIB, out)
            )
            for i in range(clients)
        ]
        for worker in workers:
            worker.start()
        samples = []
        results: list[tuple[Counter[str], dict[str, list[float]]]] = []
        while len(results) < clients:
            samples.append(
                (time.monotonic(), watched.memory_info().rss, watched.num_threads(), descriptors(daemon.pid))
            )
            time.sleep(0.25)
            while not out.empty():
                results.append(out.get())
        for worker in workers:
            worker.join()
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(120)
        log = (Path(top) / "log").read_text()
    return judge(results, samples, base, code, log)


def descriptors(pid: int) -> int:
    """Open ones, but for the cold tier's segment files: they grow with it, to one for each 64 MiB of its budget."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            count += "/data/cold/" not in str(link.readlink())
    return count


def judge(results: Any, samples: list[Any], base: int, code: int, log: str) -> dict[str, Any]:
    """What was measured against what was promised."""
    errors = sum((errors for errors, _ in results), Counter())
    others = {name: n for name, n in errors.items() if name != "RESOURCE_EXHAUSTED"}
    limit = int((base + sum(BUDGETS.values()) + SHARED_NBYTES) * SLACK)
    peak = max(rss for _, rss, _, _ in samples)
    # Clients arrive and leave at different moments: the busy middle, without its edges.
    begin, end = samples[0][0], samples[-1][0]
    late = [s for s in samples if begin + SETTLE * (end - begin) < s[0] < end - 0.1 * (end - begin)]
    half = len(late) // 2
    grown = {
        name: max(s[i] for s in late[half:]) - max(s[i] for s in late[:half]) if half else 0
        for name, i in (("threads", 2), ("descriptors", 3))
    }
    found: dict[str, Any] = {"errors": dict(errors), "rss_peak_nbytes": peak, "rss_limit_nbytes": limit, "grown": grown}
    for verb in ("put", "get"):
        times = sorted(t for _, latencies in results for t in latencies[verb])
        if times:
            found[verb] = {"calls": len(times)} | {
                f"p{p}_ms": round(1000 * times[min(len(times) - 1, int(len(times) * p / 100))], 1) for p in (50, 99)
            }
    broken = [f"errors of another kind: {others}"] if others else []
    if peak > limit:
        broken.append(f"resident memory {peak >> 20} MiB, the limit is {limit >> 20} MiB")
    broken += [f"{name} grew by {n}" for name, n in grown.items() if n > 4]
    if code != 0:
        broken.append(f"the daemon ended with {code}")
    if "Traceback" in log or "maintainer duty failed" in log:
        broken.append(f"the log has errors: {log[-2000:]}")
    return {**found, "broken": broken}


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--largest-mib", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = run(options.clients, options.streams, options.seconds, options.largest_mib)
    print(json.dumps(found, indent=None if options.json else 2))
    sys.exit(bool(found["broken"]))


if __name__ == "__main__":
    main()
