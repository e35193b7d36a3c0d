"""A part of bench/shared.py: the longest turn of a Valkey server's event loop while 22 MiB chunks go in and out.

The server measures it (`INFO debug`, eventloop_duration_max), in windows of 5 ms. Only windows count in which the
kernel kept the server waiting for a core for less than 0.2 ms (/proc/PID/schedstat): elsewhere the turn is the
machine's. So the server runs before all others (SCHED_FIFO), where root runs this. `whole`: the same with values that
are not cut, through redis-py.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from bench.shared_rows import Row
from kvstore.clock import SystemClock
from kvstore.shared import SharedUnavailable
from kvstore.shared.addresses import parse_url
from kvstore.shared.link import Login
from kvstore.shared.valkey import Valkey
from tests.kvstore.shared.engines.servers import Servers

CHUNK_NBYTES = 22 << 20
SECONDS = 8.0
WINDOW_S = 0.005
WINDOWS_MIN = 50
"""Undisturbed ones: fewer say nothing."""
SECONDS_MAX = 20.0
DISTURBED_S = 0.0002
TIMEOUT_S = 20.0


def waited_s(pid: int) -> float:
    """How long a process's first thread has waited for a core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def longest_turn_ms(servers: Servers, work: list[Callable[[], Any]], seconds: float) -> tuple[float, int, int]:
    """Longest turn of an undisturbed window, how many windows were, and how many there were; while `work` is done."""
    (port,) = servers.ports
    ended = threading.Event()

    def repeat(call: Callable[[], Any]) -> None:
        while not ended.is_set():
            with suppress(SharedUnavailable):
                call()

    threads = [threading.Thread(target=repeat, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    client, pid = servers.client(port), servers.processes[port].pid
    with suppress(PermissionError):  # not a normal priority: one that is woken waits for a slice of 3 ms even with -20
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
    longest, good, windows = 0.0, 0, 0
    begun = time.monotonic()
    while (past_s := time.monotonic() - begun) < seconds or (good < WINDOWS_MIN and past_s < SECONDS_MAX):
        client.config_resetstat()
        before = waited_s(pid)
        time.sleep(WINDOW_S)
        turn_ms = client.info("debug")["eventloop_duration_max"] / 1000
        windows += 1
        if waited_s(pid) - before < DISTURBED_S:
            good, longest = good + 1, max(longest, turn_ms)
    ended.set()
    for thread in threads:
        thread.join()
    return longest, good, windows


def loop(_rounds: int = 0, *, seconds: float = SECONDS) -> Iterator[Row]:
    """`shared.loop`: a host that publishes and one that fetches chunks, sent in pieces, against whole ones."""
    servers = Servers(options=("--maxmemory", "1gb"))
    value = os.urandom(CHUNK_NBYTES)
    names = ["loop:written", "loop:read"]
    engines = [Valkey(parse_url(servers.url).seeds, Login(), SystemClock()) for _ in names]
    clients = [redis.Redis(port=servers.ports[0], socket_timeout=TIMEOUT_S) for _ in names]
    try:
        engines[0].put([(name, [value]) for name in names], 600, TIMEOUT_S)
        cut, good, windows = longest_turn_ms(
            servers,
            [
                lambda: engines[0].put([(names[0], [value])], 600, TIMEOUT_S, replace=True),
                lambda: engines[1].get([names[1]], [len(value)], TIMEOUT_S),
            ],
            seconds,
        )
        for client, name in zip(clients, names, strict=True):
            client.set(name, value)
        whole, *_ = longest_turn_ms(
            servers, [lambda: clients[0].set(names[0], value), lambda: clients[1].get(names[1])], seconds
        )
        params = {"mib": CHUNK_NBYTES >> 20, "windows": f"{good} of {windows}"}
        yield Row("shared.loop", params, cut, {"whole": whole / cut} if cut else {})
    finally:
        for each in (*engines, *clients):
            each.close()
        servers.close()
