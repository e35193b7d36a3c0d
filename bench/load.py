"""Many clients at once: errors other than RESOURCE_EXHAUSTED, latencies, and whether the daemon's memory stays put.

    python bench/load.py --clients 64 --streams 8 --seconds 600
    python bench/load.py --clients 8 --streams 4 --seconds 8 --json

Clients are processes, streams their threads; each puts and gets values of 64 KiB to --largest-mib, sizes spread evenly
over their logarithm. Exit status 1 where a promise is broken: an error of another kind, resident memory over the sum of
the budgets by more than a quarter, threads or descriptors that grow while the load is the same or that stay when the
clients have left. The clients take some 150 MiB each.
"""

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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
FLAT_FROM_S = 50.0
"""A run so long has pools that have grown to their size; a shorter one is only judged by what is left afterwards."""
GROWN_MAX = 4
LEFT_MAX = 12
"""Threads and descriptors that gRPC may keep for a while; a leak of one for each of 64 clients is over it."""
START_S = 120.0
"""A busy machine takes its time to start a hundred interpreters."""


class Sample(NamedTuple):
    """The daemon at one moment."""

    at_s: float
    rss_nbytes: int
    threads: int
    descriptors: int


def client_process(
    address: str, seed: int, streams: int, seconds: float, largest: int, together: Any, out: Any
) -> None:
    """One client; sends (errors, latencies by verb)."""
    from kvstore.errors import OverQuota
    from kvstored_client import Client

    os.nice(10)  # 64 processes would starve anything else: the daemon, and whoever shares the machine
    errors: Counter[str] = Counter()
    latencies: dict[str, list[float]] = {"put": [], "get": []}
    # One for all streams: 512 of their own would be 8 GiB, and the kernel would end somebody.
    data = np.frombuffer(random.Random(seed).randbytes(largest), np.uint8)
    together.wait(10 * START_S)
    end = time.monotonic() + seconds
    with Client(address, timeout_s=120, on_error="raise", framework="numpy") as client:

        def stream(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            while time.monotonic() < end:
                key = b"%d" % rng.randrange(KEYS)
                verb = rng.choice(("put", "get", "get"))
                began = time.monotonic()
                try:
                    if verb == "put":
                        n = int((64 << 10) * (largest / (64 << 10)) ** rng.random())
                        at = rng.randrange(largest - n + 1)
                        client.put(key, {"x": data[at : at + n]}, fidelity=rng.choice(("auto", "exact")))
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
    spawn = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="kvl-") as top:
        daemon, address = start_daemon(Path(top))
        try:
            warm_up(address)
            before = sample(daemon.pid)
            out: Any = spawn.Queue()
            together = spawn.Barrier(clients + 1)
            given = (streams, seconds, largest_mib * MIB, together, out)
            workers = [spawn.Process(target=client_process, args=(address, i, *given)) for i in range(clients)]
            for worker in workers:
                worker.start()
            together.wait(START_S + 2 * clients)
            samples, results = watch(daemon, workers, out, seconds)
            left = settled(daemon.pid, before)
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(120)
        finally:
            daemon.kill()
        log = (Path(top) / "log").read_text()
    broken = judge(results, samples, before, log)
    if len(results) < clients:
        broken.append(f"{clients - len(results)} clients ended without a word, the daemon with {code}")
    elif code != 0:
        broken.append(f"the daemon ended with {code}")
    broken += [f"{name}: {n} more after the last client left" for name, n in left.items() if n > LEFT_MAX]
    return {**figures(results, samples, before), "left": left, "broken": broken}


