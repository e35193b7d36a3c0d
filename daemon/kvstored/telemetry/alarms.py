"""What is wrong now, for the status page: the alerts of daemon/prometheus/alerts.yml, as far as one daemon can tell.

Each has the alert's name, so that docs/operations.md says more. Pure: numbers in, alarms out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kvstore.shared.breaker import OPEN

PENDING_NBYTES = 60e6
"""The cold writer's queue holds 64 MiB."""
LOOKED_UP_MIN = 200
"""Fewer keys say nothing of a ratio."""
CROWDED = 300
"""Refusals in five minutes: one a second."""
NOT_BELIEVED = 10
"""Objects in an hour: a failover may bring one."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """name: of the alert. severity: critical or warning. text: what is the case. do: what helps."""

    name: str
    severity: Literal["critical", "warning"]
    text: str
    do: str


def alarms(now: Mapping[str, float], lately: Mapping[str, float], hour: Mapping[str, float]) -> list[Alarm]:
    """All that holds, the worst first. now: values; lately, hour: what was counted in five minutes, and in an hour."""
    found = [*_disk(now, hour), *_load(now, lately), *_shared(now, lately, hour), *_cache(lately, hour)]
    return sorted(found, key=lambda alarm: alarm.severity)


def _disk(now: Mapping[str, float], hour: Mapping[str, float]) -> list[Alarm]:
    found = []
    if now.get("cold_healthy", 1) == 0:
        found.append(Alarm(
            "KvstoredDiskFailing", "critical", "The disk refuses writes: entries stay in memory.",
            "df, dmesg. Full: make room, or lower store.cold.capacity_nbytes. Broken: stop, replace it, start empty.",
        ))  # fmt: skip
    if hour["cold_corrupt_total"] > 0:
        found.append(Alarm(
            "KvstoredCorruptRecords", "warning",
            f"{hour['cold_corrupt_total']:,.0f} records failed their checksum in the last hour; each is gone.",
            "One after a power cut is nothing. A steady stream is a dying disk or bad memory: dmesg, SMART, memtest.",
        ))  # fmt: skip
    if now.get("cold_quarantined", 0):
        found.append(Alarm(
            "KvstoredQuarantined", "warning", "The index failed its check at start: the disk tier began empty.",
            "Nothing urgent: the cache fills again. Delete quarantine/ when nobody wants to look at it.",
        ))  # fmt: skip
    if now.get("cold_pending_nbytes", 0) > PENDING_NBYTES:
        found.append(Alarm(
            "KvstoredWriterBehind", "warning", "The queue to the disk is full.",
            'A larger hot or warm tier, a faster disk, or store.cold.admission = "reused".',
        ))  # fmt: skip
    return found


def _load(now: Mapping[str, float], lately: Mapping[str, float]) -> list[Alarm]:
    rules: tuple[tuple[bool, str, str, str], ...] = (
        (lately["in_flight_refused"] > CROWDED, "KvstoredRefusing", "Calls are refused: too many bytes in flight.",
         "Raise server.in_flight_nbytes if memory allows, or fewer workers at once."),
        (lately["calls_refused"] > CROWDED, "KvstoredCrowded", "Calls are refused or ended for want of a place.",
         "kvstored_calls_refused_total says why. full: raise server.calls_max, or fewer workers."),
        (lately["pressure_shrinks"] > 0, "KvstoredMemoryPressure", "The hot tier shrank: the host is out of memory.",
         "It grows back by itself. Lower the budgets if it happens daily."),
        (lately["maintainer_errors"] > 0, "KvstoredDutiesFailing", "A background duty raised an error.",
         "The journal has the traceback: report it."),
        (lately["lease_accept_failures"] > 0, "KvstoredLeaseSocketFailing", "The lease socket cannot take clients.",
         "The journal has the reason: LimitNOFILE= or TasksMax= of the unit, or a process with too many connections."),
    )  # fmt: skip
    found = [Alarm(name, "warning", text, do) for holds, name, text, do in rules if holds]
    if now.get("heartbeat_age_s", 0) > 60:
        text = f"The background thread has not turned for {now['heartbeat_age_s']:.0f} s."
        found.append(Alarm("KvstoredStalled", "warning", text, "Usually a disk that does not answer: dmesg."))
    return found


def _shared(now: Mapping[str, float], lately: Mapping[str, float], hour: Mapping[str, float]) -> list[Alarm]:
    """Of the store that hosts share, and of routers."""
    nodes, up = now.get("shared_nodes", 0), now.get("shared_nodes_up", 0)
    rules: tuple[tuple[bool, str, str, str], ...] = (
        (now.get("shared_breaker", 0) == OPEN or up < nodes, "KvstoredSharedDown",
         f"Of the shared store {up:,.0f} of {nodes:,.0f} servers answer; this host goes on alone, no slower.",
         "kvstored remote check, then the servers of store.shared.url. Publications wait, the oldest are dropped."),
        (lately["shared_dropped_full"] > 0, "KvstoredSharedBehind",
         f"{lately['shared_dropped_full']:,.0f} chunks were put faster than they could be published.",
         'A faster network, store.shared.admission = "reused", or a larger store.shared.buffer_nbytes.'),
        (hour["shared_corrupt"] > NOT_BELIEVED, "KvstoredSharedDamaged",
         f"{hour['shared_corrupt']:,.0f} objects of the shared store were not believed in the last hour: misses.",
         "Another fleet with other store.shared.key_files, or somebody forges: kvstored remote check, its ACL."),
        (lately["block_events_dropped"] > 0, "KvstoredEventsDropped",
         f"{lately['block_events_dropped']:,.0f} events for routers were dropped: they forget what they were told.",
         "The daemon has no CPU to publish them: fewer small entries, or no server.events_endpoint."),
    )  # fmt: skip
    return [Alarm(name, "warning", text, do) for holds, name, text, do in rules if holds]


def _cache(lately: Mapping[str, float], hour: Mapping[str, float]) -> list[Alarm]:
    kind = "tokens" if hour["lookup_tokens"] else "keys"
    if lately["lookup_keys"] < LOOKED_UP_MIN or not hour[f"lookup_{kind}"] or not lately[f"lookup_{kind}"]:
        return []
    new, old = (of[f"lookup_hit_{kind}"] / of[f"lookup_{kind}"] for of in (lately, hour))
    if new >= 0.5 * old:
        return []
    return [Alarm(
        "KvstoredHitRatioFell", "warning", f"Hit ratio {new:.0%} in five minutes, {old:.0%} in the last hour.",
        "A new model or prompt (normal), or misses by cause: expired: raise store.ttl_s; evicted: more room.",
    )]  # fmt: skip
