"""The metrics for Prometheus: one table of names, read from the store at each scrape.

FAMILIES is the reference: docs/operations.md and the dashboard are checked against it. Counters are the store's own
(`Store.stats`), so nothing is counted twice, and a request costs nothing more; only calls are measured here, in
`Meter`. A number that the store reports and that is not in this table appears as kvstored_other{name="..."} until it
gets a line. Thread rule: `Meter` on the event loop and on scrape threads (prometheus_client locks); `collect` on any
thread.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isinf
from typing import Literal

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PromCounter
from prometheus_client import Gauge as PromGauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.stats import ERRORS, Stats, errors_of

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric. name: as exported, `_total` included. value: the store's name for it; `{}` stands for the label."""

    name: str
    kind: Kind
    help: str
    label: str = ""
    value: str = ""


_TIER = (
    Family("kvstored_tier_entries", "gauge", "Entries held in the tier.", "tier", "entries"),
    Family("kvstored_tier_used_bytes", "gauge", "Bytes counted against the tier's budget.", "tier", "used_nbytes"),
    Family("kvstored_tier_capacity_bytes", "gauge", "The tier's budget now.", "tier", "capacity_nbytes"),
    Family("kvstored_tier_puts_total", "counter", "Entries put into the tier by a caller.", "tier", "puts"),
    Family("kvstored_evictions_total", "counter", "Entries that left the store for capacity.", "tier", "evictions"),
    Family("kvstored_demotions_total", "counter", "Entries moved down, by the tier they left.", "tier", "demotions"),
    Family("kvstored_promotions_total", "counter", "Copies made upwards, by tier.", "tier", "promotions"),
)

