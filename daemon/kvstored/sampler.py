"""Samples the daemon while it serves: counters for the scrape, samples for the page, the pressure valve.

One thread runs a turn every few seconds; the metrics port has threads of its own. Only `Meter` is on a call's path.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import GCCollector, PlatformCollector, ProcessCollector

from kvstore.shm.arena import Arena
from kvstore.stats import Stats
from kvstore.store import Store
from kvstored.calls.budget import Budget
from kvstored.host.heap import INTERVAL_S as HEAP_INTERVAL_S
from kvstored.host.heap import Heap
from kvstored.host.pressure import INTERVAL_S as PRESSURE_INTERVAL_S
from kvstored.host.pressure import PressureValve
from kvstored.host.shared_memory import SharedMemory
from kvstored.settings import ServerSettings
from kvstored.telemetry.alarms import alarms
from kvstored.telemetry.history import INTERVAL_S, History
from kvstored.telemetry.metrics import Meter, StoreCollector
from kvstored.telemetry.metrics_port import MetricsPort

log = logging.getLogger(__name__)

STATUS_SCHEMA = 1
"""Of /status.json: goes up only where a field changes its meaning or goes away."""


class Sampler:
    """The observers of a store and its daemon. settings: those in force, for the page."""

    def __init__(self, store: Store, settings: ServerSettings, version: str, arena: Arena, encoded: Arena) -> None:
        """arena, encoded: the shared memory that the entries of hot, and of warm, lie in."""
        self._store = store
        self.settings = settings
        self._version = version
        self._started_at = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstored-watch", daemon=True)
        self._port: MetricsPort | None = None
        self.budget = Budget(settings.in_flight_nbytes)
        self.meter = Meter(version)
        self.sources: list[Callable[[], Mapping[str, float]]] = []
        self.history = History(time.monotonic)
        self._valve = PressureValve(store, settings.pressure_percent) if settings.pressure_percent else None
        # Of hot by its budget, so that room stays for the next puts; what warm has no use for is other memory's room.
        self._shared_memory = (
            SharedMemory(store, arena, lambda: store.hot_capacity_nbytes),
            SharedMemory(store, encoded, lambda: encoded.used_nbytes),
        )
        self._heap = Heap(settings.in_flight_nbytes // 2)
        registry = self.meter.registry
        registry.register(StoreCollector(self.snapshot))
        # Memory, descriptors, CPU and start time of the process; the interpreter's own.
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

    def start(self) -> None:
        """Start the thread, and the metrics port if one is set. Raises ConfigError if it cannot be bound."""
        if self.settings.metrics_address:
            address, anywhere = self.settings.metrics_address, self.settings.insecure_metrics
            self._port = MetricsPort(address, self.meter.registry, self.status, anywhere=anywhere)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the port."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._port is not None:
            self._port.close()

    def snapshot(self) -> Stats:
        """The store's stats, with the daemon's own numbers among the values."""
        found = self._store.stats()
        own = {
            "in_flight_nbytes": self.budget.used_nbytes,
            "in_flight_limit_nbytes": self.budget.limit_nbytes,
            "in_flight_refused": self.budget.refused,
            "uptime_s": time.monotonic() - self._started_at,
            "pressure_shrinks": self._valve.shrinks if self._valve is not None else 0,
            "heap_trims": self._heap.trims,
            "heap_idle_nbytes": self._heap.idle_nbytes(),
            "heartbeat_age_s": max(0.0, self._store.heartbeat_age_s()),
        }
        own |= self.meter.values()
        own["prefill_saved_s"] += found.values["prefill_saved_s"]
        for source in self.sources:
            own.update(source())
        return Stats({**found.values, **own}, found.tiers)

    def admin_stats(self) -> Stats:
        """The same with the times of each method's calls: what the command line shows."""
        found = self.snapshot()
        times: dict[str, float] = {}
        for one in self.meter.calls():
            times[f"call_mean_s_{one.method}"] = one.mean_s
            times[f"call_p99_s_{one.method}"] = one.quantile(0.99)
        return Stats({**found.values, **times}, found.tiers)

    def status(self) -> Mapping[str, Any]:
        """The numbers of the status page. docs/operations.md describes them; a field is added, none changed."""
        now = self.snapshot()
        lately, hour = (self.history.recent(now.values, within_s) for within_s in (300.0, 3600.0))
        return {
            "schema": STATUS_SCHEMA,
            "version": self._version,
            "values": dict(now.values),
            "tiers": {name: asdict(tier) for name, tier in now.tiers.items()},
            "history": self.history.series(),
            "calls": [
                {
                    "method": one.method, "mean_s": round(one.mean_s, 6), "count": one.count,
                    "p50_s": round(one.quantile(0.5), 6), "p99_s": round(one.quantile(0.99), 6),
                }
                for one in self.meter.calls()
            ],
            "alarms": [asdict(alarm) for alarm in alarms(now.values, lately, hour)],
            "addresses": self._addresses(),
            "paths": {"data_dir": self.settings.data_dir, "cold": self._store.config.cold.path or ""},
            "config": {"server": shown(self.settings), "store": shown(self._store.config)},
        }  # fmt: skip

    def _addresses(self) -> dict[str, Any]:
        listening = [part.strip() for part in self.settings.address.split(",") if part.strip()]
        return {"listening": listening, "metrics": self.settings.metrics_address}

    def _run(self) -> None:
        sampled_at = pressed_at = float("-inf")
        while True:
            try:
                if time.monotonic() - sampled_at >= INTERVAL_S:
                    sampled_at = time.monotonic()
                    self.history.take(self.snapshot())
                if time.monotonic() - pressed_at >= PRESSURE_INTERVAL_S:
                    pressed_at = time.monotonic()
                    if self._valve is not None:
                        self._valve.turn()
                    for shared_memory in self._shared_memory:
                        shared_memory.turn()
                self._heap.turn()
            except Exception:  # the boundary of the thread: one failed turn must not prevent the next
                log.exception("watch turn failed")
            if self._stopping.wait(HEAP_INTERVAL_S):
                return


def shown(settings: Any) -> dict[str, Any]:
    """Settings as plain values for JSON. They name files of secrets, and hold none."""
    return {name: _plain(value) for name, value in asdict(settings).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
