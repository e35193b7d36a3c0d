"""The shared store as a `Store` owns it: opened from its settings, with the threads that publish, fetch and refresh.

Three threads, since each may wait for a server: a publication that takes ten seconds must not keep a flush on another
host unseen for longer than two. A store opened with `background=False` has none; `run_once` is one turn of each.
"""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from kvstore.clock import Clock
from kvstore.config import SharedConfig
from kvstore.entries.sealing import Seals
from kvstore.errors import KvstoreError
from kvstore.keys import Key
from kvstore.shared import HEAD_NBYTES, Engine, Health, SharedUnavailable
from kvstore.shared.bars import Bars
from kvstore.shared.epochs import REFRESH_S, Epochs
from kvstore.shared.fetcher import Fetcher, Install
from kvstore.shared.names import PREFIX, Names, name_of, read_secret
from kvstore.shared.numbers import Numbers
from kvstore.shared.outside import Outside
from kvstore.shared.publisher import Held, Publisher

log = logging.getLogger(__name__)

TURN_S = 0.25
"""The publisher looks this often, and no put wakes it: waking a thread that wants the interpreter made a put of 1.5 MiB
1.3 times as long."""
GATHER_TURNS = 4
"""For so many turns it waits for a turn without a put: encoding and sending compete with whoever calls meanwhile."""
HEALTH_S = 5.0


def opened_engine(config: SharedConfig, clock: Clock) -> Engine:
    """The engine of an url. Its clients are imported here and nowhere else. Raises ConfigError."""
    from kvstore.shared.open import open_engine

    return open_engine(config, clock)


class Source:
    """Publisher, fetcher and threads around one engine."""

    def __init__(
        self,
        config: SharedConfig,
        *,
        engine: Engine,
        clock: Clock,
        entry_max_nbytes: int,
        directory: Path | None,
        held: Held,
        install: Install,
    ) -> None:
        """directory: where deletions that are not acknowledged survive a restart. Raises ConfigError."""
        names = Names(read_secret(config.secret_file))
        seals = Seals(config.key_files, "store.shared.key_files")
        epochs = Epochs(engine, names, clock)
        self.outside = Outside(engine, names, epochs, Bars(directory), clock, config, entry_max_nbytes, seals)
        self.publisher = Publisher(self.outside, held)
        self._fetch_wanted = threading.Event()
        self.fetcher = Fetcher(self.outside, install, self._fetch_wanted.set)
        self._health: Health | None = None
        self._health_at = 0.0
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def bars(self) -> Bars:
        """The keys deleted here."""
        return self.outside.bars

    @property
    def numbers(self) -> Numbers:
        """The counters."""
        return self.outside.numbers

    def start(self) -> None:
        """Run in the background until `close`."""
        loops: dict[str, Callable[[], None]] = {
            "publish": self._publishing, "fetch": self._fetching, "epochs": self._refreshing,
        }  # fmt: skip
        for name, loop in loops.items():
            thread = threading.Thread(target=loop, name=f"kvstore-shared-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def run_once(self) -> None:
        """One turn of all threads."""
        self._duty(self._refresh)
        self._duty(self.publisher.run_once)
        self._duty(self.fetcher.run_once)

    def close(self) -> None:
        """End the threads and the engine; what was not published by now is not. Idempotent."""
        if self._stop.is_set():
            return
        self._stop.set()
        self.publisher.awake.set()
        self._fetch_wanted.set()
        self.outside.engine.close()  # ends a call in progress
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self.bars.close()

    def flush(self, namespace: str | None) -> None:
        """Put everything, or a namespace, out of reach for all hosts. Raises SharedUnavailable."""
        tag = None if namespace is None else self.outside.names.tag(namespace)
        self.outside.epochs.raised(tag, max(2.0, self.outside.config.lookup_s))

    def check(self) -> list[str]:
        """What is wrong with the store, a sentence each: a probe is put, looked up, read and deleted."""
        out, found = self.outside, list[str]()
        name, data = name_of(out.names.alias(b"kvstored probe", out.epochs.all)), b"kvstored probe".ljust(4096, b".")
        steps: list[tuple[str, Callable[[], bool]]] = [
            ("put", lambda: out.engine.put([(name, [data])], 60.0, HEALTH_S, replace=True) == [True]),
            ("heads", lambda: out.engine.heads([name], HEALTH_S) == [data[:HEAD_NBYTES]]),
            ("get", lambda: out.engine.get([name], [len(data)], HEALTH_S) == [bytearray(data)]),
            ("delete", lambda: out.engine.delete([name], HEALTH_S) == [True]),
        ]
        for verb, step in steps:
            try:
                if not step():
                    found.append(f"{verb} of a probe of {len(data)} bytes under {PREFIX}... gave the wrong answer")
            except SharedUnavailable as error:
                found.append(f"{verb} of a probe failed: {error}")
        try:
            health = out.engine.health(HEALTH_S)
        except SharedUnavailable as error:
            return [*found, f"the servers' settings are not known: {error}"]
        if health.nodes_up < health.nodes:
            found.append(f"{health.nodes - health.nodes_up} of {health.nodes} nodes do not answer")
        return found + health.complaints

    def gauges(self) -> dict[str, float]:
        """Everything about it among a store's numbers. Asks no server."""
        health = self._health
        return {
            **self.numbers.values(),
            "shared_barred": float(len(self.bars)),
            "shared_queue_nbytes": float(self.publisher.queue_nbytes),
            "shared_breaker": float(getattr(self.outside.engine, "breaker", 0)),
            "shared_nodes": float(health.nodes if health else 0),
            "shared_nodes_up": float(health.nodes_up if health else 0),
        }

    def waits_for(self, key: Key) -> str:
        """Why a key is not in the store yet, for people; empty: nothing is known against it."""
        if key in self.bars:
            return "deleted here, which the shared store has not acknowledged"
        return "waits to be published" if self.publisher.waits(key) else ""

    def _publishing(self) -> None:
        publisher, seen, gathered = self.publisher, 0, 0
        while not self._stop.is_set():
            urgent = publisher.awake.wait(TURN_S)
            publisher.awake.clear()
            busy, seen = publisher.offers != seen, publisher.offers
            if busy and not urgent and gathered < GATHER_TURNS:
                gathered += 1
            elif not self._stop.is_set():
                self._duty(publisher.run_once)
                seen, gathered = publisher.offers, 0

    def _fetching(self) -> None:
        while not self._stop.is_set():
            self._fetch_wanted.wait()
            self._fetch_wanted.clear()
            if not self._stop.is_set():
                self._duty(self.fetcher.run_once)

    def _refreshing(self) -> None:
        while True:
            self._duty(self._refresh)
            if self._stop.wait(REFRESH_S):
                return

    def _refresh(self) -> None:
        out = self.outside
        if out.epochs.due:
            out.epochs.refresh(max(1.0, out.config.lookup_s))
        if self._health is None or out.clock.now() - self._health_at >= HEALTH_S:
            self._health_at = out.clock.now()
            self._health = out.engine.health(1.0)

    def _duty(self, duty: Callable[[], None]) -> None:
        try:
            duty()
        except SharedUnavailable as error:
            self.numbers.failed(error.reason)
        except KvstoreError as error:
            self.numbers.failed("internal")
            log.warning("shared store duty failed error=%s", error)
        except Exception:  # the boundary of the threads: one failing turn must not end the others
            self.numbers.failed("internal")
            log.exception("shared store duty failed")