_STORE = (
    Family("kvstored_gets_total", "counter", "Keys asked for.", value="gets"),
    Family("kvstored_misses_total", "counter", "Gets not answered, by cause.", "cause", "misses_{}"),
    Family("kvstored_lookup_keys_total", "counter", "Keys looked up, by a match or a get; each lookup once.",
           value="lookup_keys"),
    Family("kvstored_lookup_hit_keys_total", "counter", "Of these, held.", value="lookup_hit_keys"),
    Family("kvstored_lookup_tokens_total", "counter", "Tokens of prompts looked up, where the caller says how many.",
           value="lookup_tokens"),
    Family("kvstored_lookup_hit_tokens_total", "counter", "Of these, held.", value="lookup_hit_tokens"),
    Family("kvstored_lookup_misses_total", "counter", "Lookups that ended early, by why the first key is missing.",
           "cause", "lookup_misses_{}"),
    Family("kvstored_hits_total", "counter", "Gets answered, by the tier that answered and the encoding it held.",
           "tier,encoding", "hits_{}"),
    Family("kvstored_hit_bytes_total", "counter", "Decoded bytes of entries found.", value="hit_nbytes"),
    Family("kvstored_puts_total", "counter", "Entries put.", value="puts"),
    Family("kvstored_put_bytes_total", "counter", "Decoded bytes of entries put.", value="put_nbytes"),
    Family("kvstored_deletes_total", "counter", "Entries deleted by a caller.", value="deletes"),
    Family("kvstored_expirations_total", "counter", "Entries forgotten at their deadline.", value="expirations"),
    Family("kvstored_encodes_total", "counter", "Entries encoded on their way down.", value="encodes"),
    Family("kvstored_encode_seconds_total", "counter", "Time spent encoding.", value="encode_s"),
    Family("kvstored_decodes_total", "counter", "Entries decoded for a get or a promotion.", value="decodes"),
    Family("kvstored_decode_seconds_total", "counter", "Time spent decoding.", value="decode_s"),
    Family("kvstored_coarsened_total", "counter", "Entries that went to cold in a coarser form.", value="coarsened"),
    Family("kvstored_coarsened_bytes_total", "counter", "Bytes that coarser forms were smaller by.",
           value="coarsened_nbytes"),
    Family("kvstored_coarsen_seconds_total", "counter", "Time spent making forms coarser.", value="coarsen_s"),
    Family("kvstored_promotions_waiting", "gauge", "Promotions asked for and not made yet.",
           value="promotions_waiting"),
    Family("kvstored_promotions_dropped_total", "counter", "Promotions not tried: 256 waited.",
           value="promotions_dropped"),
    Family("kvstored_maintainer_errors_total", "counter", "Duties of the background thread that failed.",
           value="maintainer_errors"),
    Family("kvstored_entries", "gauge", "Entries held anywhere.", value="entries"),
    Family("kvstored_in_transit", "gauge", "Entries on their way between two tiers.", value="in_transit"),
    Family("kvstored_cold_healthy", "gauge", "1: the disk takes writes; 0: it fails, memory goes on.",
           value="cold_healthy"),
    Family("kvstored_cold_pending_bytes", "gauge", "The cold writer's queue.", value="cold_pending_nbytes"),
    Family("kvstored_cold_disk_bytes", "gauge", "What the file system gave to segments and index.",
           value="cold_disk_nbytes"),
    Family("kvstored_cold_quarantined", "gauge", "1: a damaged directory was set aside at start.",
           value="cold_quarantined"),
    Family("kvstored_cold_clean_start", "gauge", "1: the directory had been closed in order; 0: its owner was killed.",
           value="cold_clean_start"),
    Family("kvstored_cold_start_entries", "gauge", "Entries found on disk at start.", value="cold_start_entries"),
    Family("kvstored_cold_start_expired", "gauge", "Entries on disk at start whose time was over.",
           value="cold_start_expired"),
    Family("kvstored_cold_commits_total", "counter", "Transactions committed.", value="cold_commits"),
    Family("kvstored_cold_records_written_total", "counter", "Records written.", value="cold_records_written"),
    Family("kvstored_cold_written_bytes_total", "counter", "Bytes of records written.", value="cold_bytes_written"),
    Family("kvstored_cold_records_moved_total", "counter", "Small records gathered out of sparse segments.",
           value="cold_records_moved"),
    Family("kvstored_cold_write_errors_total", "counter", "Writes the disk refused.", value="cold_write_errors"),
    Family("kvstored_cold_read_errors_total", "counter", "Reads the disk refused: misses.",
           value="cold_read_errors"),
    Family("kvstored_cold_corrupt_total", "counter", "Records that failed their checksum: misses, deleted.",
           value="cold_corrupt_total"),
    Family("kvstored_cold_evictions_total", "counter", "Records that left the disk for capacity.",
           value="cold_evictions"),
    Family("kvstored_cold_refusals_total", "counter", "Entries not written to disk: admission or the write budget.",
           value="cold_refusals"),
    Family("kvstored_cold_write_left_bytes", "gauge", "Left of store.cold.write_nbytes_per_day; 0 without a budget.",
           value="cold_write_left_nbytes"),
    Family("kvstored_orphaned_total", "counter", "Chunks dropped because their parent was gone.", value="orphaned"),
    Family("kvstored_refused_chunks_total", "counter", "Chunks not stored because their parent is not held.",
           value="refused_chunks"),
    Family("kvstored_tenant_bytes", "gauge", "Bytes a tenant holds, in all tiers.", "tenant", "tenant_nbytes_{}"),
    Family("kvstored_tenant_entries", "gauge", "Entries a tenant holds.", "tenant", "tenant_entries_{}"),
    Family("kvstored_tenant_hits_total", "counter", "Gets of a tenant answered.", "tenant", "tenant_hits_{}"),
    Family("kvstored_namespace_bytes", "gauge", "Bytes held of the 16 namespaces with the most hits.", "namespace",
           "namespace_nbytes_{}"),
    Family("kvstored_namespace_entries", "gauge", "Entries held of them.", "namespace", "namespace_entries_{}"),
    Family("kvstored_namespace_hits_total", "counter", "Gets of them answered.", "namespace", "namespace_hits_{}"),
)  # fmt: skip

