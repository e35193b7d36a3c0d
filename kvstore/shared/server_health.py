"""What is wrong with the settings of Valkey and Redis servers for a shared cache, and what they hold.

A question that an ACL forbids is a complaint that it cannot be checked, never an error.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis

from kvstore.shared import Health, SharedUnavailable
from kvstore.shared.addresses import Address, is_loopback
from kvstore.shared.discovery import TlsFiles, asking
from kvstore.shared.nodes import Nodes

REPLICA_BUFFER_MIN_NBYTES = 256 << 20
"""Below this a few values in flight end the replica's connection, and it copies everything anew: a loop."""
CLOCK_MAX_S = 5.0
"""TTLs are relative, but a replica and a restarted server expire by their own clocks."""
ASK_TIMEOUT_S = 1.0
SAMPLES_MIN, SAMPLES_ADVISED = 10, 64
"""Of keys, the oldest of which a full server evicts. Four hosts over room for 20,000 blocks: 5, the server's default,
gives 25.4 % hits, 10 26.6, 64 27.5, the exact order 27.8 (simulated; docs/shared.md)."""
_SETTINGS = ("maxmemory", "maxmemory-policy", "maxmemory-samples", "proto-max-bulk-len", "client-output-buffer-limit")


@dataclass(slots=True)
class _Survey:
    """Asks servers one after the other and sums up. -1: none has said it."""

    nodes: Nodes
    tls: TlsFiles
    piece_nbytes: int
    has_replicas: bool
    now: Callable[[], float]
    up: int = 0
    round_trip_s: float = 0.0
    totals: dict[str, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def ask(self, address: Address, timeout_s: float, *, is_primary: bool) -> None:
        """Raises redis.RedisError and OSError."""
        with asking(address, self.nodes.login, self.tls, timeout_s) as client:
            client.ping()
            begun = time.monotonic()
            client.ping()
            self.round_trip_s = max(self.round_trip_s, time.monotonic() - begun)
            self.up += 1
            self._memory(client, address, is_primary=is_primary)
            self._settings(client, address, is_primary=is_primary)
            self._clock(client, address)

    def _memory(self, client: "redis.Redis", address: Address, *, is_primary: bool) -> None:
        told = self._if_allowed(address, "INFO", client.info)
        if not told or not is_primary:
            return
        for name in ("used_memory", "maxmemory", "evicted_keys"):
            if isinstance(told.get(name), int):
                self.totals[name] = self.totals.get(name, 0) + int(told[name])

    def _settings(self, client: "redis.Redis", address: Address, *, is_primary: bool) -> None:
        told = self._if_allowed(address, "CONFIG GET", lambda: client.config_get(*_SETTINGS))
        if told is None:
            return
        self.complaints += [f"{address}: {fault}" for fault in _faults(told, self.piece_nbytes)]
        if self.has_replicas and is_primary:
            self.complaints += [f"{address}: {sentence}" for sentence in _replica_faults(told)]

    def _clock(self, client: "redis.Redis", address: Address) -> None:
        told = self._if_allowed(address, "TIME", client.time)
        off_s = told[0] - self.now() if told is not None else 0.0
        if abs(off_s) > CLOCK_MAX_S:
            self.complaints.append(
                f"{address}: its clock is {off_s:+.0f} s from this host's, at most {CLOCK_MAX_S:.0f} s: set both by NTP"
            )

    def _if_allowed(self, address: Address, what: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except redis.ResponseError as error:
            self.complaints.append(f"{address}: {what} cannot be checked: {str(error)[:120]}")
            return None


def _faults(told: dict[str, str], piece_nbytes: int) -> list[str]:
    faults = []
    policy = told.get("maxmemory-policy", "")
    if policy == "noeviction":
        faults.append("maxmemory-policy is noeviction: once full it refuses every write; set allkeys-lru")
    if told.get("maxmemory") == "0":
        faults.append("maxmemory is 0, no limit: the host's memory runs out; set it to what the cache may use")
    samples = told.get("maxmemory-samples", "")
    if samples.isdigit() and int(samples) < SAMPLES_MIN:
        faults.append(
            f"maxmemory-samples is {samples}: once full it evicts much that is still read; set {SAMPLES_ADVISED}, at "
            f"least {SAMPLES_MIN}"
        )
    bulk_max = told.get("proto-max-bulk-len", "")
    if bulk_max.isdigit() and int(bulk_max) < piece_nbytes:
        faults.append(
            f"proto-max-bulk-len is {bulk_max}, less than a piece of {piece_nbytes} bytes: longer ones are refused"
        )
    return faults


def _replica_faults(told: dict[str, str]) -> list[str]:
    words = told.get("client-output-buffer-limit", "").split()
    for kind, hard, soft in zip(words[::4], words[1::4], words[2::4], strict=False):
        limits = [int(limit) for limit in (hard, soft) if limit.isdigit() and int(limit)]
        if kind in ("slave", "replica") and limits and min(limits) < REPLICA_BUFFER_MIN_NBYTES:
            sentence = (
                f"client-output-buffer-limit replica is {hard} {soft}, at least {REPLICA_BUFFER_MIN_NBYTES} bytes are "
                "needed: a burst of values ends the replica's connection, and it copies everything anew"
            )
            return [sentence]
    return []


def of_servers(
    nodes: Nodes, tls: TlsFiles, left_s: Callable[[], float], now: Callable[[], float], *, piece_nbytes: int
) -> Health:
    """Of all servers of a topology; memory is the primaries'. Raises SharedUnavailable if none answers.

    now: Unix seconds.
    """
    topology = nodes.topology
    addresses = topology.addresses() if topology else list(nodes.seeds)
    primaries = set(topology.primaries() if topology else ())
    survey = _Survey(nodes, tls, piece_nbytes, len(primaries) < len(addresses), now)
    last: Exception | None = None
    for address in addresses:
        if left_s() <= 0:
            break
        try:
            survey.ask(address, min(ASK_TIMEOUT_S, left_s()), is_primary=address in primaries)
        except (redis.RedisError, OSError) as error:
            last = error
            nodes.node(address).breaker.failed(hung=isinstance(error, redis.TimeoutError))
    if not survey.up:
        raise SharedUnavailable("unreachable", f"the shared store: no server answers: {last}")
    if nodes.login.context is None and not all(is_loopback(address.host) for address in addresses):
        survey.complaints.append(
            "records and the password cross the network in clear: use valkeys:// or rediss:// (tls-port on the server)"
        )
    # Without a limit on one server there is none on all.
    bounded = not any("maxmemory is 0" in sentence for sentence in survey.complaints)
    return Health(
        len(addresses), survey.up, survey.round_trip_s, survey.totals.get("used_memory", -1),
        survey.totals.get("maxmemory", -1) if bounded else -1, survey.totals.get("evicted_keys", -1), survey.complaints,
    )  # fmt: skip