def warm_up(address: str) -> None:
    """Have the daemon make the threads that it keeps: what comes on top of them belongs to clients."""
    from kvstored_client import Client

    with Client(address, timeout_s=60, on_error="raise", framework="numpy", shared_memory=False) as client:

        def work() -> None:
            for i in range(50):
                client.put(b"warm %d" % i, {"x": np.zeros(1000, np.uint8)})
                client.get(b"warm %d" % i)

        threads = [threading.Thread(target=work) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def watch(daemon: Any, workers: list[Any], out: Any, seconds: float) -> tuple[list[Sample], list[Any]]:
    """Samples of the daemon until all clients have told what they met, or one of them or the daemon is gone."""
    samples: list[Sample] = []
    results: list[tuple[Counter[str], dict[str, list[float]]]] = []
    end = time.monotonic() + seconds + START_S
    while len(results) < len(workers) and time.monotonic() < end and daemon.poll() is None:
        samples.append(sample(daemon.pid))
        time.sleep(0.25)
        while not out.empty():
            results.append(out.get())
        if any(worker.exitcode for worker in workers):
            break
    for worker in workers:
        worker.join(START_S if len(results) == len(workers) else 0)
        worker.kill()
    return samples, results


def settled(pid: int, before: Sample) -> dict[str, int]:
    """What is more than before, once it has stopped falling: threads of gRPC's pools end after twenty idle seconds."""
    end = time.monotonic() + START_S
    while True:
        now = sample(pid)
        left = {"threads": now.threads - before.threads, "descriptors": now.descriptors - before.descriptors}
        if max(left.values()) <= LEFT_MAX or time.monotonic() > end:
            return left
        time.sleep(0.5)


def sample(pid: int) -> Sample:
    """The daemon just now."""
    process = psutil.Process(pid)
    return Sample(time.monotonic(), process.memory_info().rss, process.num_threads(), descriptors(pid))


def descriptors(pid: int) -> int:
    """Open ones, but for the cold tier's segment files: they grow with it, to one for each 64 MiB of its budget."""
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            count += "/data/cold/" not in str(link.readlink())
    return count


def figures(results: list[Any], samples: list[Sample], before: Sample) -> dict[str, Any]:
    """What was measured."""
    errors = sum((errors for errors, _ in results), Counter())
    found: dict[str, Any] = {
        "errors": dict(errors),
        "rss_peak_nbytes": max(s.rss_nbytes for s in samples),
        "rss_limit_nbytes": limit_nbytes(before),
        "threads": max(s.threads for s in samples),
        "descriptors": max(s.descriptors for s in samples),
        "grown": grown(samples),
    }
    for verb in ("put", "get"):
        times = sorted(t for _, latencies in results for t in latencies[verb])
        if times:
            found[verb] = {"calls": len(times)} | {
                f"p{p}_ms": round(1000 * times[min(len(times) - 1, int(len(times) * p / 100))], 1) for p in (50, 99)
            }
    return found


def limit_nbytes(before: Sample) -> int:
    """What the process has at start, all budgets, and a quarter."""
    return int((before.rss_nbytes + sum(BUDGETS.values()) + SHARED_NBYTES) * SLACK)


def grown(samples: list[Sample]) -> dict[str, int]:
    """By how much the last quarter of the time is above the quarter before it."""
    begin, end = samples[0].at_s, samples[-1].at_s
    half = begin + (end - begin) / 2
    third, fourth = ([s for s in samples if a < (s.at_s - half) / (end - half) <= a + 0.5] for a in (0.0, 0.5))
    if not third or not fourth:
        return {"rss_nbytes": 0, "threads": 0, "descriptors": 0}
    return {
        name: int(statistics.median(getattr(s, name) for s in fourth))
        - int(statistics.median(getattr(s, name) for s in third))
        for name in ("rss_nbytes", "threads", "descriptors")
    }


def judge(results: list[Any], samples: list[Sample], before: Sample, log: str) -> list[str]:
    """What was promised and not kept."""
    errors = sum((errors for errors, _ in results), Counter())
    others = {name: n for name, n in errors.items() if name != "RESOURCE_EXHAUSTED"}
    broken = [f"errors of another kind: {others}"] if others else []
    peak, limit = max(s.rss_nbytes for s in samples), limit_nbytes(before)
    if peak > limit:
        broken.append(f"resident memory {peak >> 20} MiB, the limit is {limit >> 20} MiB")
    if samples[-1].at_s - samples[0].at_s >= FLAT_FROM_S:
        more = grown(samples)
        broken += [f"{name} grew by {more[name]}" for name in ("threads", "descriptors") if more[name] > GROWN_MAX]
    if "Traceback" in log or "maintainer duty failed" in log:
        broken.append(f"the log has errors: {log[-2000:]}")
    return broken


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