_SHARED = (
    Family("kvstored_shared_lookups_total", "counter", "Questions to the shared store for the rest of a prefix.",
           value="shared_lookups"),
    Family("kvstored_shared_futile_total", "counter", "Of these, brought nothing.", value="shared_futile"),
    Family("kvstored_shared_hits_total", "counter", "Chunks that came from the shared store.", value="shared_hits"),
    Family("kvstored_shared_hit_bytes_total", "counter", "Bytes of their objects.", value="shared_hit_nbytes"),
    Family("kvstored_shared_lookup_seconds_total", "counter", "Time spent on these questions.",
           value="shared_lookup_s"),
    Family("kvstored_shared_fetch_seconds_total", "counter", "Time spent on fetching.", value="shared_fetch_s"),
    Family("kvstored_shared_published_total", "counter", "Chunks published.", value="shared_published"),
    Family("kvstored_shared_publish_bytes_total", "counter", "Bytes of their objects.", value="shared_publish_nbytes"),
    Family("kvstored_shared_dropped_total", "counter", "Chunks not published, by reason.",
           "reason", "shared_dropped_{}"),
    Family("kvstored_shared_duplicate_uploads_total", "counter", "Chunks not sent: another host was first.",
           value="shared_duplicate_uploads"),
    Family("kvstored_shared_corrupt_total", "counter", "Objects that were not believed: misses.",
           value="shared_corrupt"),
    Family("kvstored_shared_errors_total", "counter", "Calls that the shared store did not answer, by kind.",
           "kind", "shared_errors_{}"),
    Family("kvstored_shared_barred", "gauge", "Keys deleted here that the shared store has not acknowledged.",
           value="shared_barred"),
    Family("kvstored_shared_breaker", "gauge", "0: the shared store is asked; 1: it is tried; 2: it is left alone.",
           value="shared_breaker"),
    Family("kvstored_shared_queue_bytes", "gauge", "Bytes that wait to be published.", value="shared_queue_nbytes"),
    Family("kvstored_shared_nodes", "gauge", "Servers of the shared store.", value="shared_nodes"),
    Family("kvstored_shared_nodes_up", "gauge", "Of these, answer.", value="shared_nodes_up"),
    Family("kvstored_shared_lag_seconds", "gauge", "From the put of the last chunk published to its publication.",
           value="shared_lag_s"),
)  # fmt: skip
"""Only where [store.shared] is set."""

_EVENTS = (
    Family("kvstored_block_events_total", "counter", "Events published for routers.", value="block_events_published"),
    Family("kvstored_block_events_dropped_total", "counter", "Events dropped, because too many waited.",
           value="block_events_dropped"),
)  # fmt: skip
"""Only where server.events_endpoint is set."""

_DEVICE = (
    Family("kvstored_device_bytes", "gauge", "The GPU's memory that the hot tier has taken.", value="device_nbytes"),
    Family("kvstored_device_used_bytes", "gauge", "Of it, in use by entries and views.", value="device_used_nbytes"),
    Family("kvstored_device_failures_total", "counter", "Entries the GPU's codecs failed at, done by the CPU.",
           value="device_failures"),
)  # fmt: skip
"""Only where store.hot.device is a GPU."""

_ERRORS = Family("kvstored_relative_error", "histogram",
                 "Receipts of tensors encoded: |x - decoded| / |content| of the worst head.", "encoding")  # fmt: skip

_DAEMON = (
    Family("kvstored_in_flight_bytes", "gauge", "Decoded bytes being received or sent.", value="in_flight_nbytes"),
    Family("kvstored_in_flight_limit_bytes", "gauge", "server.in_flight_nbytes.", value="in_flight_limit_nbytes"),
    Family("kvstored_in_flight_refused_total", "counter", "Calls refused because of that limit.",
           value="in_flight_refused"),
    Family("kvstored_calls_waiting", "gauge", "Calls that wait for one of server.threads.", value="calls_waiting"),
    Family("kvstored_calls_delayed_total", "counter", "Calls begun later: their caller took more than its share.",
           value="calls_delayed"),
    Family("kvstored_uptime_seconds", "gauge", "Since start.", value="uptime_s"),
    Family("kvstored_arena_bytes", "gauge", "Shared memory mapped for clients of this host.", value="arena_nbytes"),
    Family("kvstored_arena_used_bytes", "gauge", "Of it, in use by entries and leases.", value="arena_used_nbytes"),
    Family("kvstored_arena_segments", "gauge", "Segments of shared memory.", value="arena_segments"),
    Family("kvstored_arena_fragmentation_ratio", "gauge", "Free room outside its segment's largest hole.",
           value="arena_fragmentation"),
    Family("kvstored_leases", "gauge", "Gets whose tensors clients still read in place.", value="leases"),
    Family("kvstored_lease_connections", "gauge", "Clients on the lease socket.", value="lease_connections"),
    Family("kvstored_leased_entries", "gauge", "Entries in all leases.", value="leased_entries"),
    Family("kvstored_ingest_bytes", "gauge", "Shared memory lent to clients for their puts.", value="ingest_nbytes"),
    Family("kvstored_ingest_hangups_total", "counter", "Connections ended so that others get shared memory for puts.",
           value="ingest_hangups"),
    Family("kvstored_leases_aged_total", "counter", "Leases ended for their age.", value="leases_aged"),
    Family("kvstored_lease_connections_refused_total", "counter", "Clients sent to the stream, by reason.",
           "reason", "lease_connections_refused_{}"),
    Family("kvstored_lease_accept_failures_total", "counter", "Clients that the lease socket could not take.",
           value="lease_accept_failures"),
    Family("kvstored_pressure_shrinks_total", "counter", "Times the hot tier gave way to memory pressure.",
           value="pressure_shrinks"),
    Family("kvstored_heap_idle_bytes", "gauge", "Resident memory that is freed and not used again yet, about.",
           value="heap_idle_nbytes"),
    Family("kvstored_heap_trims_total", "counter", "Times much freed memory was given back to the kernel.",
           value="heap_trims"),
    Family("kvstored_heartbeat_age_seconds", "gauge", "Since the background thread last turned.",
           value="heartbeat_age_s"),
)  # fmt: skip

_MEASURED = (
    Family("kvstored_rpc_seconds", "histogram", "A call from its first byte to its reply, by method and status.",
           "method,code"),
    Family("kvstored_rpc_running", "gauge", "Calls under way, by method.", "method"),
    Family("kvstored_rpc_refused_total", "counter", "Calls without a right to it, by status.", "code"),
    Family("kvstored_calls_refused_total", "counter", "Calls refused or ended for want of a place, by kind of place.",
           "lane,reason"),
    Family("kvstored_prefill_saved_seconds_total", "counter", "Prefill time that clients report as saved."),
    Family("kvstored_build_info", "gauge", "1; the version is in the label.", "version"),
    Family("kvstored_other", "gauge", "A number of the store that has no metric of its own yet.", "name"),
)  # fmt: skip

FAMILIES = (*_TIER, *_STORE, *_SHARED, *_EVENTS, *_DEVICE, _ERRORS, *_DAEMON, *_MEASURED)

DERIVED = frozenset({"hits", "misses", "hit_ratio", "token_hit_ratio", "evictions", "prefill_saved_s", "calls_refused"})
"""Sums over labels, quotients, and what `Meter` exports: no metric is made of them here."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
"""From a small hit over the unix socket (0.5 ms) to a large put on a slow link."""


class Meter:
    """Counts and times calls. Makes the registry that is exported."""

    def __init__(self, version: str = "unknown") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        by_name = {family.name: family for family in _MEASURED}

        def text(name: str) -> tuple[str, str]:
            return name, by_name[name].help

        self._seconds = Histogram(
            *text("kvstored_rpc_seconds"), ("method", "code"), buckets=_SECONDS, registry=self.registry
        )
        self._series: dict[tuple[str, str], Histogram] = {}
        self._lock = threading.Lock()
        self._saved_s = 0.0
        self._turned_away_calls = 0
        self._running = PromGauge(*text("kvstored_rpc_running"), ("method",), registry=self.registry)
        self._refused = PromCounter(*text("kvstored_rpc_refused_total"), ("code",), registry=self.registry)
        self._turned_away = PromCounter(
            *text("kvstored_calls_refused_total"), ("lane", "reason"), registry=self.registry
        )
        self._saved = PromCounter(*text("kvstored_prefill_saved_seconds_total"), registry=self.registry)
        PromGauge(*text("kvstored_build_info"), ("version",), registry=self.registry).labels(version).set(1)

    def running(self, method: str) -> PromGauge:
        """Calls of a method under way: counted up when one has arrived, down when it has ended."""
        return self._running.labels(method)

    def observer(self, method: str, code: str) -> Callable[[float], None]:
        """Takes the seconds of each call of a method that ended with this code, by either door."""
        found = self._series.get((method, code))
        if found is None:  # `labels` takes as long as the whole lookup of a small call
            found = self._series[method, code] = self._seconds.labels(method, code)
        return found.observe

    def refuse(self, code: str) -> None:
        """Count a refused call."""
        self._refused.labels(code).inc()

    def turn_away(self, lane: str, reason: str) -> None:
        """Count a call that got no place or had to give it up. See `access.admission`."""
        self._turned_away.labels(lane, reason).inc()
        with self._lock:
            self._turned_away_calls += 1

    def saved(self, seconds: float) -> None:
        """Add seconds of prefill that a client reports as saved."""
        self._saved.inc(seconds)
        with self._lock:
            self._saved_s += seconds

    def values(self) -> dict[str, float]:
        """What is counted here and shown beside the store's numbers."""
        return {"prefill_saved_s": self._saved_s, "calls_refused": self._turned_away_calls}

    def calls(self) -> list["Calls"]:
        """By method, the slowest in the mean first."""
        found: dict[str, Calls] = {}
        for metric in self._seconds.collect():
            for sample in metric.samples:
                at = found.setdefault(sample.labels["method"], Calls(sample.labels["method"]))
                if sample.name.endswith("_sum"):
                    at.total_s += sample.value
                elif sample.name.endswith("_count"):
                    at.count += int(sample.value)
                elif sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    at.up_to[bound] = at.up_to.get(bound, 0) + int(sample.value)
        return sorted((one for one in found.values() if one.count), key=lambda one: -one.mean_s)


@dataclass(slots=True)
class Calls:
    """The calls of a method since start. up_to: how many took at most so many seconds."""

    method: str
    total_s: float = 0.0
    count: int = 0
    up_to: dict[float, int] = field(default_factory=dict)

    @property
    def mean_s(self) -> float:
        """Seconds of a call in the mean."""
        return self.total_s / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Seconds within which this share of calls was done, from the histogram; at most its last bound."""
        due, before, low = share * self.count, 0, 0.0
        for bound, seen in sorted(self.up_to.items()):
            if seen >= due and seen > before:
                return low if isinf(bound) else low + (bound - low) * (due - before) / (seen - before)
            before, low = seen, bound
        return low


class StoreCollector(Collector):
    """The store's and the daemon's numbers, read at each scrape."""

    def __init__(self, snapshot: Callable[[], Stats]) -> None:
        """snapshot: the store's stats with the daemon's values among them."""
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """All families except those that Meter measures."""
        stats = self._snapshot()
        for family in _TIER:
            yield _family(family, {name: getattr(tier, family.value) for name, tier in stats.tiers.items()})
        yield _relative_errors(stats)
        left = {n: value for n, value in stats.values.items() if n not in DERIVED and not n.startswith(ERRORS)}
        shared = _SHARED if any(name.startswith("shared_") for name in left) else ()
        events = _EVENTS if "block_events_published" in left else ()
        device = _DEVICE if "device_nbytes" in left else ()
        for family in (*_STORE, *shared, *events, *device, *_DAEMON):
            yield _family(family, _take(left, family.value))
        other = next(family for family in _MEASURED if family.name == "kvstored_other")
        yield _family(other, left)


def _take(left: dict[str, float], pattern: str) -> dict[str, float]:
    """Take the values of a name, or of all names like `prefix_{}`, out of `left`; by label."""
    if not pattern.endswith("{}"):
        return {"": left.pop(pattern)} if pattern in left else {}
    prefix = pattern.removesuffix("{}")
    return {name.removeprefix(prefix): left.pop(name) for name in sorted(left) if name.startswith(prefix)}


def _relative_errors(stats: Stats) -> Metric:
    found = HistogramMetricFamily(_ERRORS.name, _ERRORS.help, labels=[_ERRORS.label])
    for encoding, errors in errors_of(stats.values).items():
        buckets = [("+Inf" if bound == "inf" else bound, float(seen)) for bound, seen in errors.buckets()]
        found.add_metric([encoding], buckets, errors.total)
    return found


def _family(family: Family, values: dict[str, float]) -> Metric:
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    names = family.label.split(",") if family.label else []
    found: CounterMetricFamily | GaugeMetricFamily = make(family.name, family.help, labels=names)
    for label, value in values.items():
        # Two labels in one name: the first is a tier, which has no underscore.
        found.add_metric(label.split("_", len(names) - 1) if names else [], value)
    return found
